"""Launch the prefill kernel for float8_e4m3fn queries: the arguments of `attention_launch`, which hands such calls on."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.dtypes import DType
from pyinfer.core.errors import fail
from pyinfer.jit import attention_fp8 as fp8
from pyinfer.jit import attention_sm90
from pyinfer.jit.attention_fp8 import Fp8Config
from pyinfer.jit.attention_launch import (
    PreparedAttention,
    _arch_number,
    _extra_values,
    _paged_strides,
    _ragged_strides,
    _run_values,
    plan_values,
    shape_values,
)
from pyinfer.jit.attention_options import AttentionExtras, AttentionOptions, check_extras
from pyinfer.schedulers.plan import SINGLE_SEMAPHORE_BYTES, AttentionPlan, PlanShape, partial_bytes

if TYPE_CHECKING:
    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView


@functools.lru_cache(maxsize=256)
def chosen(
    device: int,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | None,
    options: AttentionOptions,
    page_size: int,
    narrow: bool = False,
) -> Fp8Config:
    """What to plan with, arguments as `attention_launch.chosen_config`; ValueError where there is no kernel. narrow: to run with what takes registers."""
    fp8.check_device("attention", _arch_number(device))
    fp8.check_pages("attention", page_size)
    config = fp8.config_for(head_dim_qk, head_dim_vo, max_packed_rows, kv_dtype, options)
    return fp8.narrowed(config) if narrow or options.sinks else config


@functools.lru_cache(maxsize=256)
def _planned(
    device: int, shape: PlanShape, soft_cap: bool, config: Fp8Config | None, out_dtype: DType, options: AttentionOptions, head_scales: bool
) -> tuple[Kernel, int, tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """What every plan of a shape shares: the kernel, the most blocks to launch, and the constants before and behind the plan's addresses."""
    if config is None:
        dims = shape.head_dim_qk, shape.head_dim_vo
        config = chosen(device, *dims, shape.tile_q, None, options, shape.page_size, soft_cap or head_scales)
    if config.tile_q != shape.tile_q:
        fail("attention", "plan", "was made for another tile", shape.tile_q, f"tile_q {config.tile_q} of {config.tag}")
    variant = "softcap" if soft_cap else "plain"
    return (
        fp8.kernel_of(device, config, out_dtype, "plan", variant, options, head_scales),
        fp8.grid(device, 1 << 30),
        shape_values(shape.num_qo_heads, shape.num_kv_heads, shape.causal, shape.window_left, shape.page_size),
        (fp8.box_rows(config, shape.page_size),),
    )


def prepare(
    device: int, plan: AttentionPlan, plan_buffer_ptr: int, soft_cap: bool, config: Fp8Config | None, out_dtype: DType, options: AttentionOptions,
    head_scales: bool,
) -> PreparedAttention:  # fmt: skip
    """As `attention_launch.prepare_attention`; head_scales: whether every head has scales of its own."""
    kernel, most_blocks, head, tail = _planned(
        device, plan.shape, soft_cap, config, out_dtype, _kernel_options(options), head_scales
    )
    return PreparedAttention(
        kernel,
        int(min(plan.max_work * plan.num_kv_heads, most_blocks)),
        head + plan_values(plan, plan_buffer_ptr) + tail,
        plan.partial_lse_offset,
        plan_buffer_ptr + 4 * plan.offsets.semaphore,
        (),
    )


def _kernel_options(options: AttentionOptions) -> AttentionOptions:
    """What of the options selects a kernel."""
    return options._replace(family="") if options.family == "sm90" else options


def _head_scales(extras: AttentionExtras) -> tuple[int, ...]:
    """The addresses behind the other parameters: none where no head has a scale of its own."""
    found = (extras.q_scales_ptr, extras.k_scales_ptr, extras.v_scales_ptr)
    return found if any(found) else ()


def _values(
    config: Fp8Config, q: TensorView, k: TensorView, v: TensorView, out: TensorView, kv_layout: str, page_size: int, run: tuple[Any, ...],
    partials: tuple[int, int, int, int], aligned: bool,
) -> tuple[tuple[Any, ...], tuple[attention_sm90.Map, ...], int]:  # fmt: skip
    """The parameters in front of the shape's, the tensor maps, and which of queries and output come and go as boxes."""
    fp8.check_tensors("attention", k, v, kv_layout, aligned)
    group = q.shape[1] // k.shape[-2 if kv_layout == "NHD" else -3]
    flags = fp8.boxed(q, out, group)
    maps = fp8.maps_of(config, q, k, v, out, kv_layout, page_size, group, flags)
    of_k, of_v = fp8.sources(q, k, v)
    encoded = attention_sm90.encode(maps, q.ptr, of_k.ptr, of_v.ptr, out.ptr)
    return (*run[:5], *partials[:3], *encoded, partials[3], *run[5:]), maps, flags


