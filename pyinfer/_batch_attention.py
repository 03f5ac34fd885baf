"""The base of the batch attention wrappers: one plan, where it lies, CUDA graph capacity, and the checked run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyinfer import _attention as common
from pyinfer._attention_options import (
    Items,
    Mask,
    PlanKey,
    bind_mask,
    qo_lengths,
)
from pyinfer._batch_run import BatchRun
from pyinfer._support import KERNEL_FAMILIES
from pyinfer.core.calls import Calls
from pyinfer.core.dtypes import INT32, INT64, UINT8, DType
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    device_name,
    fail,
)
from pyinfer.core.tensor import CPU, TensorView, host_ints, plain_int32, view
from pyinfer.jit.attention_options import NO_EXTRAS, PLAIN, AttentionExtras, AttentionOptions

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.jit.customize import CustomModule
    from pyinfer.schedulers.plan import AttentionPlan
    from pyinfer.variants import AttentionVariant


_FIXED = (  # the names of what a plain key holds
    "num_qo_heads",
    "num_kv_heads",
    "head_dim_qk",
    "head_dim_vo",
    "page_size",
    "q_data_type",
    "fixed_split_size",
    "disable_split_kv",
)
_MASK_BUFFERS = ("custom_mask_buf", "mask_indptr_buf")


def _home(v: TensorView) -> TensorView:
    """A view that stands for a tensor's device and framework and keeps no memory alive."""
    return TensorView(None, 0, (), (), v.dtype, v.device, v.framework)


