"""Launch the attention kernels: of a plan, or of a single request by arithmetic in the kernel. Callers have checked the tensors; here only alignment is."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.core.dtypes import FLOAT8_E4M3, DType
from pyinfer.core.errors import fail
from pyinfer.jit import attention_even, attention_sm90
from pyinfer.jit.attention import AttentionConfig, attention_config, gen_attention
from pyinfer.jit.attention_config import wide_decode_config
from pyinfer.jit.attention_options import NO_EXTRAS, PLAIN, AttentionExtras, AttentionOptions, check_extras
from pyinfer.jit.attention_sm90 import Sm90Config
from pyinfer.jit.rope import frequency_bytes
from pyinfer.schedulers.plan import SINGLE_SEMAPHORE_BYTES, AttentionPlan, PlanShape, partial_bytes

if TYPE_CHECKING:
    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView

LOG2_E = 1.4426950408889634
ALIGNMENT = 16  # bytes of one copy
TILE_KV = 3  # its place in PlanShape.numbers (schedulers/_kernels.py names them)
_UNSEEN = 1 << 30  # a window no key lies outside of; larger ones could overflow an index


@functools.cache
def divisor(d: int) -> tuple[int, int]:
    """(magic, shift) with n // d == (n * magic) >> shift for 0 <= n < 2^31: the kernels' `fast_divide`.

    With l = ceil(log2 d) and magic = ceil(2^(31 + l) / d) the error n * (magic * d - 2^(31 + l)) / (d * 2^(31 + l)) is below 1 / d
    (Granlund and Montgomery, 1994).
    """
    bits = (d - 1).bit_length()
    return -(-(1 << (31 + bits)) // d), 31 + bits


def shape_values(
    num_qo_heads: int, num_kv_heads: int, causal: bool, window_left: int, page_size: int
) -> tuple[int, ...]:
    """The parameters of `attention.SHAPE_FIELDS`."""
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


def plan_values(plan: AttentionPlan, plan_buffer_ptr: int) -> tuple[int, ...]:
    """The parameters of `attention.SOURCE_FIELDS["plan"]`: where the plan's sections lie on the device."""
    at = plan.offsets
    return (
        plan_buffer_ptr,
        plan_buffer_ptr + 4 * at.work,
        plan_buffer_ptr + 4 * at.qo_indptr,
        plan_buffer_ptr + 4 * at.kv_indptr,
        plan_buffer_ptr + 4 * at.kv_len,
        plan.total_kv if plan.page_size else 0,
    )


@functools.cache
def _kernel(
    device: int, config: AttentionConfig, dtype: DType, head_dim_qk: int, head_dim_vo: int, source: str, variant: str,
    kv_dtype: DType, out_dtype: DType, options: AttentionOptions, aligned: bool,
) -> Kernel:  # fmt: skip
    return gen_attention(
        config, dtype, head_dim_qk, head_dim_vo, source, variant, kv_dtype, out_dtype, options, aligned
    ).build_and_load(device)


@functools.cache
def _arch_number(device: int) -> int:
    from pyinfer.core.device import arch_number_of

    return arch_number_of(device)


@functools.cache
def device_config(
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
) -> AttentionConfig:
    """`attention_config` for the architecture that is built for a CUDA device."""
    return attention_config(
        _arch_number(device), dtype, head_dim_qk, head_dim_vo, max_packed_rows, kv_dtype, _shape_options(options)
    )


@functools.cache
def device_wide_config(
    device: int,
    head_dim_qk: int,
    head_dim_vo: int,
    kv_itemsize: int = 2,
    options: AttentionOptions = PLAIN,
) -> AttentionConfig | None:
    """`wide_decode_config` for the architecture that is built for a CUDA device."""
    return wide_decode_config(_arch_number(device), head_dim_qk, head_dim_vo, kv_itemsize, _shape_options(options))


@functools.cache
def hopper_config(
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
) -> Sm90Config | None:
    """`attention_sm90.config_for` of a CUDA device: None where the sm80 family is to plan and run."""
    return attention_sm90.config_for(
        _arch_number(device), dtype, head_dim_qk, head_dim_vo, max_packed_rows, kv_dtype, options
    )


@functools.cache
def chosen_config(
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
    page_size: int = 0,
) -> AttentionConfig | Sm90Config:
    """What to plan with: `hopper_config` where that kernel reads such pages, else `device_config`.

    Raises
    ------
    ValueError
        If the options ask for the sm90 family and it has no kernel for the case.
    """
    if dtype is FLOAT8_E4M3:
        return _fp8().chosen(device, head_dim_qk, head_dim_vo, max_packed_rows, kv_dtype, options, page_size)
    case = (device, dtype, head_dim_qk, head_dim_vo, max_packed_rows, kv_dtype, options)
    config = hopper_config(*case)
    if config is not None:
        return attention_sm90.for_pages(config, page_size)
    if options.family == "sm90":
        fail(
            "attention", "backend", "has no kernel for this case", "'fa3'", attention_sm90.CASES, "Pass backend='auto'."
        )
    return device_config(*case)


