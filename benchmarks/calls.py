"""Calls through FlashInfer's API with the module passed in: the same lines drive pyinfer and flashinfer.

Each function plans if there is something to plan and returns a Variant's `run` (and `result`, where a call works in
place and must be checked on fresh inputs). Outputs are given (`out=`) wherever the API has it, so that allocation is
not timed on one side only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.inputs import Attention

Run = Callable[[], Any]
_workspaces: dict[tuple[str, str], torch.Tensor] = {}


def workspace(module: Any, device: str) -> torch.Tensor:
    """The float workspace that users of FlashInfer hand in: 128 MiB (8 MiB on the CPU), zero at first, one per library and device."""
    import torch

    key = (getattr(module, "__name__", ""), device)
    if key not in _workspaces:
        _workspaces[key] = torch.zeros((128 if device != "cpu" else 8) << 20, dtype=torch.uint8, device=device)
    return _workspaces[key]


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


def plan_decode(module: Any, a: Attention, **options: Any) -> tuple[Any, Run]:
    """A decode wrapper and its plan() as a call."""
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace(module, a.device), "NHD", **options)
    dtype = _dtype(a.dtype)

    def plan() -> None:
        wrapper.plan(
            a.kv_indptr,
            a.kv_indices,
            a.last_page_len,
            a.num_qo_heads,
            a.num_kv_heads,
            a.head_dim,
            a.page_size,
            q_data_type=dtype,
            kv_data_type=_dtype(a.kv_dtype or a.dtype),
        )

    return wrapper, plan


def decode(module: Any, a: Attention, **options: Any) -> Run:
    """Batch decode over pages."""
    import torch

    wrapper, plan = plan_decode(module, a, **options)
    plan()
    out, q, cache = torch.empty_like(a.q), a.q, (a.k, a.v)
    return lambda: wrapper.run(q, cache, out=out)


def plan_paged_prefill(module: Any, a: Attention, **options: Any) -> tuple[Any, Run]:
    """A paged prefill wrapper and its plan() as a call."""
    wrapper = module.BatchPrefillWithPagedKVCacheWrapper(workspace(module, a.device), "NHD", **options)
    dtype = _dtype(a.dtype)

    def plan() -> None:
        wrapper.plan(
            a.qo_indptr,
            a.kv_indptr,
            a.kv_indices,
            a.last_page_len,
            a.num_qo_heads,
            a.num_kv_heads,
            a.head_dim,
            a.page_size,
            causal=a.causal,
            q_data_type=dtype,
            kv_data_type=dtype,
        )

    return wrapper, plan


def plan_ragged_prefill(module: Any, a: Attention, **options: Any) -> tuple[Any, Run]:
    """A ragged prefill wrapper and its plan() as a call."""
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace(module, a.device), "NHD", **options)
    dtype = _dtype(a.dtype)

    def plan() -> None:
        wrapper.plan(
            a.qo_indptr,
            a.kv_indptr,
            a.num_qo_heads,
            a.num_kv_heads,
            a.head_dim,
            causal=a.causal,
            q_data_type=dtype,
            kv_data_type=dtype,
        )

    return wrapper, plan


def prefill(module: Any, a: Attention, **options: Any) -> Run:
    """Batch prefill: over pages if the batch has them, else ragged."""
    import torch

    wrapper, plan = (plan_paged_prefill if a.page_size else plan_ragged_prefill)(module, a, **options)
    plan()
    out, q = torch.empty_like(a.q), a.q
    if a.page_size:
        cache = (a.k, a.v)
        return lambda: wrapper.run(q, cache, out=out)
    k, v = a.k, a.v
    return lambda: wrapper.run(q, k, v, out=out)


def rmsnorm(module: Any, x: torch.Tensor, weight: torch.Tensor) -> Run:
    import torch

    out = torch.empty_like(x)
    return lambda: module.rmsnorm(x, weight, 1e-6, out=out)


def fused_add_rmsnorm(module: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[Run, Run]:
    """In place: the timed call keeps working on its own copies, the checked one on fresh copies."""
    import torch

    own_x, own_residual = x.clone(), residual.clone()

    def result() -> torch.Tensor:
        fresh_x, fresh_residual = x.clone(), residual.clone()
        module.fused_add_rmsnorm(fresh_x, fresh_residual, weight, 1e-6)
        return torch.cat([fresh_x, fresh_residual])

    return lambda: module.fused_add_rmsnorm(own_x, own_residual, weight, 1e-6), result


def silu_and_mul(module: Any, x: torch.Tensor) -> Run:
    import torch

    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    return lambda: module.silu_and_mul(x, out=out)


def rope(module: Any, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor) -> tuple[Run, Run]:
    """apply_rope_pos_ids_inplace. A rotation keeps lengths, so repeating it on one tensor changes nothing about its cost."""
    own_q, own_k = q.clone(), k.clone()

    def result() -> torch.Tensor:
        import torch

        fresh_q, fresh_k = q.clone(), k.clone()
        module.apply_rope_pos_ids_inplace(fresh_q, fresh_k, positions)
        return torch.cat([fresh_q, fresh_k], dim=1)

    return lambda: module.apply_rope_pos_ids_inplace(own_q, own_k, positions), result


def rope_cached(
    module: Any, q: torch.Tensor, k: torch.Tensor, positions: torch.Tensor, cache: torch.Tensor
) -> tuple[Run, Run]:
    """apply_rope_with_cos_sin_cache_inplace over q and k as [tokens, heads * head_dim]."""
    dim = q.shape[-1]
    flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731 - three uses below
    own_q, own_k = flat(q.clone()), flat(k.clone())

    def result() -> torch.Tensor:
        import torch

        fresh_q, fresh_k = flat(q.clone()), flat(k.clone())
        module.apply_rope_with_cos_sin_cache_inplace(positions, fresh_q, fresh_k, dim, cache)
        return torch.cat([fresh_q, fresh_k], dim=1)

    return lambda: module.apply_rope_with_cos_sin_cache_inplace(positions, own_q, own_k, dim, cache), result


def append(
    module: Any,
    a: Attention,
    key: torch.Tensor,
    value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[Run, Run]:
    """append_paged_kv_cache into the batch's pages, with every index array on the device as a serving loop has them."""
    import torch

    indptr, last = a.kv_indptr.to(a.device), a.last_page_len.to(a.device)

    def write(cache: tuple[torch.Tensor, torch.Tensor]) -> None:
        module.append_paged_kv_cache(key, value, batch_indices, positions, cache, a.kv_indices, indptr, last, "NHD")

    def result() -> torch.Tensor:
        fresh = (torch.full_like(a.k, 7.0), torch.full_like(a.v, 7.0))
        write(fresh)
        return torch.stack(fresh)

    cache = (a.k, a.v)
    return lambda: write(cache), result


def mla(
    module: Any,
    q: torch.Tensor,
    cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
    **options: Any,
) -> Run:
    """Multi-head latent attention, causal: q [tokens, heads, 576], cache [pages, page_size, 576]."""
    import torch

    wrapper = module.mla.BatchMLAPagedAttentionWrapper(workspace(module, q.device.type), **options)
    tables = (qo_indptr, kv_indptr, kv_indices, kv_len)
    if module.__name__ == "flashinfer":  # takes them from the GPU, where its plan() copies them back from
        tables = tuple(x.to(q.device) for x in tables)
    wrapper.plan(*tables, q.shape[1], 512, 64, cache.shape[1], True, sm_scale, q.dtype, cache.dtype)
    out = torch.empty((*q.shape[:2], 512), dtype=q.dtype, device=q.device)
    parts = (q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:])
    if module.__name__ == "flashinfer":
        parts = tuple(x.contiguous() for x in parts[:2]) + parts[2:]
    return lambda: wrapper.run(*parts, out=out)
