"""rmsnorm, fused_add_rmsnorm and silu_and_mul in plain torch, torch.compile and Triton: what a user would write
without a kernel library.

Each function of a style takes the inputs and returns a call (or the pair (call, result) for in-place work), like
benchmarks.calls.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

EPS = 1e-6


def _norm_f32(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    import torch

    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.float()).to(weight.dtype)


def _plain(compiled: bool) -> SimpleNamespace:
    def maybe(f: Any) -> Any:
        if not compiled:
            return f
        import torch

        return torch.compile(f, dynamic=False)

    def rmsnorm(x: torch.Tensor, weight: torch.Tensor) -> Any:
        import torch.nn.functional as F

        f = (
            maybe(lambda x, w: _norm_f32(x.float(), w))
            if compiled
            else lambda x, w: F.rms_norm(x, (x.shape[-1],), w, EPS)
        )
        return lambda: f(x, weight)

    def fused_add_rmsnorm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
        import torch

        def both(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            total = x.float() + residual.float()
            return _norm_f32(total, weight), total.to(x.dtype)

        f = maybe(both)
        return lambda: f(x, residual, weight), lambda: torch.cat(f(x, residual, weight))

    def silu_and_mul(x: torch.Tensor) -> Any:
        import torch.nn.functional as F

        half = x.shape[-1] // 2
        # Compiled: in float32 between load and store, as a kernel would. Eager: two kernels in the tensor's dtype, the way it is written by hand.
        f = (
            maybe(lambda x: (F.silu(x[..., :half].float()) * x[..., half:].float()).to(x.dtype))
            if compiled
            else lambda x: F.silu(x[..., :half]) * x[..., half:]
        )
        return lambda: f(x)

    return SimpleNamespace(rmsnorm=rmsnorm, fused_add_rmsnorm=fused_add_rmsnorm, silu_and_mul=silu_and_mul)


def _triton() -> SimpleNamespace:
    from benchmarks import peers

    try:
        from benchmarks import triton_kernels
    except ImportError as error:
        raise peers.Missing(f"triton cannot be imported: {error}") from error
    return SimpleNamespace(
        rmsnorm=triton_kernels.rmsnorm,
        fused_add_rmsnorm=triton_kernels.fused_add_rmsnorm,
        silu_and_mul=triton_kernels.silu_and_mul,
    )


class _Styles:
    """The styles by name, made when asked for."""

    def __getitem__(self, style: str) -> SimpleNamespace:
        return _triton() if style == "triton" else _plain(style == "torch-compile")


STYLES = _Styles()