@functools.cache
def _fp8() -> Any:
    """The launch of float8_e4m3fn queries, a module that stands on this one."""
    from pyinfer.jit import attention_fp8_launch

    return attention_fp8_launch


def _shape_options(options: AttentionOptions) -> AttentionOptions:
    """What of the options a configuration depends on: not the sinks, which come with a run, nor the values of RoPE."""
    return options._replace(sinks=False, rope=None if options.rope is None else (1.0, 1.0))


class PreparedAttention(NamedTuple):
    """All of a launch that a plan fixes: kernel, grid, and the tail of the parameter struct."""

    kernel: Kernel
    grid: int
    constants: tuple[int, ...]
    partial_lse_offset: int
    semaphore: int
    tables: tuple[bytes, ...]  # by value: RoPE's frequencies, an even launch's page ranges


@functools.lru_cache(maxsize=8)
def prepare_attention(
    device: int,
    plan: AttentionPlan,
    plan_buffer_ptr: int,
    dtype: DType,
    soft_cap: bool,
    config: AttentionConfig | Sm90Config | None = None,
    kv_dtype: DType | None = None,
    out_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
    aligned: bool = True,
    merge: bool = True,
) -> PreparedAttention:
    """Fetch (or compile) a plan's kernel and fill in what stays the same from run to run.

    Parameters
    ----------
    device
        CUDA ordinal.
    plan, plan_buffer_ptr
        The plan and the device address it is uploaded to.
    dtype
        Of q.
    soft_cap
        Whether logits are soft-capped: a kernel of its own.
    config
        The configuration the plan was made for; by default the device's own for the plan's tile_q.
    kv_dtype, out_dtype
        Of k and v, and of the output; None: q's.
    options
        What else selects the kernel.
    aligned
        Whether all addresses and strides are multiples of 16 bytes.
    merge
        Whether splits are merged (`AttentionExtras.merge`).
    """
    kv, out = kv_dtype or dtype, out_dtype or dtype
    if dtype is FLOAT8_E4M3:
        return _fp8().prepare(device, plan, plan_buffer_ptr, soft_cap, config, out, options, False)
    if config is None:
        config = _config_of(device, plan.shape, dtype, kv, options)
        config = attention_sm90.with_cap(config) if soft_cap else config
        if merge and isinstance(config, AttentionConfig):
            case = (_arch_number(device), plan, plan_buffer_ptr, config, kv.itemsize, _shape_options(options))
            even = attention_even.choose(*case)
            if even is not None:
                return _prepare_even(device, plan, even, dtype, soft_cap, kv, out, options, aligned)
    kernel, most_blocks, head, tail, rope = _planned(
        device, plan.shape, dtype, soft_cap, config, kv, out, options, aligned
    )
    return PreparedAttention(
        kernel,
        int(min(plan.max_work * plan.shape.num_kv_heads, most_blocks)),
        head + plan_values(plan, plan_buffer_ptr) + tail,
        plan.partial_lse_offset,
        plan_buffer_ptr + 4 * plan.offsets.semaphore,
        rope,
    )


def _prepare_even(
    device: int, plan: AttentionPlan, even: attention_even.Even, dtype: DType, soft_cap: bool, kv_dtype: DType, out_dtype: DType, options: AttentionOptions,
    aligned: bool,
) -> PreparedAttention:  # fmt: skip
    """A plan without its work list."""
    shape, variant = plan.shape, "softcap" if soft_cap else "plain"
    dims = shape.head_dim_qk, shape.head_dim_vo
    head = shape_values(shape.num_qo_heads, shape.num_kv_heads, shape.causal, shape.window_left, shape.page_size)
    return PreparedAttention(
        _kernel(device, even.config, dtype, *dims, even.source, variant, kv_dtype, out_dtype, options, aligned),
        even.requests * shape.num_kv_heads * even.pieces,
        head + even.constants,
        0,
        0,
        _rope_table(options, dims[0]) + ((even.table,) if even.table is not None else ()),
    )


