"""What the levels of a cascade leave, and how it becomes one result: states of every row, merged in one launch.

On a GPU the level that most requests share is cut into many splits of few tiles. Its own launch would merge a tile in one block while all others are
idle; it leaves its splits in the workspace instead, and the kernel that merges the levels reads them (`cuda_src/cascade/merge_levels.cu.jinja`).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer import _attention as common
from pyinfer.core.dtypes import FLOAT32, DType
from pyinfer.core.tensor import current_stream, empty, view
from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.core.tensor import TensorView
    from pyinfer.schedulers.plan import AttentionPlan

_DECODE_ROWS = 16  # packed rows of a tile of the decode kernels, which merge their splits by themselves


class SharedLevel(BatchPrefillWithPagedKVCacheWrapper):
    """Level 0 of several: a batch prefill that leaves its splits in the workspace, where they are until something else runs in it."""

    _extra_slots = 4  # all blocks merge, so splits cost little: enough of them for equal shares

    def _upload(self, plan: AttentionPlan, has_kernel: bool = False) -> None:
        super()._upload(plan, has_kernel)
        if plan.tile_q > _DECODE_ROWS:
            self._extras = self._extras._replace(merge=False)
        assert self._ref is not None
        _kernel(self._ref.device, self._dtype, plan.head_dim_vo, True)  # compiled here, so that run() only launches

    def merge(self, states: States, out: TensorView, lse: TensorView | None, v_scale: float, pdl: bool) -> None:
        """Merge this level's splits with what all levels left in `states`, on the GPU; lse None: not wanted."""
        plan = self._plan
        assert plan is not None
        rows, heads, dim = out.shape
        if not rows:
            return
        size = out.dtype.itemsize
        aligned = (out.ptr | (out.strides[0] | out.strides[1]) * size) % (4 * size) == 0
        kernel = _kernel(out.device, out.dtype, dim, aligned)
        at, splits = self._plan_ptr, (0, 0)
        if not self._extras.merge:
            splits = (self._workspace_ptr, self._workspace_ptr + plan.partial_lse_offset)
        v, s = states.views
        kernel(
            current_stream(out),
            plan.max_work * plan.num_kv_heads,
            (
                at, at + 4 * plan.offsets.work, at + 4 * plan.offsets.qo_indptr, *splits, v.ptr, s.ptr, out.ptr,
                0 if lse is None else lse.ptr, v.strides[0], s.strides[0], *out.strides[:2], *(lse.strides if lse is not None else (0, 0)),
                v.shape[0], plan.num_kv_heads, heads // plan.num_kv_heads, plan.tile_q, v_scale,
            ),
            pdl,
        )  # fmt: skip


@functools.cache
def _kernel(device: int, dtype: DType, head_dim: int, aligned: bool) -> Kernel:
    from pyinfer.jit.cascade import gen_merge_levels

    return gen_merge_levels(dtype, head_dim, aligned).build_and_load(device)


class States:
    """Room for the outputs and log-sum-exps of several levels, [levels, rows, heads, dim] and [levels, rows, heads], and their merge in one launch."""

    def __init__(self, levels: int, q: TensorView, head_dim_vo: int) -> None:
        rows, heads, _ = q.shape
        self.q = q
        self.v = empty(q, (levels, rows, heads, head_dim_vo))
        self.s = empty(q, (levels, rows, heads), FLOAT32)

    @property
    def views(self) -> tuple[TensorView, TensorView]:
        """Views of both."""
        return view(self.v), view(self.s)

    def parts(self) -> list[tuple[Any, Any]]:
        """Output and log-sum-exp of each level."""
        if self.q.framework == "torch":
            return list(zip(self.v.unbind(0), self.s.unbind(0), strict=True))
        return [(self.v[i], self.s[i]) for i in range(len(self.v))]

    def merge(
        self, op: str, out: Any, lse: Any, return_lse: bool, shared: SharedLevel | None = None, v_scale: float = 1.0, pdl: bool = False
    ) -> Any:  # fmt: skip
        """The merged output (and LSE), in `out` and `lse` if given. `shared`: level 0, if it may have left splits; v_scale is theirs."""
        v, s = self.views
        levels, rows, heads, dim = v.shape
        out_view = self._result(op, "out", out, (rows, heads, dim), v.dtype)
        lse_view = self._result(op, "lse", lse, (rows, heads), FLOAT32) if return_lse or lse is not None else None
        if shared is not None and v.device >= 0:
            shared.merge(self, out_view, lse_view, v_scale, pdl)
        else:
            from pyinfer.cascade import merge_state_views

            lse_view = lse_view or self._result(op, "lse", None, (rows, heads), FLOAT32)
            for x in (v, s):  # rows first: a view, no copy
                x.shape = (x.shape[1], levels, *x.shape[2:])
                x.strides = (x.strides[1], x.strides[0], *x.strides[2:])
            merge_state_views(v, s, out_view, lse_view)
        if not return_lse:
            return out_view.obj
        assert lse_view is not None
        return out_view.obj, lse_view.obj

    def _result(self, op: str, arg: str, given: Any, shape: tuple[int, ...], dtype: DType) -> TensorView:
        if given is None:
            return view(empty(self.q, shape, dtype))
        return common.check_out(op, arg, given, self.q, shape, dtype)
