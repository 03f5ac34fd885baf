"""What decode and prefill share: checks of options and tensors, views of KV caches, the call of one request.

The batch wrappers' base is in _batch_attention.py.
"""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pyinfer._single_calls import SingleCall, comes_again, keep
from pyinfer._support import (
    KV_DTYPES_FP8,
    check_backend,
    check_head_counts,
    check_kernel,
    check_pos_encoding,
)
from pyinfer._support import check_soft_cap as check_soft_cap
from pyinfer._support import check_window as check_window
from pyinfer.core.dtypes import INT32, INT64, DType
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
    device_name,
    fail,
    fail_type,
)
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, host_ints, is_tensor, plain_int32, view
from pyinfer.jit.attention_options import NO_EXTRAS, PLAIN, AttentionExtras, AttentionOptions

if TYPE_CHECKING:
    import numpy as np

    from pyinfer._fp8_queries import HeadScales
    from pyinfer.variants import AttentionVariant

_log = logging.getLogger("pyinfer")
_INSTEAD = {
    "seq_lens": "It belongs to the trtllm-gen backend: pass the page table.",
    "block_tables": "It belongs to the trtllm-gen backend: pass the page table.",
    "jit_args": "Only decode and the batch prefills take variants.",
}
DECODE_ROWS = 16  # packed rows of a decode tile
MANY_ROWS = 1024  # no kernel distinguishes more packed rows; keeps the cache of configurations small


# ---- options ---------------------------------------------------------------------------------------------------------------------
def check_layout(op: str, kv_layout: object) -> str:
    """ValueError unless kv_layout is "NHD" or "HND"."""
    if kv_layout != "NHD" and kv_layout != "HND":
        fail(op, "kv_layout", "is no layout", repr(kv_layout), "'NHD' or 'HND'")
    return kv_layout  # type: ignore[return-value]


def check_options(op: str, *, pos_encoding_mode: str = "NONE", backend: str = "auto", **absent: Any) -> None:
    """ValueError for an option that does not exist, or that belongs to another backend: an argument is never accepted and then ignored.

    `absent` are those that must be None or False.
    """
    check_pos_encoding(op, pos_encoding_mode)
    check_backend(op, backend)
    for arg, value in absent.items():
        if value is not None and value is not False:
            got = value if isinstance(value, bool | int | float | str) else type(value).__name__
            fail(op, arg, "is not supported", got, "None" if value is not True else "False", _INSTEAD.get(arg, ""))


def scale(op: str, arg: str, value: Any) -> float:
    """A scale as a Python float. One in a GPU tensor costs a copy that waits for the GPU (logged at DEBUG): the kernels take numbers."""
    if value is None:
        return 1.0
    if type(value) is float:
        return value
    if is_tensor(value):
        v = view(value, op, arg)
        if v.size != 1:
            fail(op, arg, "is not one number", f"shape {tuple(v.shape)}", "a float or a tensor of one element")
        if v.is_cuda:
            _log.debug("%s: reading %s from the device; this synchronises. Pass a float to avoid it.", op, arg)
            return float(v.obj.reshape(()))  # CuPy converts arrays without axes alone
        return float(as_numpy(v).reshape(()))
    try:
        return float(value)
    except (TypeError, ValueError):
        fail_type(op, arg, "is no number", type(value).__name__, "a float")


def softmax_scale(op: str, sm_scale: float | None, head_dim_qk: int) -> float:
    """sm_scale, or 1 / sqrt(head_dim_qk)."""
    if head_dim_qk < 1:
        fail(op, "head_dim", "is no head dimension", head_dim_qk, "1 or more")
    return 1.0 / math.sqrt(head_dim_qk) if sm_scale is None else scale(op, "sm_scale", sm_scale)


def check_page_size(op: str, page_size: int) -> None:
    """ValueError unless a page holds a token."""
    if page_size < 1:
        fail(op, "page_size", "is no page size", page_size, "1 or more")


def check_split_size(op: str, fixed_split_size: int | None) -> None:
    """ValueError for a split of no page."""
    if fixed_split_size is not None and fixed_split_size < 1:
        fail(op, "fixed_split_size", "is no number of pages", fixed_split_size, "1 or more")