@functools.lru_cache(maxsize=256)
def _config_of(
    device: int, shape: PlanShape, dtype: DType, kv_dtype: DType, options: AttentionOptions
) -> AttentionConfig | Sm90Config:
    """The configuration that a plan of this shape was made for."""
    dim_qk, dim_vo = shape.head_dim_qk, shape.head_dim_vo
    sm90 = hopper_config(device, dtype, dim_qk, dim_vo, shape.tile_q, kv_dtype, options)
    if sm90 is not None:
        sm90 = attention_sm90.for_pages(sm90, shape.page_size)
        if sm90.tile_q == shape.tile_q:
            return sm90
    config = device_config(device, dtype, dim_qk, dim_vo, shape.tile_q, kv_dtype, options)
    config = attention_sm90.stand_in(config, dim_qk, dim_vo, shape.tile_q)
    wide = device_wide_config(device, dim_qk, dim_vo, kv_dtype.itemsize, options)
    if wide is not None and (wide.tile_q, wide.tile_kv) == (shape.tile_q, int(shape.numbers[TILE_KV])):
        return wide
    return config


@functools.lru_cache(maxsize=256)
def _planned(
    device: int, shape: PlanShape, dtype: DType, soft_cap: bool, config: AttentionConfig | Sm90Config, kv_dtype: DType, out_dtype: DType,
    options: AttentionOptions, aligned: bool,
) -> tuple[Kernel, int, tuple[int, ...], tuple[int, ...], tuple[bytes, ...]]:  # fmt: skip
    """What every plan of a shape shares: the kernel, the most blocks to launch (a persistent grid), the constants before and behind the plan's
    addresses, and RoPE's table.
    """
    dim_qk, dim_vo = shape.head_dim_qk, shape.head_dim_vo
    if config.tile_q != shape.tile_q:
        fail("attention", "plan", "was made for another tile", shape.tile_q, f"tile_q {config.tile_q} of {config.tag}")
    variant = "softcap" if soft_cap else "plain"
    tail: tuple[int, ...] = ()
    most_blocks = 1 << 31
    if isinstance(config, Sm90Config):
        most_blocks = attention_sm90.grid(config, device, most_blocks)
        kernel = attention_sm90.kernel_of(device, config, dtype, "plan", variant, options, out_dtype)
        tail = (attention_sm90.box_rows(config, shape.page_size),)
    else:
        kernel = _kernel(device, config, dtype, dim_qk, dim_vo, "plan", variant, kv_dtype, out_dtype, options, aligned)
    head = shape_values(shape.num_qo_heads, shape.num_kv_heads, shape.causal, shape.window_left, shape.page_size)
    return kernel, most_blocks, head, tail, _rope_table(options, dim_qk)


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
    config: AttentionConfig | Sm90Config | None = None,
    options: AttentionOptions = PLAIN,
    extras: AttentionExtras = NO_EXTRAS,
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
    options, extras
        What else the kernel does, and the tensors for it.

    k and v have q's dtype, or both one of float8; out is float16, bfloat16 or float32. Addresses or strides that are no multiples of 16 bytes take a
    slower kernel. q in float8_e4m3fn takes a kernel of its own (`attention_fp8_launch`).

    Raises
    ------
    ValueError
        If an option lacks its tensor, or a tensor its option.
    """
    if q.dtype is FLOAT8_E4M3:
        return _fp8().launch_plan(
            device, stream, plan_buffer_ptr, plan, q, k, v, kv_indices_ptr, kv_layout, out, lse, workspace_ptr, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, v_scale=v_scale, pdl=pdl, config=config, options=options, extras=extras, bind=bind,
        )  # fmt: skip
    kv_strides = _paged_strides if plan.page_size else _ragged_strides
    values, aligned = _run_values(
        q, k, v, kv_strides(k, kv_layout), kv_strides(v, kv_layout), out, lse, sm_scale, logits_soft_cap, v_scale
    )
    if options is not PLAIN or extras is not NO_EXTRAS:
        check_extras("attention", options, extras)
        values += _extra_values(options, extras)
    if config is None:
        rows, dims = plan.tile_q, (plan.head_dim_qk, plan.head_dim_vo)
        config = _covered(device, q, k, v, out, kv_layout, plan.page_size, dims, rows, options, aligned, rows)
        config = attention_sm90.with_cap(config) if logits_soft_cap > 0.0 else config
    case = (device, plan, plan_buffer_ptr, q.dtype, logits_soft_cap > 0.0, config, k.dtype, out.dtype, options, aligned)
    ready = prepare_attention(*case) if extras.merge else prepare_attention(*case, False)  # as plan() asked: a cache
    indices = kv_indices_ptr if plan.page_size else 0
    semaphore = ready.semaphore if extras.merge else 0
    partials = (indices, workspace_ptr, workspace_ptr + ready.partial_lse_offset, semaphore)
    if isinstance(config, Sm90Config):
        attention_sm90.check(config, q, k, v, out, kv_layout, plan.page_size, options, aligned)
        group = plan.num_qo_heads // plan.num_kv_heads
        flags = attention_sm90.boxed(q, out, group)
        maps = attention_sm90.maps_of(config, q, k, v, out, kv_layout, plan.page_size, group, flags)
        encoded = attention_sm90.encode(maps, q.ptr, k.ptr, v.ptr, out.ptr)
        tokens = int(plan.kv_indptr[-1]) * max(plan.page_size, 1)
        together = attention_sm90.heads_at_once(config, plan.num_kv_heads, tokens)
        values = (*values[:5], *partials[:3], *encoded, partials[3], *values[5:], *ready.constants, flags, together)
        if bind:
            return attention_sm90.bind(ready.kernel, ready.grid, values, maps, pdl)
        ready.kernel(stream, ready.grid, values, pdl)
        return None
    values = (*values[:5], *partials, *values[5:15], *ready.tables, *values[15:], *ready.constants)
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
    config: AttentionConfig | Sm90Config | None = None,
    options: AttentionOptions = PLAIN,
    extras: AttentionExtras = NO_EXTRAS,
    bind: bool = False,
) -> BoundLaunch | None:
    """Attention of one request, without a plan: the kernel works out its items. With `bind` it is only bound, as in `launch_attention`.

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
    if q.dtype is FLOAT8_E4M3:
        _fp8().launch_one(
            device, stream, q, k, v, kv_layout, out, lse, workspace_ptr, causal=causal, window_left=window_left, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, v_scale=v_scale, kv_chunk=kv_chunk, num_splits=num_splits, pdl=pdl, config=config, options=options,
            extras=extras,
        )  # fmt: skip
        return None
    qo_len, num_qo_heads, dim_qk = q.shape
    num_kv_heads, kv_len = (k.shape[0], k.shape[1]) if kv_layout == "HND" else (k.shape[1], k.shape[0])
    dim_vo = v.shape[-1]
    rows = qo_len * (num_qo_heads // num_kv_heads)
    values, aligned = _run_values(
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
    if options is not PLAIN or extras is not NO_EXTRAS:
        check_extras("attention", options, extras)
        values += _extra_values(options, extras)
    if config is None:
        dims = (dim_qk, dim_vo)
        config = _covered(device, q, k, v, out, kv_layout, 0, dims, rows, options, aligned) or device_config(
            device, q.dtype, dim_qk, dim_vo, rows, k.dtype, options
        )
        config = attention_sm90.with_cap(config) if logits_soft_cap > 0.0 else config
    tiles = -(-rows // config.tile_q)
    partial_o = workspace_ptr + SINGLE_SEMAPHORE_BYTES
    partial_lse = partial_o + partial_bytes(tiles * num_splits, num_kv_heads, config.tile_q, dim_vo)[0]
    variant = "softcap" if logits_soft_cap > 0.0 else "plain"
    shape = shape_values(num_qo_heads, num_kv_heads, causal, window_left, 0)
    partials = (0, partial_o, partial_lse, workspace_ptr)
    if isinstance(config, Sm90Config):
        attention_sm90.check(config, q, k, v, out, kv_layout, 0, options, aligned)
        group = num_qo_heads // num_kv_heads
        flags = attention_sm90.boxed(q, out, group)
        maps = attention_sm90.maps_of(config, q, k, v, out, kv_layout, 0, group, flags)
        encoded = attention_sm90.encode(maps, q.ptr, k.ptr, v.ptr, out.ptr)
        together = attention_sm90.heads_at_once(config, num_kv_heads, kv_len)
        request = (qo_len, kv_len, kv_chunk, num_splits, attention_sm90.box_rows(config, 0), flags, together)
        values = (*values[:5], *partials[:3], *encoded, partials[3], *values[5:], *shape, *request)
        kernel = attention_sm90.kernel_of(device, config, q.dtype, "single", variant, options, out.dtype)
        grid = attention_sm90.grid(config, device, tiles * num_splits * num_kv_heads)
        if bind:
            return attention_sm90.bind(kernel, grid, values, maps, pdl)
        kernel(stream, grid, values, pdl)
        return None
    kernel = _kernel(device, config, q.dtype, dim_qk, dim_vo, "single", variant, k.dtype, out.dtype, options, aligned)
    rope = _rope_table(options, dim_qk)
    values = (*values[:5], *partials, *values[5:15], *rope, *values[15:], *shape, qo_len, kv_len, kv_chunk, num_splits)
    grid = tiles * num_splits * num_kv_heads
    if bind:
        return kernel.bind(grid, values, 5, pdl)
    kernel(stream, grid, values, pdl)
    return None


def _covered(
    device: int, q: TensorView, k: TensorView, v: TensorView, out: TensorView, kv_layout: str, page_size: int, dims: tuple[int, int], rows: int,
    options: AttentionOptions, aligned: bool, tile_q: int = 0,
) -> AttentionConfig | Sm90Config | None:  # fmt: skip
    """The sm90 configuration if that kernel runs the call; the sm80 one if it was planned for but cannot; None if it was not. tile_q: the plan's."""
    classes = min(rows, attention_sm90.MANY_ROWS)  # all that matters of the rows: keeps the cache small
    config = hopper_config(device, q.dtype, *dims, classes, k.dtype, options)
    if config is None:
        return None
    config = attention_sm90.for_pages(config, page_size)
    tile_q = tile_q or config.tile_q
    if config.tile_q == tile_q and attention_sm90.covers(config, q, k, v, out, kv_layout, page_size, options, aligned):
        return config
    if options.family:
        fail(
            "attention",
            "backend",
            "has no kernel for these tensors",
            "'fa3'",
            attention_sm90.TENSORS,
            "Pass backend='auto'.",
        )
    return attention_sm90.stand_in(device_config(device, q.dtype, *dims, rows, k.dtype, options), *dims, tile_q)


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
) -> tuple[tuple[Any, ...], bool]:  # fmt: skip
    """The changing fields: five pointers, then strides and scales (what belongs to the plan goes between them). And whether all is aligned."""
    q_token, q_head, _ = q.strides
    out_token, out_head, _ = out.strides
    strides = (q_token, q_head, out_token, out_head, *k_strides, *v_strides)
    kv = 0
    for stride in (*k_strides, *v_strides):
        kv |= stride
    together = (
        (q_token | q_head) * q.dtype.itemsize | (out_token | out_head) * out.dtype.itemsize | kv * k.dtype.itemsize
    )
    aligned = (q.ptr | k.ptr | v.ptr | out.ptr | together) % ALIGNMENT == 0 or all(map(_is_aligned, (q, k, v, out)))
    if logits_soft_cap > 0.0:
        logit_scale, cap = 2.0 * LOG2_E * sm_scale / logits_soft_cap, LOG2_E * logits_soft_cap
    else:
        logit_scale, cap = LOG2_E * sm_scale, 0.0
    pointers = (q.ptr, k.ptr, v.ptr, out.ptr, lse.ptr if lse is not None else 0)
    return (*pointers, *strides, logit_scale, cap, v_scale), aligned


def _check_alignment(**views: TensorView) -> None:
    """ValueError naming the tensor whose rows cannot be copied 16 bytes at a time, for kernels that have no slower path."""
    for name, x in views.items():
        if not _is_aligned(x):
            if x.ptr % ALIGNMENT:
                got = f"an address of {x.ptr % ALIGNMENT} modulo {ALIGNMENT}"
                fail(
                    "attention",
                    name,
                    "is not aligned",
                    got,
                    f"a multiple of {ALIGNMENT} bytes",
                    f"Pass {name}.clone().",
                )
            wanted = f"strides (but the last) in multiples of {ALIGNMENT // x.dtype.itemsize} elements"
            got = f"strides {tuple(x.strides)}"
            fail("attention", name, "has rows that are not aligned", got, wanted, f"Pass {name}.contiguous().")


def _is_aligned(x: TensorView) -> bool:
    """Whether rows can be copied 16 bytes at a time. Axes of size 1 do not count: their stride is never used."""
    size = x.dtype.itemsize
    rows = zip(x.shape[:-1], x.strides[:-1], strict=True)
    return not x.size or (
        x.ptr % ALIGNMENT == 0 and all(n == 1 or stride * size % ALIGNMENT == 0 for n, stride in rows)
    )


def _extra_values(options: AttentionOptions, extras: AttentionExtras) -> tuple[int | float, ...]:
    """The values of `attention.option_fields`."""
    found: tuple[int | float, ...] = ()
    if options.mask:
        found += (extras.mask_ptr, extras.mask_indptr_ptr)
    if options.multi_item:
        found += (extras.prefix_len_ptr, extras.token_pos_ptr, extras.token_pos_len)
    if options.sinks:
        found += (extras.sinks_ptr,)
    return found + extras.user


def _rope_table(options: AttentionOptions, head_dim_qk: int) -> tuple[bytes, ...]:
    return () if options.rope is None else (frequency_bytes(head_dim_qk, *options.rope),)
