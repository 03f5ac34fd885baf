"""Scheduling a batch again from what its buffers hold, where they are: `BatchDecodeWithPagedKVCacheWrapper.replan`."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.dtypes import INT32
from pyinfer.core.errors import check_dtype, check_shape, device_name, fail
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, view

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.core.launch import Kernel
    from pyinfer.decode import BatchDecodeWithPagedKVCacheWrapper
    from pyinfer.jit.attention_options import AttentionOptions
    from pyinfer.jit.spec import JitSpec
    from pyinfer.schedulers.plan import AttentionPlan, PlanShape


def replan(wrapper: BatchDecodeWithPagedKVCacheWrapper, kv_len: Any) -> None:
    """See the wrapper's method."""
    op = f"{wrapper._op}.replan"
    if not wrapper._use_cuda_graph:
        fix = "A wrapper without buffers of its own has nothing to read: call plan()."
        fail(op, "use_cuda_graph", "is off", False, True, fix)
    plan = wrapper._plan
    if plan is None:
        fail(op, "plan()", "was not called", "replan() first", "one plan(), which fixes shapes and options")
    names = ("paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
    indptr, indices, last = (wrapper._buffers[name] for name in names)
    lengths = None if kv_len is None else _lengths(op, kv_len, last.shape[0], wrapper._planned_device)
    if wrapper._planned_device < 0:
        tables = (as_numpy(indptr).copy(), as_numpy(indices).copy(), as_numpy(last).copy())  # the buffers may change
        wrapper._adopt(_on_host(op, plan, *tables, None if lengths is None else as_numpy(lengths).copy()), -1)
        return
    from pyinfer.jit.replan import replan_spec, replan_values

    at = 0 if lengths is None else lengths.ptr
    device = wrapper._planned_device
    listed = _listed(device, plan.shape, wrapper._kv_dtype.itemsize, wrapper._options)
    values = replan_values(plan, wrapper._plan_ptr, indptr.ptr, last.ptr, at, indices.shape[0], listed)
    assert wrapper._ref is not None
    kernel = _kernel(device, replan_spec(op, plan))
    kernel(current_stream(wrapper._ref), 1, values, wrapper._pdl_default)


@functools.cache
def _kernel(device: int, spec: JitSpec) -> Kernel:
    return spec.build_and_load(device)


@functools.lru_cache(maxsize=64)
def _listed(device: int, shape: PlanShape, kv_itemsize: int, options: AttentionOptions) -> bool:
    """Whether run() reads a work list, or lengths alone."""
    from pyinfer.core.device import arch_number_of
    from pyinfer.jit import attention_even

    return attention_even.captured_config(arch_number_of(device), shape, kv_itemsize, options) is None


def _lengths(op: str, kv_len: Any, batch: int, device: int) -> TensorView:
    v = view(kv_len, op, "kv_len")
    check_dtype(op, "kv_len", v, (INT32,))
    check_shape(op, "kv_len", v, (batch,))
    if v.device != device:
        fail(op, "kv_len", "is on another device", device_name(v.device), device_name(device))
    if not v.is_contiguous():
        fail(op, "kv_len", "is not contiguous", f"strides {tuple(v.strides)}", "a contiguous tensor")
    return v


def _on_host(
    op: str, plan: AttentionPlan, indptr: np.ndarray, indices: np.ndarray, last: np.ndarray, kv_len: np.ndarray | None
) -> AttentionPlan:
    """The plan of the same shape for what the arrays hold now, checked as in plan()."""
    import numpy as np

    from pyinfer.schedulers.checks import lengths
    from pyinfer.schedulers.decode import EXTRA_SLOTS
    from pyinfer.schedulers.plan import build_plan, plan_batch

    qo_indptr = np.arange(len(last) + 1, dtype=np.int32)
    if kv_len is None:
        return plan_batch(op, plan.shape, qo_indptr, indptr, indices, last)
    pages = lengths(op, "paged_kv_indptr_buffer", indptr)
    page_size = plan.page_size
    wrong = np.flatnonzero((kv_len < 0) | (kv_len > pages.astype(np.int64) * page_size))
    if wrong.size:
        b = int(wrong[0])
        wanted = f"0..{int(pages[b]) * page_size} ({int(pages[b])} pages of {page_size})"
        fail(op, "kv_len", "is out of range", f"{int(kv_len[b])} for request {b}", wanted)
    if indptr[-1] > len(indices):
        wanted = f"at least {int(indptr[-1])} (paged_kv_indptr_buffer[-1])"
        fail(op, "paged_kv_indices_buffer", "is too short", len(indices), wanted)
    used = -(-kv_len.astype(np.int64) // page_size)
    read = [indices[begin : begin + n] for begin, n in zip(indptr[:-1], used, strict=True) if n]
    max_page = int(max((part.max() for part in read), default=-1))
    if read and min(int(part.min()) for part in read) < 0:
        fail(op, "paged_kv_indices_buffer", "holds a negative page", "one below 0", "0 or more")
    # The planner's numbers, back in the form of arguments: EXTRA of them are EXTRA_SLOTS * slots, as plan() set them.
    _, _, tile_q, tile_kv, slots, _, _, window_left, chunk = plan.shape.numbers[:9].tolist()
    return build_plan(
        op, qo_indptr, np.ones(len(last), np.int32), indptr, kv_len, indices,
        num_qo_heads=plan.num_qo_heads, num_kv_heads=plan.num_kv_heads, head_dim_qk=plan.head_dim_qk, head_dim_vo=plan.head_dim_vo,
        page_size=page_size, tile_q=tile_q, tile_kv=tile_kv, num_sms=slots * plan.num_kv_heads, ctas_per_sm=1, causal=False, window_left=window_left,
        fixed_split_size=chunk // page_size if chunk > 0 else None, disable_split_kv=chunk == 0, extra_slots=EXTRA_SLOTS, capacity=plan.capacity,
        max_page=max_page,
    )  # fmt: skip