def deprecated(op: str, instead: str) -> None:
    """Warn once per call site about a deprecated alias."""
    warnings.warn(f"{op} is deprecated; use {instead}.", DeprecationWarning, stacklevel=3)


def remembered(make: Callable[..., Any]) -> Callable[..., Any]:
    """Cache what plan() makes of its options: `make(op, dtypes, *options)`, a pure function that raises for bad ones.

    Only options that compare by value are looked up; one in a tensor, whose value may change in place, is read anew each time.
    """
    known = functools.lru_cache(maxsize=128, typed=True)(make)

    @functools.wraps(make)
    def call(op: str, dtypes: tuple[Any, ...], *options: Any) -> Any:
        if not _is_plain(map(type, options)):
            return make(op, dtypes, *options)
        try:
            return known(op, dtypes, *options)
        except TypeError:  # also what an unhashable dtype raises: then `make` has the better words
            return make(op, dtypes, *options)

    return call


_is_plain = frozenset({float, int, bool, str, type(None)}).issuperset


# ---- views -----------------------------------------------------------------------------------------------------------------------
def q_view(op: str, q: Any, ndim: int = 3) -> TensorView:
    """View of q, its rank and last stride checked."""
    v = view(q, op, "q")
    check_ndim(op, "q", v, ndim)
    check_last_dim_contiguous(op, "q", v)
    return v


def _without_axis(v: TensorView, axis: int, index: int) -> TensorView:
    """The view of v[..., index, ...]: shares the memory, no framework call."""
    shape, strides = tuple(v.shape), tuple(v.strides)
    ptr = v.ptr + index * strides[axis] * v.dtype.itemsize
    return TensorView(
        v.obj,
        ptr,
        shape[:axis] + shape[axis + 1 :],
        strides[:axis] + strides[axis + 1 :],
        v.dtype,
        v.device,
        v.framework,
    )


def _with_page_axis(v: TensorView, axis: int) -> TensorView:
    """The view with an axis of size 1 (a page of one token) put in."""
    shape, strides = tuple(v.shape), tuple(v.strides)
    return TensorView(
        v.obj,
        v.ptr,
        (*shape[:axis], 1, *shape[axis:]),
        (*strides[:axis], 0, *strides[axis:]),
        v.dtype,
        v.device,
        v.framework,
    )


def paged_views(op: str, cache: Any, kv_layout: str, page_size: int) -> tuple[TensorView, TensorView]:
    """The K and V caches as 4-D views, from a tuple of two caches or one combined tensor with axis 1 of size 2.

    With page_size 1 the page axis may be left out.
    """
    page_axis = 1 if kv_layout == "NHD" else 2
    if type(cache) is tuple:
        if len(cache) != 2:
            fail(op, "paged_kv_cache", "is no pair", f"a tuple of {len(cache)}", "(k_cache, v_cache)")
        k, v = view(cache[0], op, "paged_kv_cache[0]"), view(cache[1], op, "paged_kv_cache[1]")
        if len(k.shape) != 4 or len(v.shape) != 4:
            if page_size == 1 and len(k.shape) == 3 and len(v.shape) == 3:
                return _with_page_axis(k, page_axis), _with_page_axis(v, page_axis)
            check_ndim(op, "paged_kv_cache[0]", k, 4)
            check_ndim(op, "paged_kv_cache[1]", v, 4)
        return k, v
    if isinstance(cache, list):
        fail_type(
            op,
            "paged_kv_cache",
            "is a list",
            "list",
            "a tuple (k_cache, v_cache) or one tensor",
            "Pass tuple(paged_kv_cache).",
        )
    both = view(cache, op, "paged_kv_cache")
    n = len(both.shape)
    if n != 5 and not (n == 4 and page_size == 1):
        check_ndim(op, "paged_kv_cache", both, 5)
    if both.shape[1] != 2:
        layout = "[pages, 2, page_size, heads, dim]" if kv_layout == "NHD" else "[pages, 2, heads, page_size, dim]"
        fail(op, "paged_kv_cache", "does not hold K and V in axis 1", f"shape {tuple(both.shape)}", layout)
    k, v = _without_axis(both, 1, 0), _without_axis(both, 1, 1)
    if n == 4:
        return _with_page_axis(k, page_axis), _with_page_axis(v, page_axis)
    return k, v


