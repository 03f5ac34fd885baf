"""What the Triton operators share: the kernels, fetched when first needed, and views of their torch tensors."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

from pyinfer.core.errors import fail, fail_type
from pyinfer.core.tensor import TensorView, view


def kernels(op: str) -> ModuleType:
    """The module of the kernels. ImportError if triton is not installed."""
    try:
        import triton  # noqa: F401 - the message below is for its absence alone
    except ImportError as error:
        raise ImportError(
            f"{op}: needs the package triton: got {type(error).__name__} ({error}), wanted triton 3 or newer. "
            "pip install triton, or call the CUDA operator in pyinfer, which does without."
        ) from error
    from pyinfer.triton import _kernels

    return _kernels


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def torch_view(op: str, arg: str, x: Any) -> TensorView:
    """`view` of a torch tensor where Triton can reach it."""
    v = view(x, op, arg)
    if v.framework != "torch":
        fail_type(
            op,
            arg,
            "is no torch tensor",
            v.framework,
            "a torch tensor",
            "The CUDA operators in pyinfer take any framework.",
        )
    if v.device < 0 and not interpreted():
        fail(op, arg, "is on the CPU", "a CPU tensor", "a tensor on a GPU", "The operators in pyinfer run on either.")
    return v


class on_device:
    """Make a view's device the current one: Triton launches there, on torch's current stream."""

    __slots__ = ("_guard",)

    def __init__(self, v: TensorView) -> None:
        import torch

        self._guard = torch.cuda.device(v.device) if v.device >= 0 else None

    def __enter__(self) -> None:
        if self._guard is not None:
            self._guard.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._guard is not None:
            self._guard.__exit__(*error)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def warps(block: int) -> int:
    """Warps for a program over `block` elements: 16 elements a thread, 4 to 16 warps."""
    return min(max(block // 512, 4), 16)


def one_scale(op: str, arg: str, scale: Any, like: TensorView) -> Any:
    """A scale as a float32 tensor of one element on the device of `like`, or None."""
    if scale is None:
        return None
    import torch

    if isinstance(scale, float | int):
        return torch.full((1,), float(scale), dtype=torch.float32, device=like.obj.device)
    v = torch_view(op, arg, scale)
    if v.dtype.name != "float32":
        fail_type(op, arg, "has the wrong dtype", v.dtype.name, "float32")
    if v.size != 1:
        fail(op, arg, "has the wrong number of elements", v.size, "1")
    if v.device != like.device:
        fail(op, arg, "is on another device", scale.device, like.obj.device)
    return scale
