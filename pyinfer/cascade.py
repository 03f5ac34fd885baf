"""Merging attention states: the output and log-sum-exp of attention over parts of the keys, put together into those over all of them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer._cascade_wrappers import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
)
from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, UINT8, DType
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from pyinfer.core.rows import vector_length
from pyinfer.core.tensor import TensorView, current_stream, empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_two_calls, _in_place_calls, _many_calls = Calls(), Calls(), Calls()


def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any) -> tuple[Any, Any]:
    """Merge two partial attention states.

    With m = max(s_a, s_b) and w_x = 2^(s_x - m): v = (w_a v_a + w_b v_b) / (w_a + w_b), s = m + log2(w_a + w_b).

    Parameters
    ----------
    v_a, v_b
        [tokens, num_heads, head_dim], float16, bfloat16 or float32; outputs over disjoint sets of keys. Any strides but a last one of 1.
    s_a, s_b
        float32 [tokens, num_heads]: their base-2 log-sum-exps.

    Returns
    -------
    v, s
        As v_a and s_a. Where both states are empty (-inf): 0 and -inf; an empty state's v is not looked at.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    """
    done = _two_calls.run((), (v_a, s_a, v_b, s_b))
    if done is not MISS:
        return done
    a = _states("merge_state", v_a, s_a, "v_a", "s_a", 3)
    b = _states("merge_state", v_b, s_b, "v_b", "s_b", 3)
    _check_pair("merge_state", a, b, ("v_a", "s_a", "v_b", "s_b"))
    v_out, s_out = empty(a[0], a[0].shape), empty(a[0], a[1].shape, FLOAT32)
    launch = _merge(a, b, (view(v_out), view(s_out)), None)
    if launch is not None:
        outputs = ((tuple(a[0].shape), a[0].dtype), (tuple(a[1].shape), FLOAT32))
        _two_calls.launch((), (v_a, s_a, v_b, s_b), a[0], *launch.start(6), launch.pdl, launch.aligned(6), outputs)
    return v_out, s_out


def merge_state_in_place(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None) -> None:
    """Merge another state into (v, s), overwriting them.

    Parameters
    ----------
    v, v_other, s, s_other
        As in `merge_state`.
    mask
        bool or uint8 [tokens]: tokens with 0 are left as they are. None: all are merged.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    """
    op = "merge_state_in_place"
    tensors = (v, s, v_other, s_other) if mask is None else (v, s, v_other, s_other, mask)
    if _in_place_calls.run((), tensors) is not MISS:
        return
    a = _states(op, v, s, "v", "s", 3)
    b = _states(op, v_other, s_other, "v_other", "s_other", 3)
    _check_pair(op, a, b, ("v", "s", "v_other", "s_other"))
    m = None
    if mask is not None:
        m = view(mask, op, "mask")
        check_dtype(op, "mask", m, (BOOL, UINT8))
        check_shape(op, "mask", m, (a[0].shape[0],))
        check_last_dim_contiguous(op, "mask", m)
        check_same_device(op, {"v": a[0], "mask": m})
    launch = _merge(a, b, a, m)
    if launch is not None:
        recipe = ((0, 0), (1, 0), (2, 0), (3, 0), (0, 0), (1, 0), *(((4, 0),) if m is not None else ()))
        _in_place_calls.launch(
            (), tensors, a[0], *launch.start(len(recipe)), launch.pdl, launch.aligned(6), recipe=recipe, wants=6
        )


def merge_states(v: Any, s: Any) -> tuple[Any, Any]:
    """Merge any number of partial attention states.

    Parameters
    ----------
    v
        [tokens, num_states, num_heads, head_dim], float16, bfloat16 or float32. Any strides but a last one of 1.
    s
        float32 [tokens, num_states, num_heads], base-2 log-sum-exps.

    Returns
    -------
    v, s
        [tokens, num_heads, head_dim] and float32 [tokens, num_heads], states added in their order. No state, or none with a key: 0 and -inf.

    Raises
    ------
    TypeError, ValueError
        For dtypes, shapes or devices that do not fit.
    """
    done = _many_calls.run((), (v, s))
    if done is not MISS:
        return done
    vv, sv = _states("merge_states", v, s, "v", "s", 4)
    n, _, heads, dim = vv.shape
    v_out, s_out = empty(vv, (n, heads, dim)), empty(vv, (n, heads), FLOAT32)
    launch = _merge_many(vv, sv, view(v_out), view(s_out))
    if launch is not None:
        outputs = (((n, heads, dim), vv.dtype), ((n, heads), FLOAT32))
        _many_calls.launch((), (v, s), vv, *launch.start(4), launch.pdl, launch.aligned(4), outputs)
    return v_out, s_out


def merge_state_views(vv: TensorView, sv: TensorView, out: TensorView, lse: TensorView) -> None:
    """`merge_states` of checked views into `out` and `lse`."""
    launch = _merge_many(vv, sv, out, lse)
    if launch is not None:
        launch.kernel(current_stream(vv), launch.grid, launch.values, launch.pdl)