def dense_views(
    op: str, q: TensorView, k: Any, v: Any, kv_layout: str, rope: bool = False, fp8_queries: bool = False
) -> tuple[TensorView, TensorView]:
    """Views of one request's k and v, checked against q: dtype, device, shapes, head counts, a kernel for them. fp8_queries: as in `check_kernel`."""
    hnd = kv_layout == "HND"
    layout = "[num_kv_heads, kv_len, head_dim]" if hnd else "[kv_len, num_kv_heads, head_dim]"
    kv, vv = view(k, op, "k"), view(v, op, "v")
    for arg, x in (("k", kv), ("v", vv)):
        if len(x.shape) != 3:
            fail(
                op,
                arg,
                "has the wrong number of axes",
                f"{len(x.shape)} (shape {tuple(x.shape)})",
                f"3: {layout} ({kv_layout})",
            )
        if x.dtype is not q.dtype and x.dtype not in KV_DTYPES_FP8:
            fail_type(
                op, arg, "differs in dtype from q", x.dtype.name, f"{q.dtype.name} or fp8", "Convert one of them."
            )
        if x.device != q.device:
            fail(
                op,
                arg,
                "is on another device",
                device_name(x.device),
                f"{device_name(q.device)} (where q is)",
                f"Move it, e.g. {arg}.to({device_name(q.device)!r}).",
            )
        check_last_dim_contiguous(op, arg, x)
    if kv.dtype is not vv.dtype:
        fail_type(op, "v", "differs in dtype from k", vv.dtype.name, kv.dtype.name, "Convert one of them.")
    if q.dtype in KV_DTYPES_FP8 and kv.dtype is not q.dtype:
        fail_type(op, "k", "differs in dtype from q", kv.dtype.name, q.dtype.name, "Convert one of them.")
    if kv.shape[2] != q.shape[-1]:
        fail(op, "k", "differs from q in head_dim", f"{kv.shape[2]} (shape {tuple(kv.shape)})", f"{q.shape[-1]} (q's)")
    if tuple(vv.shape[:2]) != tuple(kv.shape[:2]):
        fail(op, "v", "differs from k in its first axes", tuple(vv.shape), f"({kv.shape[0]}, {kv.shape[1]}, any)")
    check_head_counts(op, q.shape[-2], kv.shape[0 if hnd else 1], "q")
    check_kernel(op, q.device, q.dtype, q.shape[-1], vv.shape[2], "q", rope, fp8_queries)
    return kv, vv


def check_out(op: str, arg: str, out: Any, q: TensorView, shape: tuple[int, ...], dtype: DType) -> TensorView:
    """View of a caller's output tensor: shape, dtype, device and last stride as wanted, or an error."""
    v = view(out, op, arg)
    if v.dtype is not dtype:
        check_dtype(op, arg, v, (dtype,))
    check_shape(op, arg, v, shape)
    if v.device != q.device:
        fail(op, arg, "is on another device", device_name(v.device), f"{device_name(q.device)} (where q is)")
    check_last_dim_contiguous(op, arg, v)
    return v


# ---- metadata -------------------------------------------------------------------------------------------------------------------
def copy_to_buffer(buffer: TensorView, values: Any) -> None:
    """Copy values of the buffer's type (a host array, or the view of a device tensor) to the front of a caller's buffer, on the caller's stream."""
    if buffer.device < 0:
        as_numpy(buffer)[: len(values)] = values
        return
    import cupy

    runtime = cupy.cuda.runtime
    stream = current_stream(buffer)
    with cupy.cuda.Device(buffer.device):
        if isinstance(values, TensorView):
            if values.ptr != buffer.ptr:
                nbytes = values.dtype.itemsize * values.size
                runtime.memcpyAsync(buffer.ptr, values.ptr, nbytes, runtime.memcpyDeviceToDevice, stream)
        elif len(values):  # pageable memory: staged by the driver before the call returns
            runtime.memcpyAsync(buffer.ptr, values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice, stream)


