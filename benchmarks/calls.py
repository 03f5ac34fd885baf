"""Calls through FlashInfer's API with the module passed in: the same lines drive pyinfer and flashinfer.

Each function plans if there is something to plan and returns a Variant's `run` (and `result`, where a call works in
place and must be checked on fresh inputs). Outputs are given (`out=`) wherever the API has it, so that allocation is
not timed on one side only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.inputs import out_dtype_of

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
    out_dtype = {"o_data_type": _dtype(out_dtype_of(a.dtype))} if a.dtype.startswith("float8") else {}

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
            **out_dtype,
        )

    return wrapper, plan


def plan_ragged_prefill(module: Any, a: Attention, **options: Any) -> tuple[Any, Run]:
    """A ragged prefill wrapper and its plan() as a call."""
    wrapper = module.BatchPrefillWithRaggedKVCacheWrapper(workspace(module, a.device), "NHD", **options)
    dtype = _dtype(a.dtype)
    out_dtype = {"o_data_type": _dtype(out_dtype_of(a.dtype))} if a.dtype.startswith("float8") else {}

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
            **out_dtype,
        )

    return wrapper, plan


def prefill(module: Any, a: Attention, **options: Any) -> Run:
    """Batch prefill: over pages if the batch has them, else ragged."""
    import torch

    wrapper, plan = (plan_paged_prefill if a.page_size else plan_ragged_prefill)(module, a, **options)
    plan()
    out, q = torch.empty_like(a.q, dtype=_dtype(out_dtype_of(a.dtype))), a.q
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


def plan_mla(
    module: Any,
    q: torch.Tensor,
    cache: torch.Tensor,
    qo_indptr: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    kv_len: torch.Tensor,
    sm_scale: float,
    **options: Any,
) -> tuple[Any, Run]:
    """A wrapper of multi-head latent attention and its plan() as a call."""
    wrapper = module.mla.BatchMLAPagedAttentionWrapper(workspace(module, q.device.type), **options)
    tables = (qo_indptr, kv_indptr, kv_indices, kv_len)
    if module.__name__ == "flashinfer":  # takes them from the GPU, where its plan() copies them back from
        tables = tuple(x.to(q.device) for x in tables)
    return wrapper, lambda: wrapper.plan(
        *tables, q.shape[1], 512, 64, cache.shape[1], True, sm_scale, q.dtype, cache.dtype
    )


def mla(module: Any, q: torch.Tensor, cache: torch.Tensor, *tables: Any, **options: Any) -> Run:
    """Multi-head latent attention, causal: q [tokens, heads, 576], cache [pages, page_size, 576]; the rest as `plan_mla`."""
    import torch

    wrapper, plan = plan_mla(module, q, cache, *tables, **options)
    plan()
    out = torch.empty((*q.shape[:2], 512), dtype=q.dtype, device=q.device)
    parts = (q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:])
    if module.__name__ == "flashinfer":
        parts = tuple(x.contiguous() for x in parts[:2]) + parts[2:]
    return lambda: wrapper.run(*parts, out=out)


def _function(module: Any, name: str) -> Any:
    """A function that not every version of the peer has."""
    found = getattr(module, name, None) or getattr(getattr(module, "norm", None), name, None)
    found = found or getattr(getattr(module, "rope", None), name, None)
    if found is None:
        from benchmarks.peers import Missing

        raise Missing(f"{getattr(module, '__name__', module)} has no {name}")
    return found


def _fp8(x: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    import torch

    return torch.zeros(tuple(x.shape) if shape is None else shape, device=x.device).to(torch.float8_e4m3fn)


def rmsnorm_quant(module: Any, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> tuple[Run, Run]:
    """Into 8-bit floats, by a scale in a tensor."""
    f, out = _function(module, "rmsnorm_quant"), _fp8(x)
    run = lambda: f(out, x, weight, scale, 1e-6)  # noqa: E731 - twice below
    return run, lambda: (run(), out)[1]


def fused_add_rmsnorm_quant(
    module: Any, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[Run, Run]:
    """In place on the residual: checked on a fresh one."""
    f, out, own = _function(module, "fused_add_rmsnorm_quant"), _fp8(x), residual.clone()

    def result() -> torch.Tensor:
        f(out, x, residual.clone(), weight, scale, 1e-6)
        return out

    return lambda: f(out, x, own, weight, scale, 1e-6), result


def rmsnorm_dynamic_quant(module: Any, x: torch.Tensor, weight: torch.Tensor) -> Run:
    """Into 8-bit floats, by each row's own scale."""
    f, out, scales = _function(module, "rmsnorm_dynamic_quant"), _fp8(x), x.new_empty((x.shape[0], 1)).float()
    return lambda: f(x, weight, 1e-6, out, scales)


def layernorm(module: Any, x: torch.Tensor, weight: torch.Tensor) -> Run:
    """Weight and bias in float32. Allocates its output: FlashInfer's has no `out`."""
    f, w = _function(module, "layernorm"), weight.float()
    return lambda: f(x, w, w, 1e-6)


