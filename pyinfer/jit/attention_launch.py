"""Launch the attention kernels: of a plan, or of a single request by arithmetic in the kernel. Callers have checked the tensors; here only alignment is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from pyinfer.core.dtypes import DType
from pyinfer.core.errors import fail
from pyinfer.jit.attention import AttentionConfig, attention_config, gen_attention
from pyinfer.schedulers.plan import SINGLE_SEMAPHORE_BYTES, AttentionPlan, partial_bytes

if TYPE_CHECKING:
    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView

LOG2_E = 1.4426950408889634
ALIGNMENT = 16  # bytes of one copy
_UNSEEN = 1 << 30  # a window no key lies outside of; larger ones could overflow an index


def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) with n // d == (n * magic) >> shift for 0 <= n < 2^31: the kernels' `fast_divide`.

    With l = ceil(log2 d) and magic = ceil(2^(31 + l) / d) the error n * (magic * d - 2^(31 + l)) / (d * 2^(31 + l)) is below 1 / d
    (Granlund and Montgomery, 1994).
    """
    bits = (d - 1).bit_length()
    return -(-(1 << (31 + bits)) // d), 31 + bits


def _shape_values(
    num_qo_heads: int, num_kv_heads: int, causal: bool, window_left: int, page_size: int
) -> tuple[int, ...]:
    group = num_qo_heads // num_kv_heads
    return (
        num_kv_heads,
        group,
        *divisor(group),
        int(causal),
        min(window_left, _UNSEEN),
        page_size,
        *divisor(max(page_size, 1)),
    )


@functools.cache
def _kernel(
    device: int, config: AttentionConfig, dtype: DType, head_dim_qk: int, head_dim_vo: int, source: str, variant: str
) -> Kernel:
    return gen_attention(config, dtype, head_dim_qk, head_dim_vo, source, variant).build_and_load(device)


@functools.cache
def device_config(
    device: int, dtype: DType, head_dim_qk: int, head_dim_vo: int, max_packed_rows: int
) -> AttentionConfig:
    """`attention_config` for the architecture that is built for a CUDA device."""
    from pyinfer.core.device import arch_number_of

    return attention_config(arch_number_of(device), dtype, head_dim_qk, head_dim_vo, max_packed_rows)


class PreparedAttention(NamedTuple):
    """All of a launch that a plan fixes: kernel, grid, and the tail of the parameter struct."""

    kernel: Kernel
    grid: int
    constants: tuple[int, ...]
    partial_lse_offset: int
    semaphore: int


@functools.lru_cache(maxsize=16)
def prepare_attention(
    device: int,
    plan: AttentionPlan,
    plan_buffer_ptr: int,
    dtype: DType,
    soft_cap: bool,
    config: AttentionConfig | None = None,
) -> PreparedAttention:
    """Fetch (or compile) a plan's kernel and fill in what stays the same from run to run.

    Parameters
    ----------
    device
        CUDA ordinal.
    plan, plan_buffer_ptr
        The plan and the device address it is uploaded to.
    dtype
        Of q, k, v and the output.
    soft_cap
        Whether logits are soft-capped: a kernel of its own.
    config
        The configuration the plan was made for; by default the device's own for the plan's tile_q.
    """
    config = config or device_config(device, dtype, plan.head_dim_qk, plan.head_dim_vo, plan.tile_q)
    if config.tile_q != plan.tile_q:
        fail("attention", "plan", "was made for another tile", plan.tile_q, f"tile_q {config.tile_q} of {config.tag}")
    kernel = _kernel(
        device, config, dtype, plan.head_dim_qk, plan.head_dim_vo, "plan", "softcap" if soft_cap else "plain"
    )
    at = plan.offsets
    pointers = (
        plan_buffer_ptr,
        *(plan_buffer_ptr + 4 * offset for offset in (at.work, at.qo_indptr, at.kv_indptr, at.kv_len)),
    )
    constants = (
        _shape_values(plan.num_qo_heads, plan.num_kv_heads, plan.causal, plan.window_left, plan.page_size) + pointers
    )
    return PreparedAttention(
        kernel,
        plan.max_work * plan.num_kv_heads,
        constants,
        plan.partial_lse_offset,
        plan_buffer_ptr + 4 * at.semaphore,
    )


def launch_attention(
    device: int,
    stream: int,
    plan_buffer_ptr: int,
    plan: AttentionPlan,
    q: TensorView,
    k: TensorView,
    v: TensorView,
    kv_indices_ptr: int,
    kv_layout: str,
    out: TensorView,
    lse: TensorView | None,
    workspace_ptr: int,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    v_scale: float = 1.0,
    pdl: bool = False,
    config: AttentionConfig | None = None,
    bind: bool = False,
) -> BoundLaunch | None:
    """Run a plan; or, with `bind`, return its launch bound but for the addresses of q, k, v, out and lse.

    Parameters
    ----------
    device, stream
        CUDA ordinal and raw stream.
    plan_buffer_ptr, plan
        Device address of the uploaded plan, and the plan.
    q, out
        [tokens, num_qo_heads, head_dim]; any strides but a last one of 1.
    k, v
        Paged [pages, page_size, num_kv_heads, head_dim] (NHD) or [pages, num_kv_heads, page_size, head_dim] (HND), or, with
        plan.page_size 0, ragged without the page axis.
    kv_indices_ptr
        Device address of the int32 page ids; not read if ragged.
    lse
        float32 [tokens, num_qo_heads], contiguous; None: not wanted.
    workspace_ptr
        plan.workspace_bytes bytes, 16-byte aligned; not read if nothing is split.
    sm_scale, logits_soft_cap, v_scale
        Scale of the scores (with q's and k's scales), cap (0: off), scale of the output.
    config
        Overrides the device's configuration (benchmarks).

    Raises
    ------
    ValueError
        If a pointer or stride is no multiple of 16 bytes.
    """
    ready = prepare_attention(device, plan, plan_buffer_ptr, q.dtype, logits_soft_cap > 0.0, config)
    kv_strides = _paged_strides if plan.page_size else _ragged_strides
    values = _run_values(
        q, k, v, kv_strides(k, kv_layout), kv_strides(v, kv_layout), out, lse, sm_scale, logits_soft_cap, v_scale
    )
    indices = kv_indices_ptr if plan.page_size else 0
    partials = (indices, workspace_ptr, workspace_ptr + ready.partial_lse_offset, ready.semaphore)
    values = values[:5] + partials + values[5:] + ready.constants
    if bind:
        return ready.kernel.bind(ready.grid, values, 5, pdl)
    ready.kernel(stream, ready.grid, values, pdl)
    return None


def launch_single(
    device: int,
    stream: int,
    q: TensorView,
    k: TensorView,
    v: TensorView,
    kv_layout: str,
    out: TensorView,
    lse: TensorView | None,
    workspace_ptr: int,
    *,
    causal: bool,
    window_left: int,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    v_scale: float = 1.0,
    kv_chunk: int = 0,
    num_splits: int = 1,
    pdl: bool = False,
    config: AttentionConfig | None = None,
) -> None:
    """Attention of one request, without a plan: the kernel works out its items.

    Parameters
    ----------
    q, out
        [qo_len, num_qo_heads, head_dim].
    k, v
        [kv_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, kv_len, head_dim] (HND).
    workspace_ptr
        `single_schedule(...).workspace_bytes` bytes; the semaphores in its first 64 KiB are zero before and after.
    kv_chunk, num_splits
        Keys a split reads at most, and splits a tile has at most: num_splits * kv_chunk covers every tile's keys. 0, 1: no split.

    The others as in `launch_attention`.
    """
    qo_len, num_qo_heads, dim_qk = q.shape
    num_kv_heads, kv_len = (k.shape[0], k.shape[1]) if kv_layout == "HND" else (k.shape[1], k.shape[0])
    dim_vo = v.shape[-1]
    rows = qo_len * (num_qo_heads // num_kv_heads)
    config = config or device_config(device, q.dtype, dim_qk, dim_vo, rows)
    kernel = _kernel(device, config, q.dtype, dim_qk, dim_vo, "single", "softcap" if logits_soft_cap > 0.0 else "plain")
    tiles = -(-rows // config.tile_q)
    partial_o = workspace_ptr + SINGLE_SEMAPHORE_BYTES
    partial_lse = partial_o + partial_bytes(tiles * num_splits, num_kv_heads, config.tile_q, dim_vo)[0]
    values = _run_values(
        q,
        k,
        v,
        _ragged_strides(k, kv_layout),
        _ragged_strides(v, kv_layout),
        out,
        lse,
        sm_scale,
        logits_soft_cap,
        v_scale,
    )
    shape = _shape_values(num_qo_heads, num_kv_heads, causal, window_left, 0)
    constants = (0, partial_o, partial_lse, workspace_ptr, *values[5:], *shape, qo_len, kv_len, kv_chunk, num_splits)
    kernel(stream, tiles * num_splits * num_kv_heads, values[:5] + constants, pdl)


# ---- parameters ------------------------------------------------------------------------------------------------------------------
def _paged_strides(x: TensorView, kv_layout: str) -> tuple[int, int, int]:
    """(page, token, head) strides of a paged cache."""
    page, second, third, _ = x.strides
    return (page, third, second) if kv_layout == "HND" else (page, second, third)


def _ragged_strides(x: TensorView, kv_layout: str) -> tuple[int, int, int]:
    """The same of a ragged tensor, which is one page."""
    first, second, _ = x.strides
    return (0, second, first) if kv_layout == "HND" else (0, first, second)


def _run_values(
    q: TensorView, k: TensorView, v: TensorView, k_strides: tuple[int, int, int], v_strides: tuple[int, int, int], out: TensorView, lse: TensorView | None,
    sm_scale: float, logits_soft_cap: float, v_scale: float,
) -> tuple[int | float, ...]:  # fmt: skip
    """The changing fields: five pointers, then strides and scales (what belongs to the plan goes between them)."""
    q_token, q_head, _ = q.strides
    out_token, out_head, _ = out.strides
    strides = (q_token, q_head, out_token, out_head, *k_strides, *v_strides)
    together = 0
    for stride in strides:
        together |= stride
    if (q.ptr | k.ptr | v.ptr | out.ptr) % ALIGNMENT or together * q.dtype.itemsize % ALIGNMENT:
        _check_alignment(q=q, k=k, v=v, out=out)
    if logits_soft_cap > 0.0:
        logit_scale, cap = 2.0 * LOG2_E * sm_scale / logits_soft_cap, LOG2_E * logits_soft_cap
    else:
        logit_scale, cap = LOG2_E * sm_scale, 0.0
    return (q.ptr, k.ptr, v.ptr, out.ptr, lse.ptr if lse is not None else 0, *strides, logit_scale, cap, v_scale)


def _check_alignment(**views: TensorView) -> None:
    """Name the tensor whose rows cannot be copied 16 bytes at a time. Axes of size 1 do not count: their stride is never used."""
    for name, x in views.items():
        size = x.dtype.itemsize
        if x.ptr % ALIGNMENT and x.size:
            got = f"an address of {x.ptr % ALIGNMENT} modulo {ALIGNMENT}"
            fail("attention", name, "is not aligned", got, f"a multiple of {ALIGNMENT} bytes", f"Pass {name}.clone().")
        for extent, stride in zip(x.shape[:-1], x.strides[:-1], strict=True):
            if extent > 1 and stride * size % ALIGNMENT:
                wanted = f"strides (but the last) in multiples of {ALIGNMENT // size} elements"
                fail(
                    "attention",
                    name,
                    "has rows that are not aligned",
                    f"strides {tuple(x.strides)}",
                    wanted,
                    f"Pass {name}.contiguous().",
                )