class _Launch(NamedTuple):
    """What is left to launch on a GPU."""

    kernel: Kernel
    grid: int
    values: tuple[Any, ...]
    pdl: bool

    def start(self, pointers: int) -> tuple[Kernel, int, tuple[Any, ...], int]:
        """Kernel, grid, values, and how many of these are pointers, as `Calls.launch` takes them."""
        return self.kernel, self.grid, self.values, pointers

    def aligned(self, pointers: int) -> bool:
        """Whether the first pointers are multiples of 16 bytes, as those of remembered calls are."""
        return not any(p & 15 for p in self.values[:pointers])


def _merge_many(vv: TensorView, sv: TensorView, out: TensorView, lse: TensorView) -> _Launch | None:
    """Merge on the CPU, or say what to launch; None if nothing is left."""
    n, states, heads, dim = vv.shape
    rows = n * heads
    if not rows:
        return None
    if vv.device < 0:
        from pyinfer.cpu import cascade as cpu

        cpu.merge_states(vv, sv, out, lse)
        return None
    size = vv.dtype.itemsize
    bits = dim | vv.strides[0] | vv.strides[1] | vv.strides[2] | out.strides[0] | out.strides[1]
    vec = vector_length(size, vv.ptr | out.ptr | bits * size)
    kernel, per_block, pdl = _merge_states_kernel(vv.device, vv.dtype, dim, vec)
    values = (
        vv.ptr,
        sv.ptr,
        out.ptr,
        lse.ptr,
        *vv.strides[:3],
        *sv.strides,
        *out.strides[:2],
        *lse.strides,
        rows,
        heads,
        dim,
        states,
    )
    return _Launch(kernel, -(-rows // per_block), values, pdl)


_State = tuple[TensorView, TensorView]


def _states(op: str, v: Any, s: Any, v_arg: str, s_arg: str, ndim: int) -> _State:
    vv, sv = view(v, op, v_arg), view(s, op, s_arg)
    check_ndim(op, v_arg, vv, ndim)
    check_dtype(op, v_arg, vv, _DTYPES)
    check_last_dim_contiguous(op, v_arg, vv)
    check_dtype(op, s_arg, sv, (FLOAT32,))
    check_shape(op, s_arg, sv, tuple(vv.shape[:-1]))
    if sv.device != vv.device:
        check_same_device(op, {v_arg: vv, s_arg: sv})
    return vv, sv


def _check_pair(op: str, a: _State, b: _State, args: tuple[str, str, str, str]) -> None:
    check_shape(op, args[2], b[0], tuple(a[0].shape))
    check_same_dtype(op, args[2], b[0], args[0], a[0])
    if b[0].device != a[0].device:
        check_same_device(op, {args[0]: a[0], args[2]: b[0]})


def _merge(a: _State, b: _State, out: _State, mask: TensorView | None) -> _Launch | None:
    """Merge on the CPU, or say what to launch; None if nothing is left."""
    v_a = a[0]
    n, heads, dim = v_a.shape
    rows = n * heads
    if not rows:
        return None
    if v_a.device < 0:
        from pyinfer.cpu import cascade as cpu

        cpu.merge_state(*a, *b, *out, mask)
        return None
    size = v_a.dtype.itemsize
    bits = dim
    for x, _ in (a, b, out):
        bits |= x.strides[0] | x.strides[1]
    vec = vector_length(size, v_a.ptr | b[0].ptr | out[0].ptr | bits * size)
    kernel, per_block, pdl = _merge_state_kernel(v_a.device, v_a.dtype, dim, vec)
    strides = [stride for x, s in (a, b, out) for stride in (*x.strides[:2], *s.strides)]
    values = (
        v_a.ptr,
        a[1].ptr,
        b[0].ptr,
        b[1].ptr,
        out[0].ptr,
        out[1].ptr,
        mask.ptr if mask is not None else 0,
        *strides,
        rows,
        heads,
        dim,
    )
    return _Launch(kernel, -(-rows // per_block), values, pdl)


@functools.cache
def _merge_state_kernel(device: int, dtype: DType, head_dim: int, vec: int) -> tuple[Kernel, int, bool]:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.cascade import THREADS, gen_merge_state, row_lanes

    return (
        gen_merge_state(dtype, head_dim, vec).build_and_load(device),
        THREADS // row_lanes(head_dim, vec),
        pdl_supported(device),
    )


@functools.cache
def _merge_states_kernel(device: int, dtype: DType, head_dim: int, vec: int) -> tuple[Kernel, int, bool]:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.cascade import THREADS, gen_merge_states, row_lanes

    return (
        gen_merge_states(dtype, head_dim, vec).build_and_load(device),
        THREADS // row_lanes(head_dim, vec),
        pdl_supported(device),
    )


attach(__name__)  # what torch.compile traces in the place of these functions