class BatchAttention(BatchRun):
    """What the batch wrappers share: one plan, where it lies, and the checked run.

    A wrapper belongs to the device of its workspace or, without one, to that of the first tensor it sees; a plan made from host metadata alone is moved to
    the device of `run`'s q when that comes.
    """

    _op = "attention"
    _paged = True
    _indices_arg = "paged_kv_indices_buffer"  # the name of the caller's buffer of page indices
    _page_arg = "paged_kv_indices"  # and of plan()'s argument
    _backends: tuple[str, ...] = ("auto", "fa2")  # prefill has a choice
    _fp8_queries = False  # whether there is a kernel for float8_e4m3fn ones

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
        self._variant: AttentionVariant | None = None  # the wrappers that take one set it
        self._jit_module: CustomModule | None = None
        common.check_options(self._op, backend=backend, jit_args=jit_args)
        if backend not in self._backends:
            fail(self._op, "backend", "has no kernel here", repr(backend), "'auto' or 'fa2'")
        self._family = KERNEL_FAMILIES[backend]
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
        self._calls = Calls()  # run() with the plan there is
        self._options: AttentionOptions = PLAIN
        self._extras: AttentionExtras = NO_EXTRAS
        self._mask: Mask | None = None
        self._items: Items | None = None
        self._extra_buffers: dict[str, Any] = {}  # device copies of masks and items that came from the host
        self._kv_known: tuple[Any, ...] | None = None  # the last cache's layout, found good for the plan
        self._indices: TensorView | None = None  # page indices that lie on the device
        if float_workspace_buffer is not None:
            self.reset_workspace_buffer(float_workspace_buffer)
        self._buffers = {}
        for arg, buffer in fixed_buffers.items():
            if not self._use_cuda_graph:
                break
            if buffer is None:
                if arg in _MASK_BUFFERS:  # needed by plans with a mask alone
                    continue
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
            check_dtype(self._op, arg, v, (UINT8 if arg == "custom_mask_buf" else INT32,))
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

    def _set_variant(self, variant: Any, jit_args: Any, jit_kwargs: Any) -> None:
        """The wrapper's variant, from its constructor's arguments."""
        if jit_args is not None or jit_kwargs is not None:
            from pyinfer.jit.customize import module_of_jit_args

            if variant is not None:
                fail(self._op, "variant", "was given twice", "variant and jit_args", "one of them")
            self._jit_module = module_of_jit_args(self._op, jit_args, jit_kwargs)
            self._variant = self._jit_module.variant
        elif variant is not None:
            from pyinfer.variants import check_variant

            self._variant = check_variant(self._op, variant)

    def _with_variant(self, key: PlanKey, sm_scale: Any) -> PlanKey:
        """A plan's key with the wrapper's variant; sm_scale is what plan() was given."""
        if self._variant is None:
            return key
        user = self._variant.user
        if user.raw_scores:  # such a variant scales, caps and biases by itself
            self._check_raw(key.logits_soft_cap, key.pos_encoding_mode)
            assert self._jit_module is not None
            types = (key.q_data_type, key.kv_data_type, key.o_data_type)
            self._jit_module.check(self._op, self._jit_module.phase, *types, (key.head_dim_qk, key.head_dim_vo))
            key = key._replace(sm_scale=1.0 if sm_scale is None else key.sm_scale)
        return key._replace(variant=user)

    def _check_raw(self, soft_cap: float, pos_encoding_mode: str) -> None:
        for arg, value, off in (
            ("logits_soft_cap", soft_cap, 0.0),
            ("pos_encoding_mode", pos_encoding_mode, "NONE"),
        ):
            if value != off:
                fail(self._op, arg, "does not go with jit_args", value, off, "The variant does that itself.")

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made for CUDA graphs."""
        return self._use_cuda_graph

    @property
    def plan_info(self) -> AttentionPlan | None:
        """The current plan (immutable), None before plan()."""
        return self._plan

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace from the next plan() on, which refuses one that is too small."""
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
        kv_dtype: DType | None = None,
        out_dtype: DType | None = None,
        options: AttentionOptions = PLAIN,
        mask: tuple[TensorView, bool] | None = None,
        items: Items | None = None,
    ) -> None:
        """Schedule, for the wrapper's device if that is known (else for the CPU until run() shows q), and send the plan there.

        Nothing of the wrapper changes if this raises. `metadata` are the host arrays that `_schedule` takes: the plan holds its own copy of them, and none are
        kept. `buffers` are the values of the caller's buffers, in CUDA graph mode. kv_dtype and out_dtype are q's by default. `mask` is the view of a custom
        mask and whether it is packed.
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
        if mask is not None and mask[0].device >= 0:
            ref = self._same_device("packed_custom_mask" if mask[1] else "custom_mask", mask[0].device, ref, mask[0])
        if items is not None and items.device >= 0:
            ref = self._same_device("prefix_len_ptr", items.device, ref, items.prefix_len)
        device = CPU if ref is None else ref.device
        self._check_kernel(device, dtype, *self._dims)
        if options.rope is not None:
            common.check_kernel(self._op, device, dtype, *self._dims, rope=True, fp8_queries=self._fp8_queries)
        self._graph_proposal = None
        qo_indptr, kv_indptr, host_indices, last_page_len = metadata
        plan = self._schedule(qo_indptr, kv_indptr, host_indices, last_page_len, key, device, window_left, causal)
        self._check_workspace(plan.workspace_bytes)
        bound = None
        if mask is not None:
            bound = bind_mask(self._op, *mask, qo_lengths(plan), plan.kv_len)
            if self._use_cuda_graph:
                buffers = {**buffers, **self._mask_buffers(bound)}
        if self._use_cuda_graph:
            self._graph_state = self._graph_proposal or self._graph_state
            for arg, values in buffers.items():
                common.copy_to_buffer(self._buffers[arg], values)
            if device >= 0 and self._paged:
                on_device = self._buffers[self._indices_arg]
        self._ref, self._plan_key, self._dtype, self._indices = ref, key, dtype, on_device
        self._kv_dtype, self._out_dtype = kv_dtype or dtype, out_dtype or dtype
        self._options, self._mask, self._items = options, bound, items
        self._soft_cap, self._sm_scale = soft_cap, sm_scale
        self._adopt(plan, device)

    def _plan_again(
        self,
        key: PlanKey,
        qo_indptr: Any,
        kv_indptr: np.ndarray,
        indices: np.ndarray | TensorView | None,
        last_page_len: Any,
    ) -> bool:
        """`_set_plan` where a plan differs from the last in the batch alone, as most do, step after step. False: there is more; `key` is another object."""
        device = self._planned_device
        if (
            key is not self._plan_key
            or device != (CPU if self._ref is None else self._ref.device)
            or self._use_cuda_graph
            or self._mask is not None
            or self._items is not None
        ):
            return False
        host, there = (None, indices) if isinstance(indices, TensorView) else (indices, None)
        if there is not None and there.device != device:
            return False
        plan = self._schedule(qo_indptr, kv_indptr, host, last_page_len, key, device, key.window_left, key.causal)
        self._check_workspace(plan.workspace_bytes)
        last = self._plan
        assert last is not None
        if plan.max_page > last.max_page:
            self._kv_known = None  # the cache's layout is as it was, but the pages named must lie in it
        self._plan, self._indices = plan, there
        _, heads, dim = self._q_shape
        self._q_shape = (plan.total_rows, heads, dim)
        self._kv_tokens = plan.total_kv
        self._calls.clear()
        if self._planned_device >= 0:
            self._upload(plan, plan.shape is last.shape)
        return True

    def _same_device(self, arg: str, device: int, ref: TensorView | None, like: TensorView) -> TensorView:
        """What stands for the wrapper's device, now that an argument lies on one; ValueError if it is another."""
        if ref is not None and ref.device != device:
            fail(self._op, arg, "is on another device", device_name(device), device_name(ref.device))
        return ref or _home(like)

    def _check_workspace(self, need: int) -> None:
        given = self._workspace
        if given is None or not need:
            return
        have = given.size * given.dtype.itemsize
        usable = have - -given.ptr % 16
        if usable < need:
            fail(
                self._op, "float_workspace_buffer", "is too small", f"{have} bytes", f"{need + have - usable} for this plan",
                "Pass a larger one to reset_workspace_buffer(), or make the wrapper without one: the library then allocates what it needs.",
            )  # fmt: skip

    def _mask_buffers(self, mask: Mask) -> dict[str, Any]:
        """What goes into the caller's mask buffers, in CUDA graph mode."""
        for arg in _MASK_BUFFERS:
            if arg not in self._buffers:
                fix = "A plan with a custom mask needs it in CUDA graph mode."
                fail(self._op, arg, "is missing", "None", "a tensor that stays where it is", fix)
        self._check_buffer("mask_indptr_buf", len(mask.byte_indptr))
        need = int(mask.byte_indptr[-1])
        self._check_buffer("custom_mask_buf", need, exact=False)
        bits: Any = mask.host
        if mask.view is not None:
            v = mask.view
            bits = TensorView(v.obj, v.ptr, (need,), (1,), v.dtype, v.device, v.framework)
        return {"custom_mask_buf": bits, "mask_indptr_buf": mask.byte_indptr}

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
        self._kv_tokens = plan.total_kv
        self._kv_known = None
        self._calls.clear()
        if device >= 0:
            self._upload(plan)

    def _override(
        self,
        pos_encoding_mode: str,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
        causal: bool = False,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> None:
        """What the deprecated forward() replaces in the plan. A custom mask stays, and replaces causality as it does in plan()."""
        plan = self._plan
        if plan is None:
            return  # run() says so
        mode, scale, theta = common.check_pos_encoding(self._op, pos_encoding_mode, rope_scale, rope_theta)
        rope = (scale, theta) if mode == "ROPE_LLAMA" else None
        options = self._options._replace(alibi=mode == "ALIBI", rope=rope)
        causal = causal and not options.mask
        if isinstance(self._plan_key, PlanKey):
            self._plan_key = self._plan_key._replace()  # another object, which no plan() will be like
        self._calls.clear()
        window = common.check_window(self._op, window_left)
        self._soft_cap = common.check_soft_cap(self._op, logits_soft_cap)
        self._sm_scale = common.softmax_scale(self._op, sm_scale, plan.head_dim_qk)
        if self._variant is not None and self._variant.user.raw_scores:
            self._check_raw(self._soft_cap, mode)
            self._sm_scale = 1.0 if sm_scale is None else self._sm_scale
        if window != plan.window_left or causal != plan.causal or options != self._options:
            dims = plan.head_dim_qk, plan.head_dim_vo
            common.check_kernel(
                self._op, self._planned_device, self._dtype, *dims, rope=rope is not None, fp8_queries=self._fp8_queries
            )
            self._options = options
            if isinstance(self._plan_key, PlanKey):
                self._plan_key = self._plan_key._replace(pos_encoding_mode=mode, rope_scale=scale, rope_theta=theta)
            self._adopt(self._replan(self._planned_device, window, causal), self._planned_device)

    def _check_kernel(self, device: int, dtype: DType, head_dim_qk: int, head_dim_vo: int) -> None:
        """TypeError or ValueError if the device has no kernel for the type or the head dimensions."""
        common.check_kernel(self._op, device, dtype, head_dim_qk, head_dim_vo, fp8_queries=self._fp8_queries)

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

        host = plain_int32(indices)
        if host is not None:
            return host
        if isinstance(indices, np.ndarray | list | tuple):
            return host_ints(indices, op, self._page_arg)
        v = view(indices, op, self._page_arg)
        if v.device < 0:
            return host_ints(indices, op, self._page_arg)
        check_ndim(op, self._page_arg, v, 1)
        check_dtype(op, self._page_arg, v, (INT32,) if v.framework == "dlpack" else (INT32, INT64))
        check_last_dim_contiguous(op, self._page_arg, v)
        if v.dtype is INT64:  # narrowed where it lies, in stream order
            v = view(v.obj.int() if v.framework == "torch" else v.obj.astype("int32"), op, self._page_arg)
        if len(indptr) and v.shape[0] < indptr[-1]:
            fail(
                op,
                self._page_arg,
                "is too short",
                v.shape[0],
                f"at least {int(indptr[-1])} ({self._page_arg.replace('indices', 'indptr')}[-1])",
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
            names = key._fields if isinstance(key, PlanKey) else _FIXED
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