def silu_and_mul_quant(module: Any, x: torch.Tensor, by_rows: bool) -> tuple[Run, Run] | Run:
    """Into 8-bit floats, by a scale or by each row's own."""
    out = _fp8(x, (*x.shape[:-1], x.shape[-1] // 2))
    if by_rows:
        f, scales = _function(module, "silu_and_mul_dynamic_quant"), x.new_empty((x.shape[0], 1)).float()
        return lambda: f(x, out, scales)
    f, scale = _function(module, "silu_and_mul_quant"), x.new_full((1,), 0.02).float()
    run = lambda: f(out, x, scale)  # noqa: E731 - twice below
    return run, lambda: (run(), out)[1]


class Fused:
    """Tokens of one request with queries, keys, values, a table of angles and a cache: what the fused rotary operators take."""

    def __init__(self, tokens: int, q_heads: int, kv_heads: int, dim: int, dtype: str, device: str) -> None:
        import torch

        from benchmarks.inputs import randn

        self.page_size = 16
        pages = -(-tokens // 16) + 1
        self.q, self.k, self.v = (randn((tokens, h, dim), dtype, device) for h in (q_heads, kv_heads, kv_heads))
        angle = torch.rand((max(tokens, 32768), dim // 2), device=device) * 6.28
        self.table = torch.cat([angle.cos(), angle.sin()], dim=1)
        self.pos_ids = torch.randperm(len(angle), device=device)[:tokens].int()
        self.kv_indices = torch.randperm(pages, device=device).int()
        self.kv_indptr = torch.tensor([0, pages], dtype=torch.int32, device=device)
        self.batch_indices = torch.zeros(tokens, dtype=torch.int32, device=device)
        self.positions = torch.arange(tokens, dtype=torch.int32, device=device)
        self.last = torch.tensor([tokens % 16 or 16], dtype=torch.int32, device=device)
        self.caches = tuple(torch.zeros((pages, 16, kv_heads, dim), dtype=self.q.dtype, device=device) for _ in "kv")
        self.small = tuple(_fp8(self.q, tuple(c.shape)) for c in self.caches)

    @property
    def places(self) -> tuple[torch.Tensor, ...]:
        """Page table and places, in the order of the fused operators."""
        return self.kv_indices, self.kv_indptr, self.batch_indices, self.positions


def rope_append(module: Any, a: Fused) -> Run:
    """Rotation and append in one launch, in the tensors' own dtype."""
    import torch

    f, out = _function(module, "rope_append_paged_kv_cache"), torch.empty_like(a.q)
    return lambda: f(a.q, a.k, a.v, a.table, a.pos_ids, a.caches, *a.places, q_out=out)


def rope_then_append(module: Any, a: Fused) -> tuple[Run, Run]:
    """The same in two launches, the rotation in place."""
    dim, own_q, own_k = a.q.shape[-1], a.q.clone(), a.k.clone()
    arguments = (a.v, a.batch_indices, a.positions, a.caches, a.kv_indices, a.kv_indptr, a.last)

    def both(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        module.apply_rope_with_cos_sin_cache_inplace(
            a.pos_ids, q.view(len(q), -1), k.view(len(k), -1), dim, a.table, True
        )
        module.append_paged_kv_cache(k, *arguments)
        return q

    return lambda: both(own_q, own_k), lambda: both(a.q.clone(), a.k.clone())


def rope_quantize_append(module: Any, a: Fused) -> Run:
    """Rotation, rounding to 8 bits and append in one launch."""
    f, out, none = _function(module, "rope_quantize_fp8_append_paged_kv_cache"), _fp8(a.q), _fp8(a.q[..., :0])
    return lambda: f(
        a.q, a.k, None, None, a.v, a.table, a.pos_ids, a.small, *a.places, page_size=16, q_rope_out=out, q_nope_out=none
    )


def append_quantized(module: Any, a: Fused) -> tuple[Run, Run]:
    """Keys and values rounded to 8 bits on the way into the cache."""
    arguments = (a.k, a.v, a.batch_indices, a.positions, a.small, a.kv_indices, a.kv_indptr, a.last)
    run = lambda: module.append_paged_kv_cache(*arguments, k_scale=0.02, v_scale=0.02)  # noqa: E731 - twice below
    return run, lambda: (run(), a.small[0])[1]


def gather(module: Any, a: Fused) -> Run:
    """Keys and values out of the cache, in order."""
    import torch

    f, out = _function(module, "gather_paged_kv_cache"), (torch.empty_like(a.k), torch.empty_like(a.v))
    return lambda: f(a.batch_indices, a.positions, a.caches, a.kv_indices, a.kv_indptr, "NHD", *out)


def copy_pages(module: Any, a: Fused) -> Run:
    """Half of the pages into the other half."""
    f, half = _function(module, "copy_pages"), len(a.kv_indices) // 2
    source, target = a.kv_indices[:half], a.kv_indices[half : 2 * half]
    return lambda: f(a.caches, source, target)