def launch_plan(
    device: int, stream: int, plan_buffer_ptr: int, plan: AttentionPlan, q: TensorView, k: TensorView, v: TensorView, kv_indices_ptr: int, kv_layout: str,
    out: TensorView, lse: TensorView | None, workspace_ptr: int, *, sm_scale: float, logits_soft_cap: float, v_scale: float, pdl: bool,
    config: Fp8Config | None, options: AttentionOptions, extras: AttentionExtras, bind: bool,
) -> BoundLaunch | None:  # fmt: skip
    """As `attention_launch.launch_attention`."""
    check_extras("attention", options, extras)
    if not extras.merge:
        fail("attention", "q", "in float8_e4m3fn leaves no splits", "unmerged splits", "merged ones", fp8.INSTEAD)
    strides = _paged_strides if plan.page_size else _ragged_strides
    run, aligned = _run_values(
        q, k, v, strides(k, kv_layout), strides(v, kv_layout), out, lse, sm_scale, logits_soft_cap, v_scale
    )
    run += _extra_values(options, extras)
    scales = _head_scales(extras)
    soft_cap = logits_soft_cap > 0.0
    options = _kernel_options(options)
    if config is None:
        dims = plan.head_dim_qk, plan.head_dim_vo
        config = chosen(device, *dims, plan.tile_q, k.dtype, options, plan.page_size, soft_cap or bool(scales))
    ready = prepare(device, plan, plan_buffer_ptr, soft_cap, config, out.dtype, options, bool(scales))
    partials = (
        kv_indices_ptr if plan.page_size else 0,
        workspace_ptr,
        workspace_ptr + ready.partial_lse_offset,
        ready.semaphore,
    )
    values, maps, flags = _values(config, q, k, v, out, kv_layout, plan.page_size, run, partials, aligned)
    tokens = int(plan.kv_indptr[-1]) * max(plan.page_size, 1)
    together = fp8.heads_at_once(config, plan.num_kv_heads, tokens)
    values = (*values, *ready.constants, flags, together, *scales)
    if bind:
        bound = attention_sm90.bind(ready.kernel, ready.grid, values, maps, pdl)
        if 0 in k.shape:
            _read_queries(bound)
        return bound
    ready.kernel(stream, ready.grid, values, pdl)
    return None


def _read_queries(bound: BoundLaunch) -> None:
    """Let a bound launch without keys, whose maps are of the queries, take q's address for k's and v's."""
    pack = bound._pack_pointers
    bound.pack_with(lambda buffer, at, q, k, v, out, lse: pack(buffer, at, q, q, q, out, lse))


def launch_one(
    device: int, stream: int, q: TensorView, k: TensorView, v: TensorView, kv_layout: str, out: TensorView, lse: TensorView | None, workspace_ptr: int, *,
    causal: bool, window_left: int, sm_scale: float, logits_soft_cap: float, v_scale: float, kv_chunk: int, num_splits: int, pdl: bool,
    config: Fp8Config | None, options: AttentionOptions, extras: AttentionExtras,
) -> None:  # fmt: skip
    """As `attention_launch.launch_single`."""
    check_extras("attention", options, extras)
    qo_len, num_qo_heads, dim_qk = q.shape
    num_kv_heads, kv_len = (k.shape[0], k.shape[1]) if kv_layout == "HND" else (k.shape[1], k.shape[0])
    dim_vo = v.shape[-1]
    rows = qo_len * (num_qo_heads // num_kv_heads)
    run, aligned = _run_values(
        q, k, v, _ragged_strides(k, kv_layout), _ragged_strides(v, kv_layout), out, lse, sm_scale, logits_soft_cap, v_scale
    )  # fmt: skip
    run += _extra_values(options, extras)
    options = _kernel_options(options)
    scales = _head_scales(extras)
    soft_cap = logits_soft_cap > 0.0
    if config is None:
        classes = min(rows, attention_sm90.MANY_ROWS)
        config = chosen(device, dim_qk, dim_vo, classes, k.dtype, options, 0, soft_cap or bool(scales))
    tiles = -(-rows // config.tile_q)
    partial_o = workspace_ptr + SINGLE_SEMAPHORE_BYTES
    partial_lse = partial_o + partial_bytes(tiles * num_splits, num_kv_heads, config.tile_q, dim_vo)[0]
    partials = (0, partial_o, partial_lse, workspace_ptr)
    values, _, flags = _values(config, q, k, v, out, kv_layout, 0, run, partials, aligned)
    shape = shape_values(num_qo_heads, num_kv_heads, causal, window_left, 0)
    together = fp8.heads_at_once(config, num_kv_heads, kv_len)
    request = (qo_len, kv_len, kv_chunk, num_splits, fp8.box_rows(config, 0), flags, together)
    variant = "softcap" if soft_cap else "plain"
    kernel = fp8.kernel_of(device, config, out.dtype, "single", variant, options, bool(scales))
    items = tiles * num_splits * num_kv_heads
    kernel(stream, fp8.grid(device, items), (*values, *shape, *request, *scales), pdl)