def host_metadata(op: str, *, strict: bool = False, **arrays: Any) -> list[np.ndarray]:
    """Several integer arrays on the host as int32; those on one device come over in a single copy, which `strict` forbids (ValueError)."""
    found = []
    for x in arrays.values():
        plain = plain_int32(x)
        if plain is None:
            break
        found.append(plain)
    else:
        return found
    import numpy as np

    on_device = {
        arg: v
        for arg, x in arrays.items()
        if not isinstance(x, np.ndarray | list | tuple) and (v := view(x, op, arg)).device >= 0
    }
    fetched: dict[str, np.ndarray] = {}
    if (
        len(on_device) > 1
        and not strict
        and all(v.ndim == 1 and v.dtype in (INT32, INT64) for v in on_device.values())
        and len({v.framework for v in on_device.values()}) == 1
    ):
        first = next(iter(on_device.values()))
        if first.framework in ("torch", "cupy"):
            if first.framework == "torch":
                import torch

                joined: Any = torch.cat([v.obj for v in on_device.values()])
            else:
                import cupy

                joined = cupy.concatenate([v.obj for v in on_device.values()])
            flat = host_ints(joined, op, ", ".join(on_device))
            ends = np.cumsum([v.shape[0] for v in on_device.values()])
            fetched = dict(zip(on_device, np.split(flat, ends[:-1]), strict=True))
    return [fetched[arg] if arg in fetched else host_ints(x, op, arg, strict=strict) for arg, x in arrays.items()]


# ---- launch ----------------------------------------------------------------------------------------------------------------------
@functools.cache
def launchers() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from pyinfer.jit.attention_launch import launch_attention, launch_single

    return launch_attention, launch_single


def tile_config(
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
    page_size: int = 0,
) -> Any:
    """The configuration of the kernel that a CUDA device runs."""
    from pyinfer.jit.attention_launch import chosen_config

    return chosen_config(device, dtype, head_dim_qk, head_dim_vo, max_packed_rows, kv_dtype, options, page_size)


def batch_tiles(
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    total_packed_rows: int,
    num_kv_heads: int,
    kv_dtype: DType | None = None,
    options: AttentionOptions = PLAIN,
    page_size: int = 0,
) -> tuple[int, int, int, int]:
    """(tile_q, tile_kv, num_sms, ctas_per_sm) for the scheduler: the device's kernel, or the CPU's."""
    if device < 0:
        from pyinfer.cpu.attention import config as cpu_config

        tile_q, tile_kv, threads = cpu_config(max_packed_rows, total_packed_rows, num_kv_heads)
        return tile_q, tile_kv, threads, 1
    from pyinfer.core.device import num_sms

    rows = min(max_packed_rows, MANY_ROWS)
    config = tile_config(device, dtype, head_dim_qk, head_dim_vo, rows, kv_dtype, options, page_size)
    items = total_packed_rows // max(max_packed_rows, 1) * num_kv_heads
    # Between half a block and one for each multiprocessor, nothing need be split (H200, 16 requests of 1024, 8 kv heads: 24.9 us become 23.2). With fewer
    # items the wide blocks gain nothing, and their longer merge costs.
    if rows <= config.tile_q == DECODE_ROWS and num_sms(device) // 2 < items <= num_sms(device):
        from pyinfer.jit.attention_launch import device_wide_config

        itemsize = (kv_dtype or dtype).itemsize
        config = device_wide_config(device, head_dim_qk, head_dim_vo, itemsize, options) or config
    return config.tile_q, config.tile_kv, num_sms(device), config.ctas_per_sm


def use_pdl(device: int, enable_pdl: bool | None) -> bool:
    """enable_pdl, None meaning wherever it works."""
    if enable_pdl is not None and not enable_pdl:
        return False
    from pyinfer.core.device import pdl_supported

    return pdl_supported(device)


