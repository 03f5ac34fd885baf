"""The base of the batch attention wrappers: one plan, where it lies, CUDA graph capacity, and the checked run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyinfer import _attention as common
from pyinfer._repeated_run import RepeatedRun
from pyinfer.core.dtypes import FLOAT32, INT32, DType
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
    device_name,
    fail,
    fail_type,
)
from pyinfer.core.tensor import CPU, TensorView, current_stream, empty, host_ints, view

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.schedulers.plan import AttentionPlan


def _home(v: TensorView) -> TensorView:
    """A view that stands for a tensor's device and framework and keeps no memory alive."""
    return TensorView(None, 0, (), (), v.dtype, v.device, v.framework)


class BatchAttention:
    """What the batch wrappers share: one plan, where it lies, and the checked run.

    A wrapper belongs to the device of its workspace or, without one, to that of the first tensor it sees; a plan made from host metadata alone is moved to
    the device of `run`'s q when that comes.
    """

    _op = "attention"
    _paged = True
    _indices_arg = "paged_kv_indices_buffer"  # the name of the caller's buffer of page indices
    _page_arg = "paged_kv_indices"  # and of plan()'s argument

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str,
        use_cuda_graph: bool,
        backend: str,
        jit_args: Any,
        fixed_buffers: dict[str, Any],
    ) -> None:
        self._kv_layout = common.check_layout(self._op, kv_layout)
        common.check_options(self._op, backend=backend, jit_args=jit_args)
        self._use_cuda_graph = bool(use_cuda_graph)
        self._ref: TensorView | None = None  # stands for the wrapper's device and framework; owns nothing
        self._workspace: TensorView | None = None
        self._own_workspace: Any = None
        self._plan: AttentionPlan | None = None
        self._plan_key: tuple[Any, ...] = ()  # what plan() was told besides the metadata, as `_schedule` takes it
        self._planned_device = CPU
        self._graph_state: dict[str, Any] | None = None  # what the first plan fixed, in CUDA graph mode
        self._graph_proposal: dict[str, Any] | None = None
        self._plan_buffer: Any = None
        self._plan_ptr = self._indices_ptr = self._workspace_ptr = 0
        self._pdl_default = False
        self._dims = (0, 0)  # head_dim_qk, head_dim_vo of the plan in the making
        self._sm_scale, self._soft_cap = 1.0, 0.0
        self._q_shape = (0, 0, 0)
        self._kv_tokens = 0
        self._repeated = RepeatedRun()
        self._kv_known: tuple[Any, ...] | None = None  # the last cache's layout, found good for the plan
        self._indices: TensorView | None = None  # page indices that lie on the device
        if float_workspace_buffer is not None:
            self.reset_workspace_buffer(float_workspace_buffer)
        self._buffers = {}
        for arg, buffer in fixed_buffers.items():
            if not self._use_cuda_graph:
                break
            if buffer is None:
                fail(
                    self._op,
                    arg,
                    "is missing",
                    "None",
                    "an int32 tensor",
                    "CUDA graph mode needs buffers that stay where they are.",
                )
            v = view(buffer, self._op, arg)
            check_ndim(self._op, arg, v, 1)
            check_dtype(self._op, arg, v, (INT32,))
            check_last_dim_contiguous(self._op, arg, v)
            if self._ref is not None and v.device != self._ref.device:
                fail(
                    self._op,
                    arg,
                    "is on another device",
                    device_name(v.device),
                    f"{device_name(self._ref.device)} (where the workspace is)",
                )
            self._ref = self._ref or _home(v)
            self._buffers[arg] = v

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made for CUDA graphs."""
        return self._use_cuda_graph

    @property
    def plan_info(self) -> AttentionPlan | None:
        """The current plan (immutable), None before plan()."""
        return self._plan

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace. It is used when large enough; otherwise the library allocates its own."""
        v = view(float_workspace_buffer, self._op, "float_workspace_buffer")
        if not v.is_contiguous():
            fail(
                self._op,
                "float_workspace_buffer",
                "is not contiguous",
                f"strides {tuple(v.strides)}",
                "a contiguous tensor",
            )
        if self._ref is not None and v.device != self._ref.device:
            fail(
                self._op,
                "float_workspace_buffer",
                "is on another device",
                device_name(v.device),
                device_name(self._ref.device),
            )
        self._workspace, self._ref = v, _home(v)

    # ---- plan
    def _set_plan(
        self,
        metadata: tuple[Any, ...],
        key: tuple[Any, ...],
        dtype: DType,
        window_left: int,
        causal: bool,
        soft_cap: float,
        sm_scale: float,
        indices: Any,
        buffers: dict[str, Any],
    ) -> None:
        """Schedule, for the wrapper's device if that is known (else for the CPU until run() shows q), and send the plan there.

        Nothing of the wrapper changes if this raises. `metadata` are the host arrays that `_schedule` takes: the plan holds its own copy of them, and none are
        kept. `buffers` are the values of the caller's buffers, in CUDA graph mode.
        """
        on_device = indices if isinstance(indices, TensorView) else None
        ref = self._ref
        if on_device is not None:
            ref = ref or _home(on_device)
            if on_device.device != ref.device:
                fail(
                    self._op,
                    self._page_arg,
                    "is on another device",
                    device_name(on_device.device),
                    device_name(ref.device),
                )
        device = CPU if ref is None else ref.device
        self._check_kernel(device, dtype, *self._dims)
        self._graph_proposal = None
        plan = self._schedule(*metadata, key, device, window_left, causal)
        if self._use_cuda_graph:
            self._graph_state = self._graph_proposal or self._graph_state
            for arg, values in buffers.items():
                common.copy_to_buffer(self._buffers[arg], values)
            if device >= 0 and self._paged:
                on_device = self._buffers[self._indices_arg]
        self._ref, self._plan_key, self._dtype, self._indices = ref, key, dtype, on_device
        self._soft_cap, self._sm_scale = soft_cap, sm_scale
        self._adopt(plan, device)

    def _schedule(
        self,
        qo_indptr: Any,
        kv_indptr: np.ndarray,
        indices: np.ndarray | None,
        last_page_len: Any,
        key: tuple[Any, ...],
        device: int,
        window_left: int,
        causal: bool,
    ) -> AttentionPlan:
        """Plan host metadata for a device."""
        raise NotImplementedError

    def _replan(self, device: int, window_left: int, causal: bool) -> AttentionPlan:
        """The current plan's batch, planned for another device or mask.

        The metadata comes out of the plan, which holds a copy: the caller's own arrays may have changed since plan().
        """
        plan = self._plan
        assert plan is not None
        qo_indptr, kv_indptr = plan.qo_indptr.copy(), plan.kv_indptr.copy()  # copies because the plan's are read-only,
        last = indices = None  # a type that Numba would compile the planner for once more
        if plan.page_size:
            pages = kv_indptr[1:] - kv_indptr[:-1]
            last = plan.kv_len - (pages - (pages > 0)) * plan.page_size
        if plan.offsets.kv_indices >= 0 and plan.kv_indices is not None:
            indices = plan.kv_indices.copy()
        new = self._schedule(qo_indptr, kv_indptr, indices, last, self._plan_key, device, window_left, causal)
        return new if indices is not None else dataclasses.replace(new, max_page=plan.max_page)

    def _adopt(self, plan: AttentionPlan, device: int) -> None:
        """Make `plan` the current one: what run() compares with, and on a GPU everything it needs."""
        self._plan, self._planned_device = plan, device
        self._q_shape = (plan.total_rows, plan.num_qo_heads, plan.head_dim_qk)
        self._kv_tokens = int(plan.kv_indptr[-1])
        self._kv_known = None
        self._repeated.forget()
        if device >= 0:
            self._upload(plan)

    def _override(
        self,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        causal: bool = False,
    ) -> None:
        """What the deprecated forward() replaces in the plan."""
        plan = self._plan
        if plan is None:
            return  # run() says so
        common.check_options(self._op, pos_encoding_mode=pos_encoding_mode)
        self._repeated.forget()
        window = common.check_window(self._op, window_left)
        self._soft_cap = common.check_soft_cap(self._op, logits_soft_cap)
        self._sm_scale = common.softmax_scale(self._op, sm_scale, plan.head_dim_qk)
        if window != plan.window_left or causal != plan.causal:
            self._adopt(self._replan(self._planned_device, window, causal), self._planned_device)

    def _upload(self, plan: AttentionPlan) -> None:
        """Send a plan to the GPU, find its workspace and its kernel (compiling it if need be): run() then only launches."""
        from pyinfer.core.workspace import DeviceBuffer, PlanBuffer

        ref = self._ref
        assert ref is not None
        if self._plan_buffer is None:
            self._plan_buffer = PlanBuffer(ref.device, ref.framework)
        self._plan_ptr = self._plan_buffer.upload(plan.pack(), current_stream(ref))
        if self._indices is not None:
            self._indices_ptr = self._indices.ptr
        else:
            self._indices_ptr = self._plan_ptr + 4 * plan.offsets.kv_indices if plan.offsets.kv_indices >= 0 else 0
        need = plan.workspace_bytes
        given = self._workspace
        if given is not None and given.size * given.dtype.itemsize >= need and given.ptr % 16 == 0:
            self._workspace_ptr = given.ptr
        else:
            if self._own_workspace is None:
                self._own_workspace = DeviceBuffer(ref.device, ref.framework)
            self._workspace_ptr = self._own_workspace.reserve(need)
        self._pdl_default = common.use_pdl(ref.device, None)
        self._prepare(plan, ref.device)

    def _prepare(self, plan: AttentionPlan, device: int) -> None:
        """Fetch or compile the plan's kernel."""
        from pyinfer.jit.attention_launch import prepare_attention

        prepare_attention(device, plan, self._plan_ptr, self._dtype, self._soft_cap > 0.0)

    def _check_kernel(self, device: int, dtype: DType, head_dim_qk: int, head_dim_vo: int) -> None:
        """TypeError or ValueError if the device has no kernel for the type or the head dimensions."""
        common.check_kernel(self._op, device, dtype, head_dim_qk, head_dim_vo)

    def _move_plan(self, q: TensorView) -> None:
        """The first q after a plan from host metadata shows the device."""
        if self._ref is not None:
            fail(
                self._op,
                "q",
                "is on another device",
                device_name(q.device),
                f"{device_name(self._ref.device)} (where the wrapper's buffers are)",
            )
        plan = self._plan
        assert plan is not None
        self._check_kernel(q.device, self._dtype, plan.head_dim_qk, plan.head_dim_vo)
        moved = self._replan(q.device, plan.window_left, plan.causal)
        self._ref = _home(q)
        self._adopt(moved, q.device)

    def _page_indices(self, op: str, indices: Any, indptr: np.ndarray) -> np.ndarray | TensorView:
        """Page indices as a host array, or the view of those that lie on a device (they are used where they are, and only their number is checked)."""
        import numpy as np

        if isinstance(indices, np.ndarray | list | tuple):
            return host_ints(indices, op, self._page_arg)
        v = view(indices, op, self._page_arg)
        if v.device < 0:
            return host_ints(indices, op, self._page_arg)
        check_ndim(op, self._page_arg, v, 1)
        check_dtype(op, self._page_arg, v, (INT32,))
        check_last_dim_contiguous(op, self._page_arg, v)
        if len(indptr) and v.shape[0] < indptr[-1]:
            fail(
                op, self._page_arg, "is too short", v.shape[0], f"at least {int(indptr[-1])} ({self._page_arg.replace('indices', 'indptr')}[-1])"
            )
        return v

    def _check_buffer(self, arg: str, need: int, exact: bool = True) -> None:
        """ValueError unless a caller's buffer has `need` entries (or, not exact, at least so many)."""
        have = self._buffers[arg].shape[0]
        if exact and need != have:
            fail(
                self._op,
                arg,
                "does not fit the plan",
                f"{have} entries",
                f"{need} for this plan",
                "The buffers fix the batch size in CUDA graph mode.",
            )
        if need > have:
            fail(
                self._op,
                arg,
                "is too small",
                f"{have} entries",
                f"{need} for this plan",
                "Make a wrapper with a larger buffer.",
            )

    def _fixed(self, device: int, key: tuple[Any, ...], choose: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
        """What the first plan fixed in CUDA graph mode (or, for the first plan, what `choose()` proposes); the shapes in `key` must stay."""
        state = self._graph_state
        if state is None:
            state = self._graph_proposal = {"key": key, "fixed": choose()}
        if state["key"] != key:
            names = (
                "num_qo_heads",
                "num_kv_heads",
                "head_dim_qk",
                "head_dim_vo",
                "page_size",
                "q_data_type",
                "fixed_split_size",
                "disable_split_kv",
            )
            for name, had, got in zip(names, state["key"], key, strict=True):
                if had != got:
                    fail(
                        self._op,
                        name,
                        "differs from the first plan",
                        got,
                        had,
                        "In CUDA graph mode the first plan fixes it; make a new wrapper.",
                    )
        return state["fixed"]

    # ---- run
    def _check_run(self, q: Any, window_left: int | None, args: tuple[Any, ...]) -> TensorView:
        plan = self._plan
        if plan is None:
            fail(self._op, "plan()", "was not called", "run() first", "plan() before run()")
        if args:
            fail_type(
                self._op,
                "*args",
                "are not supported yet",
                f"{len(args)} extra arguments",
                "none (they belong to jit_args)",
            )
        v = common.q_view(self._op, q)
        if v.dtype is not self._dtype:
            fail_type(
                self._op,
                "q",
                "differs from the planned dtype",
                v.dtype.name,
                self._dtype.name,
                "Pass q_data_type to plan().",
            )
        if v.shape != self._q_shape:
            rows, heads, dim = self._q_shape  # a captured graph's q may have room for more rows than the plan has
            if not (self._use_cuda_graph and v.shape[0] >= rows and v.shape[1] == heads and v.shape[2] == dim):
                check_shape(self._op, "q", v, self._q_shape)
        if v.device != self._planned_device:
            self._move_plan(v)
        if window_left is not None and int(window_left) != plan.window_left:
            fail(
                self._op,
                "window_left",
                "differs from the plan",
                window_left,
                plan.window_left,
                "It is an argument of plan().",
            )
        return v

    def _paged_kv(self, q: TensorView, cache: Any) -> tuple[TensorView, TensorView]:
        """Checked views of the caches. Layers share one layout: what was checked for the last cache is not checked again."""
        known = self._kv_known
        if type(cache) is not tuple and type(cache) is not list:  # a list is refused below
            both = view(cache, self._op, "paged_kv_cache")
            if known is not None and known[:4] == (both.shape, both.strides, both.dtype, both.device):
                _, _, dtype, device, shape, strides, v_offset = known
                owner, framework, ptr = both.obj, both.framework, both.ptr
                k = TensorView(owner, ptr, shape, strides, dtype, device, framework)
                return k, TensorView(owner, ptr + v_offset, shape, strides, dtype, device, framework)
        assert self._plan is not None
        k, v = common.paged_views(self._op, cache, self._kv_layout, self._plan.page_size)
        if type(cache) is tuple:
            now: tuple[Any, ...] = (k.shape, k.strides, k.dtype, k.device, v.shape, v.strides, v.dtype, v.device)
            if now == known:
                return k, v
        else:
            now = (both.shape, both.strides, both.dtype, both.device, k.shape, k.strides, v.ptr - k.ptr)
        self._check_kv(q, k, v, "paged_kv_cache (K)", "paged_kv_cache (V)")
        self._kv_known = now
        return k, v

    def _check_kv(self, q: TensorView, k: TensorView, v: TensorView, k_name: str, v_name: str) -> None:
        plan = self._plan
        assert plan is not None
        hnd = self._kv_layout == "HND"
        for x, name, dim in ((k, k_name, plan.head_dim_qk), (v, v_name, plan.head_dim_vo)):
            if x.dtype is not self._dtype:
                fix = (
                    "fp8 KV caches are not supported yet." if x.dtype.itemsize == 1 else "Pass kv_data_type to plan()."
                )
                fail_type(self._op, name, "differs from the planned dtype", x.dtype.name, self._dtype.name, fix)
            if x.device != q.device:
                fail(
                    self._op,
                    name,
                    "is on another device",
                    device_name(x.device),
                    f"{device_name(q.device)} (where q is)",
                )
            shape = x.shape
            if plan.page_size:
                page_axis, head_axis = (2, 1) if hnd else (1, 2)
                if shape[page_axis] != plan.page_size or shape[head_axis] != plan.num_kv_heads or shape[3] != dim:
                    wanted = [None, None, None, dim]
                    wanted[page_axis], wanted[head_axis] = plan.page_size, plan.num_kv_heads
                    check_shape(self._op, name, x, tuple(wanted))
                if shape[0] <= plan.max_page:
                    fail(
                        self._op,
                        "paged_kv_indices",
                        "names a page outside the cache",
                        plan.max_page,
                        f"0..{shape[0] - 1} ({name} has {shape[0]} pages)",
                    )
            else:
                check_ndim(self._op, name, x, 3)
                token_axis, head_axis = (1, 0) if hnd else (0, 1)
                if shape[head_axis] != plan.num_kv_heads or shape[2] != dim:
                    wanted = [None, None, dim]
                    wanted[head_axis] = plan.num_kv_heads
                    check_shape(self._op, name, x, tuple(wanted))
                if shape[token_axis] < self._kv_tokens:
                    fail(
                        self._op,
                        name,
                        "is shorter than the plan",
                        f"{shape[token_axis]} tokens",
                        f"at least {self._kv_tokens} (kv_indptr[-1])",
                    )
            if x.strides[-1] != 1:
                check_last_dim_contiguous(self._op, name, x)

    def _execute(
        self,
        q: TensorView,
        k: TensorView,
        v: TensorView,
        out: Any,
        lse: Any,
        return_lse: bool,
        sm_scale: float,
        soft_cap: float,
        v_scale: float,
        enable_pdl: bool | None,
        options: tuple[Any, ...],
    ) -> Any:
        """Allocate what is not given, and launch. `options`: the arguments by which `RepeatedRun` recognises the call."""
        plan = self._plan
        assert plan is not None
        given_lse = lse is not None
        shape = (q.shape[0], plan.num_qo_heads, plan.head_dim_vo)
        if out is None:
            out = empty(q, shape)
            out_view = view(out)
        else:
            out_view = common.check_out(self._op, "out", out, q, shape, q.dtype)
        lse_view = None
        if return_lse:
            if lse is None:
                lse = empty(q, shape[:2], FLOAT32)
                lse_view = view(lse)
            else:
                lse_view = common.check_out(self._op, "lse", lse, q, shape[:2], FLOAT32)
                if not lse_view.is_contiguous():
                    fail(
                        self._op,
                        "lse",
                        "is not contiguous",
                        f"strides {tuple(lse_view.strides)}",
                        "a contiguous tensor",
                    )
        if q.device >= 0:
            pdl = self._pdl_default if enable_pdl is None else common.use_pdl(q.device, enable_pdl)
            launch = functools.partial(
                common.launchers()[0],
                q.device, current_stream(q), self._plan_ptr, plan, q, k, v, self._indices_ptr, self._kv_layout, out_view, lse_view, self._workspace_ptr,
                sm_scale=sm_scale, logits_soft_cap=soft_cap, v_scale=v_scale, pdl=pdl,
            )  # fmt: skip
            launch()
            if not given_lse:
                self._repeated.note(q, k, v, out_view, lse_view, options, functools.partial(launch, bind=True))
        else:
            from pyinfer.cpu.attention import run_plan

            run_plan(
                plan,
                q,
                k,
                v,
                self._kv_layout,
                out_view,
                lse_view,
                sm_scale=sm_scale,
                logits_soft_cap=soft_cap,
                v_scale=v_scale,
            )
        return (out, lse) if return_lse else out
