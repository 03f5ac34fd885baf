"""What decode and prefill share: checks of options and tensors, views of KV caches, the call of one request.

The batch wrappers' base is in _batch_attention.py.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT32, DType, canonical_dtype
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
    device_name,
    fail,
    fail_type,
)
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, host_ints, is_tensor, view

if TYPE_CHECKING:
    import numpy as np

SUPPORTED = "Supported so far: causal, window_left, sm_scale, logits_soft_cap, LSE, float q/k/v scales."
CUDA_DTYPES = (FLOAT16, BFLOAT16)
CPU_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
CUDA_HEAD_DIMS = (64, 128, 256)
CPU_MAX_HEAD_DIM = 256
MANY_ROWS = 1024  # no kernel distinguishes more packed rows; keeps the cache of configurations small


# ---- options ---------------------------------------------------------------------------------------------------------------------
def check_layout(op: str, kv_layout: object) -> str:
    """ValueError unless kv_layout is "NHD" or "HND"."""
    if kv_layout != "NHD" and kv_layout != "HND":
        fail(op, "kv_layout", "is no layout", repr(kv_layout), "'NHD' or 'HND'")
    return kv_layout  # type: ignore[return-value]


def check_options(op: str, *, pos_encoding_mode: str = "NONE", backend: str = "auto", **absent: Any) -> None:
    """ValueError for an option that is not supported yet: an argument is never accepted and then ignored. `absent` are those that must be None or False."""
    if pos_encoding_mode != "NONE":
        if pos_encoding_mode not in ("ROPE_LLAMA", "ALIBI"):
            fail(
                op,
                "pos_encoding_mode",
                "is no positional encoding",
                repr(pos_encoding_mode),
                "'NONE', 'ROPE_LLAMA' or 'ALIBI'",
            )
        fix = (
            "Rotate q and k beforehand with pyinfer.apply_rope_pos_ids."
            if pos_encoding_mode == "ROPE_LLAMA"
            else SUPPORTED
        )
        fail(op, "pos_encoding_mode", "is not supported yet", repr(pos_encoding_mode), "'NONE'", fix)
    if backend not in ("auto", "fa2"):
        fail(op, "backend", "is not available", repr(backend), "'auto' or 'fa2'")
    for arg, value in absent.items():
        if value is not None and value is not False:
            got = value if isinstance(value, bool | int | float | str) else type(value).__name__
            fail(op, arg, "is not supported yet", got, "None" if value is not True else "False", SUPPORTED)


def check_soft_cap(op: str, logits_soft_cap: float | None) -> float:
    """The soft cap, 0.0 for none."""
    cap = 0.0 if logits_soft_cap is None else float(logits_soft_cap)
    if not 0.0 <= cap < math.inf:
        fail(op, "logits_soft_cap", "is no soft cap", logits_soft_cap, "None, 0 (off) or a positive number")
    return cap


def check_window(op: str, window_left: int) -> int:
    """The window: -1 none."""
    if int(window_left) < -1:
        fail(op, "window_left", "is no window", window_left, "-1 (none) or the number of keys to the left, 0 or more")
    return int(window_left)


def scale(op: str, arg: str, value: Any) -> float:
    """A scale as a Python float. A GPU tensor is refused: reading it would synchronise."""
    if value is None:
        return 1.0
    if type(value) is float:
        return value
    if is_tensor(value):
        v = view(value, op, arg)
        if v.size != 1:
            fail(op, arg, "is not one number", f"shape {tuple(v.shape)}", "a float", SUPPORTED)
        if v.is_cuda:
            fail_type(
                op,
                arg,
                "is on the GPU",
                device_name(v.device),
                "a Python float",
                f"Pass float({arg}) once, outside the serving loop.",
            )
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


def check_head_counts(op: str, num_qo_heads: int, num_kv_heads: int, arg: str = "num_qo_heads") -> None:
    """ValueError unless the query heads are a multiple of the kv heads."""
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        fail(
            op,
            arg,
            "does not divide among the kv heads",
            f"{num_qo_heads} query heads, {num_kv_heads} kv heads",
            "a multiple of num_kv_heads",
        )


def check_kernel(
    op: str, device: int, dtype: DType, head_dim_qk: int, head_dim_vo: int, dtype_arg: str = "q_data_type"
) -> None:
    """TypeError or ValueError if a device has no kernel for the type or the head dimensions."""
    where = "CUDA" if device >= 0 else "CPU"
    allowed = CUDA_DTYPES if device >= 0 else CPU_DTYPES
    if dtype not in allowed:
        names = " or ".join(d.name for d in allowed)
        fail_type(op, dtype_arg, f"has no {where} kernel", dtype.name, names, f"Convert to {names.split(' or ')[0]}.")
    if device >= 0:
        if head_dim_qk != head_dim_vo or head_dim_qk not in CUDA_HEAD_DIMS:
            fail(
                op,
                "head_dim",
                "has no CUDA kernel",
                f"{head_dim_qk} (qk), {head_dim_vo} (vo)",
                "equal dimensions of 64, 128 or 256",
                "Pad q, k and v with zeros and pass sm_scale.",
            )
    elif not (1 <= head_dim_qk <= CPU_MAX_HEAD_DIM and 1 <= head_dim_vo <= CPU_MAX_HEAD_DIM):
        fail(op, "head_dim", "has no CPU kernel", f"{head_dim_qk} (qk), {head_dim_vo} (vo)", f"1..{CPU_MAX_HEAD_DIM}")


def deprecated(op: str, instead: str) -> None:
    """Warn once per call site about a deprecated alias."""
    warnings.warn(f"{op} is deprecated; use {instead}.", DeprecationWarning, stacklevel=3)


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


def dense_views(op: str, q: TensorView, k: Any, v: Any, kv_layout: str) -> tuple[TensorView, TensorView]:
    """Views of one request's k and v, checked against q: dtype, device, shapes, head counts, a kernel for them."""
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
        if x.dtype is not q.dtype:
            fail_type(
                op,
                arg,
                "differs in dtype from q",
                x.dtype.name,
                q.dtype.name,
                "fp8 keys are not supported yet." if x.dtype.itemsize == 1 else "Convert one of them.",
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
    if kv.shape[2] != q.shape[-1]:
        fail(op, "k", "differs from q in head_dim", f"{kv.shape[2]} (shape {tuple(kv.shape)})", f"{q.shape[-1]} (q's)")
    if tuple(vv.shape[:2]) != tuple(kv.shape[:2]):
        fail(op, "v", "differs from k in its first axes", tuple(vv.shape), f"({kv.shape[0]}, {kv.shape[1]}, any)")
    check_head_counts(op, q.shape[-2], kv.shape[0 if hnd else 1], "q")
    check_kernel(op, q.device, q.dtype, q.shape[-1], vv.shape[2], "q")
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


def plan_dtype(op: str, q_data_type: Any, kv_data_type: Any, data_type: Any = None) -> DType:
    """The one element type of q and the KV cache.

    FlashInfer's older `data_type` named the KV type while q_data_type kept its default of float16; here it names both, unless q_data_type was given.
    """
    if data_type is not None and kv_data_type is None:
        kv_data_type = data_type
        if q_data_type == "float16":
            q_data_type = data_type
    q_dtype = canonical_dtype(q_data_type, op, "q_data_type")
    kv_dtype = q_dtype if kv_data_type is None else canonical_dtype(kv_data_type, op, "kv_data_type")
    if kv_dtype.itemsize == 1:
        fail_type(op, "kv_data_type", "is not supported yet", kv_dtype.name, "the dtype of q", SUPPORTED)
    if q_dtype is not kv_dtype:
        fail_type(
            op,
            "kv_data_type",
            "differs from q_data_type",
            kv_dtype.name,
            q_dtype.name,
            "q and the KV cache have one dtype.",
        )
    return q_dtype


# ---- metadata -------------------------------------------------------------------------------------------------------------------
def copy_to_buffer(buffer: TensorView, values: Any) -> None:
    """Copy int32 values (a host array, or the view of a device tensor) to the front of a caller's buffer, on the caller's stream."""
    if buffer.device < 0:
        as_numpy(buffer)[: len(values)] = values
        return
    import cupy

    runtime = cupy.cuda.runtime
    stream = current_stream(buffer)
    with cupy.cuda.Device(buffer.device):
        if isinstance(values, TensorView):
            if values.ptr != buffer.ptr:
                runtime.memcpyAsync(buffer.ptr, values.ptr, 4 * values.size, runtime.memcpyDeviceToDevice, stream)
        elif len(values):  # pageable memory: staged by the driver before the call returns
            runtime.memcpyAsync(buffer.ptr, values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice, stream)


def host_metadata(op: str, **arrays: Any) -> list[np.ndarray]:
    """Several integer arrays on the host as int32; those on one device come over in a single copy."""
    import numpy as np

    on_device = {
        arg: v
        for arg, x in arrays.items()
        if not isinstance(x, np.ndarray | list | tuple) and (v := view(x, op, arg)).device >= 0
    }
    fetched: dict[str, np.ndarray] = {}
    if (
        len(on_device) > 1
        and all(v.ndim == 1 and v.dtype is INT32 for v in on_device.values())
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
    return [fetched[arg] if arg in fetched else host_ints(x, op, arg) for arg, x in arrays.items()]


# ---- launch ----------------------------------------------------------------------------------------------------------------------
@functools.cache
def launchers() -> tuple[Callable[..., None], Callable[..., None]]:
    from pyinfer.jit.attention_launch import launch_attention, launch_single

    return launch_attention, launch_single


@functools.cache
def tile_config(device: int, dtype: DType, head_dim_qk: int, head_dim_vo: int, max_packed_rows: int) -> Any:
    """`jit.attention.attention_config` for a CUDA device."""
    from pyinfer.core.device import arch_number_of
    from pyinfer.jit.attention import attention_config

    return attention_config(arch_number_of(device), dtype.name, head_dim_qk, head_dim_vo, max_packed_rows)


def batch_tiles(
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    total_packed_rows: int,
    num_kv_heads: int,
) -> tuple[int, int, int, int]:
    """(tile_q, tile_kv, num_sms, ctas_per_sm) for the scheduler: the device's kernel, or the CPU's."""
    if device < 0:
        from pyinfer.cpu.attention import config as cpu_config

        tile_q, tile_kv, threads = cpu_config(max_packed_rows, total_packed_rows, num_kv_heads)
        return tile_q, tile_kv, threads, 1
    from pyinfer.core.device import num_sms

    config = tile_config(device, dtype, head_dim_qk, head_dim_vo, min(max_packed_rows, MANY_ROWS))
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
) -> None:
    """Attention of one request, on checked views: q, out [rows, heads, dim], k, v as kv_layout says."""
    hnd = kv_layout == "HND"
    rows, num_qo_heads, dk = q.shape
    num_kv_heads, kv_len = (k.shape[0], k.shape[1]) if hnd else (k.shape[1], k.shape[0])
    dv = v.shape[-1]
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
        cpu.run_plan(
            plan, q, k, v, kv_layout, out, lse, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, v_scale=v_scale
        )
        return
    from pyinfer.core.device import num_sms
    from pyinfer.core.workspace import shared_workspace
    from pyinfer.schedulers.prefill import single_schedule

    config = tile_config(q.device, q.dtype, dk, dv, min(rows * group, MANY_ROWS))
    schedule = single_schedule(
        rows, kv_len, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_vo=dv, tile_q=config.tile_q, tile_kv=config.tile_kv,
        num_sms=num_sms(q.device), ctas_per_sm=config.ctas_per_sm, causal=causal, window_left=window_left,
    )  # fmt: skip
    workspace, stream = 0, current_stream(q)
    if schedule.workspace_bytes:
        workspace = shared_workspace(q.device, q.framework, "single attention", stream).reserve(
            schedule.workspace_bytes, zero=True
        )
    launchers()[1](
        q.device, stream, q, k, v, kv_layout, out, lse, workspace, causal=causal, window_left=window_left, sm_scale=sm_scale,
        logits_soft_cap=logits_soft_cap, v_scale=v_scale, kv_chunk=schedule.kv_chunk, num_splits=schedule.num_splits, pdl=use_pdl(q.device, None),
    )  # fmt: skip
