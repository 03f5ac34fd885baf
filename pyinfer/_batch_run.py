"""How the batch attention wrappers bring a plan to the GPU and run it: tensors checked against it, outputs allocated, the launch on either device."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pyinfer import _attention as common
from pyinfer._attention_options import Items, Mask, joined_items, joined_mask, mask_bits_offset, sinks_view
from pyinfer.core.calls import Calls, Source
from pyinfer.core.dtypes import FLOAT8_E4M3, FLOAT32, DType
from pyinfer.core.errors import (
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
    device_name,
    fail,
    fail_type,
)
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, empty, view
from pyinfer.jit.attention_options import NO_EXTRAS, AttentionExtras, AttentionOptions

if TYPE_CHECKING:
    import numpy as np

    from pyinfer._fp8_queries import HeadScales
    from pyinfer.core.launch import BoundLaunch
    from pyinfer.schedulers.plan import AttentionPlan
    from pyinfer.variants import AttentionVariant


RunCall = tuple[tuple[Any, ...], tuple[Any, ...]]
"""What `core.calls` recognises a run() by: all that decides the launch besides the plan and the tensors, and the tensors."""


def run_call(
    q: Any, kv: Any, out: Any, lse: Any, args: tuple[Any, ...], sinks: Any, options: tuple[Any, ...]
) -> RunCall:
    """A run() for `Calls.run`: a new plan forgets them all.

    Parameters
    ----------
    kv
        The cache, or a tuple of keys and values.
    args, sinks
        Values that a bound launch has in it: of the tensors among them the addresses count too.
    options
        The other arguments.
    """
    pair = type(kv) is tuple
    tensors = (q, *kv) if pair else (q, kv)
    if out is not None:
        tensors += (out,)
    if lse is not None:
        tensors += (lse,)
    if not args and sinks is None:
        return (options, pair, out is None, lse is None), tensors
    plain = _torch_types()
    values = (*args, None, sinks)
    tensors += tuple([x for x in values if type(x) in plain])
    bound = [(type(x).__name__, x.data_ptr() if type(x) in plain else x) for x in values]
    return (options, pair, out is None, lse is None, *bound), tensors


def _torch_types() -> tuple[type, ...]:
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.Tensor, torch.nn.Parameter)


def remember_run(
    calls: Calls,
    call: RunCall,
    q: TensorView,
    inputs: tuple[Source, ...],
    given: int,
    shape: tuple[int, int, int],
    dtype: DType,
    bound: BoundLaunch,
    given_out: bool,
    return_lse: bool,
    given_lse: bool,
    times: int = 1,
) -> None:
    """Let later calls like this one, which was launched by `bound`, go straight to the launch.

    Parameters
    ----------
    inputs, given
        Where the launch's inputs come from, and how many of the call's tensors come before the output.
    shape, dtype
        Of the output.
    times
        How often the launch takes inputs, output and LSE.
    """
    scalars, tensors = call
    outputs: list[tuple[Any, DType]] = []
    places = []
    for wanted, is_given, size, kind in (
        (True, given_out, shape, dtype),
        (return_lse, given_lse, shape[:2], FLOAT32),
    ):
        if wanted and is_given:
            places.append(given)
            given += 1
        elif wanted:
            places.append(len(tensors) + len(outputs))
            outputs.append((size, kind))
    recipe = (*inputs, *[(place, 0) for place in places], *[None] * (not return_lse))
    calls.remember(scalars, tensors, q, bound, tuple(outputs), recipe * times, len(inputs) + 1, tuple(places))


class BatchRun:
    """The part of the wrappers behind plan(): everything here reads what `_batch_attention.BatchAttention` planned."""

    _op: str
    _kv_layout: str
    _use_cuda_graph: bool
    _plan: AttentionPlan | None
    _planned_device: int
    _dtype: DType
    _kv_dtype: DType
    _out_dtype: DType
    _options: AttentionOptions
    _variant: AttentionVariant | None
    _extras: AttentionExtras
    _mask: Mask | None
    _items: Items | None
    _buffers: dict[str, TensorView]
    _workspace: TensorView | None
    _own_workspace: Any
    _plan_buffer: Any
    _extra_buffers: dict[str, Any]
    _ref: TensorView | None
    _indices: TensorView | None
    _q_shape: tuple[int, int, int]
    _kv_tokens: int
    _kv_known: tuple[Any, ...] | None
    _calls: Calls
    _plan_ptr: int
    _indices_ptr: int
    _workspace_ptr: int
    _pdl_default: bool
    _fresh = False  # the plan was uploaded behind the last launch
    _sm_scale: float
    _soft_cap: float

    def _move_plan(self, q: TensorView) -> None:
        raise NotImplementedError

    def _upload(self, plan: AttentionPlan, has_kernel: bool = False) -> None:
        """Send a plan to the GPU, find its workspace and its kernel (compiling it if need be): run() then only launches."""
        ref = self._ref
        assert ref is not None
        if self._plan_buffer is None:
            from pyinfer.core.workspace import DeviceBuffer, PlanBuffer

            self._plan_buffer = PlanBuffer(ref.device, ref.framework)
            self._own_workspace = DeviceBuffer(ref.device, ref.framework)
            self._pdl_default = common.use_pdl(ref.device, None)
        self._plan_ptr = self._plan_buffer.upload(plan.pack(), current_stream(ref))
        self._fresh = True
        if self._indices is not None:
            self._indices_ptr = self._indices.ptr
        else:
            self._indices_ptr = self._plan_ptr + 4 * plan.offsets.kv_indices if plan.offsets.kv_indices >= 0 else 0
        if self._workspace is not None:
            self._workspace_ptr = self._workspace.ptr + -self._workspace.ptr % 16
        else:
            self._workspace_ptr = self._own_workspace.reserve(plan.workspace_bytes)
        if self._mask is not None or self._items is not None:
            self._extras = self._upload_extras(ref)
        else:
            self._extras = NO_EXTRAS
        if not has_kernel:
            self._prepare(plan, ref.device)

    def _start(self, bound: BoundLaunch, pdl: bool, *arguments: int) -> None:
        """Launch. What may start early waits for the kernel before it; behind a plan's copy, which is no kernel, it does not start early."""
        launch = bound.behind_a_copy if self._fresh and pdl else bound
        self._fresh = False
        launch(*arguments)

    def _upload_extras(self, ref: TensorView) -> AttentionExtras:
        """Addresses of what the options need, after bringing to the device what came from the host."""
        mask, items = self._mask, self._items
        extras = NO_EXTRAS
        if mask is not None:
            if self._use_cuda_graph:
                at, indptr = self._buffers["custom_mask_buf"].ptr, self._buffers["mask_indptr_buf"].ptr
            elif mask.view is not None:
                indptr = self._send("mask", mask.byte_indptr, ref)
                at = mask.view.ptr or indptr  # an empty mask has no address, and is not read
            else:
                indptr = self._send("mask", joined_mask(mask), ref)
                at = indptr + mask_bits_offset(mask)
            extras = extras._replace(mask_ptr=at, mask_indptr_ptr=indptr)
        if items is not None:
            if items.device >= 0:
                prefix, places = items.prefix_len.ptr, items.token_pos.ptr
            else:
                prefix = self._send("items", joined_items(items), ref)
                places = prefix + 4 * ((len(items.prefix_len) + 3) & -4)
            extras = extras._replace(prefix_len_ptr=prefix, token_pos_ptr=places, token_pos_len=items.token_pos_len)
        return extras

    def _send(self, name: str, data: np.ndarray, ref: TensorView) -> int:
        """Copy an int32 array to a device buffer of the wrapper's own, asynchronously; returns its address."""
        from pyinfer.core.workspace import PlanBuffer

        buffer = self._extra_buffers.get(name)
        if buffer is None:
            buffer = self._extra_buffers[name] = PlanBuffer(ref.device, ref.framework)
        return buffer.upload(data, current_stream(ref))

    def _prepare(self, plan: AttentionPlan, device: int) -> None:
        """Fetch or compile the plan's kernel."""
        from pyinfer.jit.attention_launch import prepare_attention

        kv, out = self._kv_dtype, self._out_dtype
        prepare_attention(
            device, plan, self._plan_ptr, self._dtype, self._soft_cap > 0.0, None, kv, out, self._options, True
        )

    def _check_run(self, q: Any, window_left: int | None, args: tuple[Any, ...]) -> TensorView:
        plan = self._plan
        if plan is None:
            fail(self._op, "plan()", "was not called", "run() first", "plan() before run()")
        fp8 = self._dtype is FLOAT8_E4M3 and self._variant is None
        if fp8 and len(args) not in (0, 3):
            wanted = "scale_q, scale_k and scale_v, or none"
            fail_type(self._op, "*args", "are not the scales of the heads", f"{len(args)} extra arguments", wanted)
        if args and self._variant is None and not fp8:
            wanted = "none (they belong to a variant)"
            fail_type(self._op, "*args", "are not supported", f"{len(args)} extra arguments", wanted)
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
            if x.dtype is not self._kv_dtype:
                fix = "Pass kv_data_type to plan()."
                fail_type(self._op, name, "differs from the planned dtype", x.dtype.name, self._kv_dtype.name, fix)
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
        call: RunCall | None,
        sinks: Any = None,
        args: tuple[Any, ...] = (),
        heads: HeadScales | None = None,
    ) -> Any:
        """Allocate what is not given, and launch.

        `call`: what `run_call` made of the arguments, None for one that must not be repeated as it is; `args`: the variant's values; `heads`: the scales of
        float8_e4m3fn queries.
        """
        plan = self._plan
        assert plan is not None
        variant, values = self._variant, []
        if variant is not None:
            values = variant.check_args(
                self._op, args, q.device, plan.num_qo_heads, plan.num_kv_heads, len(plan.kv_len)
            )
            variant.check_run(self._op, return_lse or lse is not None, sinks is not None)
        shape = (q.shape[0], plan.num_qo_heads, plan.head_dim_vo)
        given_out, given_lse = out is not None, lse is not None
        if out is None:
            out = empty(q, shape, self._out_dtype)
            out_view = view(out)
        else:
            out_view = common.check_out(self._op, "out", out, q, shape, self._out_dtype)
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
        sinks_at = None if sinks is None else sinks_view(self._op, sinks, q, plan.num_qo_heads)
        if q.device >= 0:
            selected, extras = self._options, self._extras
            if sinks_at is not None:
                selected, extras = selected._replace(sinks=True), extras._replace(sinks_ptr=sinks_at.ptr)
            if values:
                assert variant is not None
                extras = extras._replace(user=variant.cuda_values(values))
            if heads is not None:
                extras = heads.addresses(extras)
            pdl = self._pdl_default if enable_pdl is None else common.use_pdl(q.device, enable_pdl)
            bound = common.launchers()[0](
                q.device, current_stream(q), self._plan_ptr, plan, q, k, v, self._indices_ptr, self._kv_layout, out_view, lse_view, self._workspace_ptr,
                sm_scale=sm_scale, logits_soft_cap=soft_cap, v_scale=v_scale, pdl=pdl, options=selected, extras=extras, bind=True,
            )  # fmt: skip
            self._start(
                bound,
                pdl,
                current_stream(q),
                q.ptr,
                k.ptr,
                v.ptr,
                out_view.ptr,
                0 if lse_view is None else lse_view.ptr,
            )
            if call is not None and (return_lse or not given_lse) and not (q.ptr | k.ptr | v.ptr | out_view.ptr) & 15:
                pair = call[0][1]
                inputs = ((0, 0), (1, 0), (2, 0) if pair else (1, v.ptr - k.ptr))
                kind = self._out_dtype
                remember_run(
                    self._calls, call, q, inputs, 2 + pair, shape, kind, bound, given_out, return_lse, given_lse
                )
        else:
            from pyinfer.cpu.attention import run_plan

            host_extras, kept = self._cpu_extras(sinks_at), None
            if variant is not None:
                user, kept = variant.cpu_values(self._op, values)
                host_extras = host_extras._replace(user=user)
            written = out_view
            if heads is not None:
                from pyinfer._fp8_queries import cpu_finish, cpu_output, cpu_queries

                q, written = cpu_queries(q, heads, plan.num_kv_heads), cpu_output(out_view, heads)
            run_plan(
                plan, q, k, v, self._kv_layout, written, lse_view, sm_scale=sm_scale, logits_soft_cap=soft_cap, v_scale=v_scale,
                workspace=self._cpu_workspace(plan.workspace_bytes), extras=host_extras,
            )  # fmt: skip
            del kept  # what `user` points at has lived until here
            if heads is not None:
                cpu_finish(written, out_view, heads, plan.total_rows)
        return (out, lse) if return_lse else out

    def _run(
        self,
        q: TensorView,
        k: TensorView,
        v: TensorView,
        out: Any,
        lse: Any,
        sinks: Any,
        call: RunCall,
        sm_scale: float | None = None,
        args: tuple[Any, ...] = (),
    ) -> Any:
        """`_execute` with the scales taken out of the call's options: (q_scale, k_scale, v_scale, return_lse, enable_pdl, ...).

        sm_scale is the plan's unless given. `args`: the values of the variant's parameters, or the scales of float8_e4m3fn queries.
        """
        (q_scale, k_scale, v_scale, return_lse, enable_pdl, *_), *_ = call[0]
        if sm_scale is None:
            sm_scale = self._sm_scale
        if q_scale is not None:
            sm_scale *= common.scale(self._op, "q_scale", q_scale)
        if k_scale is not None:
            sm_scale *= common.scale(self._op, "k_scale", k_scale)
        factor = common.scale(self._op, "v_scale", v_scale)
        cap = self._soft_cap
        heads, repeated = None, True
        if self._dtype is FLOAT8_E4M3:
            from pyinfer._fp8_queries import NO_HEADS, fixed, split_scales

            heads = NO_HEADS
            if args and self._variant is None:
                assert self._plan is not None
                of_scores, of_output, heads = split_scales(self._op, args, q, self._plan.num_kv_heads)  # type: ignore[arg-type]  # three: `_check_run`
                sm_scale, factor, repeated, args = sm_scale * of_scores, factor * of_output, fixed(args, heads), ()
        return self._execute(
            q, k, v, out, lse, return_lse, sm_scale, cap, factor, enable_pdl, call if repeated else None, sinks, args, heads
        )  # fmt: skip

    # ---- the CPU backend's view of the options
    def _cpu_workspace(self, need: int) -> Any:
        """The caller's workspace as bytes, if there is one."""
        if self._workspace is None or not need:
            return None
        import ctypes

        import numpy as np

        memory = (ctypes.c_char * need).from_address(self._workspace.ptr + -self._workspace.ptr % 16)
        return np.frombuffer(memory, np.uint8)  # type: ignore[call-overload]  # its stubs do not know ctypes arrays

    def _cpu_extras(self, sinks: TensorView | None) -> Any:
        from pyinfer.cpu.attention import NO_EXTRAS as NONE
        from pyinfer.cpu.attention import CpuExtras

        if self._options is common.PLAIN and sinks is None:
            return NONE
        bits = offsets = prefix_len = token_pos = None
        if self._mask is not None:
            bits, offsets = self._mask.host, self._mask.byte_indptr
            if self._use_cuda_graph:  # what a replay reads: the caller's buffers
                bits, offsets = (as_numpy(self._buffers[arg]) for arg in ("custom_mask_buf", "mask_indptr_buf"))
        if self._items is not None:
            prefix_len, token_pos = self._items.prefix_len, self._items.token_pos
        at = None if sinks is None else as_numpy(sinks)
        return CpuExtras(self._options.alibi, self._options.rope, bits, offsets, at, prefix_len, token_pos)