def run_single(
    op: str,
    q: TensorView,
    k: TensorView,
    v: TensorView,
    kv_layout: str,
    out: TensorView,
    lse: TensorView | None,
    *,
    causal: bool,
    window_left: int,
    sm_scale: float,
    logits_soft_cap: float,
    v_scale: float,
    options: AttentionOptions = PLAIN,
    mask: Any = None,
    variant: AttentionVariant | None = None,
    variant_args: Sequence[Any] | None = None,
    heads: HeadScales | None = None,
    call: SingleCall | None = None,
) -> None:
    """Attention of one request, on checked views: q, out [rows, heads, dim], k, v as kv_layout says.

    `mask` is an `_attention_options.Mask`; `causal` is then False. `variant_args` are the values of the variant's parameters, `heads` the scales of
    float8_e4m3fn queries (None: another dtype), `call` what a call like this one is recognised by (None: it must not be repeated as it is).
    """
    hnd = kv_layout == "HND"
    rows, num_qo_heads, dk = q.shape
    num_kv_heads, kv_len = (k.shape[0], k.shape[1]) if hnd else (k.shape[1], k.shape[0])
    dv = v.shape[-1]
    values: list[Any] = []
    if variant is not None:
        from pyinfer.variants import check_variant

        variant = check_variant(op, variant)
        values = variant.check_args(op, variant_args or (), q.device, num_qo_heads, num_kv_heads, 1)
        variant.check_run(op, lse is not None, options.sinks)
        options = options._replace(user=variant.user)
    elif variant_args:
        got, wanted = f"{len(variant_args)} values", "none (they belong to a variant)"
        fail_type(op, "variant_args", "are not supported", got, wanted)
    if rows == 0:
        return
    group = num_qo_heads // num_kv_heads
    if q.device < 0:
        import numpy as np

        from pyinfer.cpu import attention as cpu
        from pyinfer.schedulers.prefill import prefill_plan

        tile_q, tile_kv, threads = cpu.config(rows * group, rows * group, num_kv_heads)
        plan = prefill_plan(
            np.array([0, rows], np.int32), np.array([0, kv_len], np.int32),
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=dk, head_dim_vo=dv, page_size=0, tile_q=tile_q, tile_kv=tile_kv,
            num_sms=threads, causal=causal, window_left=window_left, op=op,
        )  # fmt: skip
        bits, offsets = (None, None) if mask is None else (mask.host, mask.byte_indptr)
        user, kept = (None, None) if variant is None else variant.cpu_values(op, values)
        written = out
        if heads is not None:
            from pyinfer._fp8_queries import cpu_finish, cpu_output, cpu_queries

            q, written = cpu_queries(q, heads, num_kv_heads), cpu_output(out, heads)
        cpu.run_plan(
            plan, q, k, v, kv_layout, written, lse, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale,
            extras=cpu.CpuExtras(options.alibi, options.rope, bits, offsets, user=user),
        )  # fmt: skip
        del kept  # what `user` points at has lived until here
        if heads is not None:
            cpu_finish(written, out, heads, rows)
        return
    from pyinfer.core.device import num_sms
    from pyinfer.core.workspace import shared_workspace
    from pyinfer.schedulers.plan import SINGLE_SEMAPHORE_BYTES
    from pyinfer.schedulers.prefill import single_schedule

    config = tile_config(q.device, q.dtype, dk, dv, min(rows * group, MANY_ROWS), k.dtype, options)
    extras = NO_EXTRAS if mask is None else AttentionExtras(mask_ptr=mask.view.ptr or q.ptr)
    if values:
        assert variant is not None
        extras = extras._replace(user=variant.cuda_values(values))
    if heads is not None:
        extras = heads.addresses(extras)
    schedule = single_schedule(
        rows, kv_len, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_vo=dv, tile_q=config.tile_q, tile_kv=config.tile_kv,
        num_sms=num_sms(q.device), ctas_per_sm=config.ctas_per_sm, causal=causal, window_left=window_left,
    )  # fmt: skip
    workspace, stream = 0, current_stream(q)
    workspace_bytes = schedule.workspace_bytes or (SINGLE_SEMAPHORE_BYTES if config.kind == "prefill_sm90" else 0)
    if workspace_bytes:
        workspace = shared_workspace(q.device, q.framework, "single attention", stream).reserve(
            workspace_bytes, zero=True
        )
    kept = call is not None and mask is None and variant is None and heads is None and comes_again(call, q, k, v, out)
    bound = launchers()[1](
        q.device, stream, q, k, v, kv_layout, out, lse, workspace, causal=causal, window_left=window_left, sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap, v_scale=v_scale, kv_chunk=schedule.kv_chunk, num_splits=schedule.num_splits, pdl=use_pdl(q.device, None),
        options=options, extras=extras, bind=kept,
    )  # fmt: skip
    if kept:
        assert call is not None
        bound(stream, q.ptr, k.ptr, v.ptr, out.ptr, 0 if lse is None else lse.ptr)
        outputs = [(tuple(x.obj.shape), x.dtype) for x in (out, lse) if x is not None]
        keep(call, q, bound, tuple(outputs))
