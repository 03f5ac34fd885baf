"""Merging attention states in Triton."""

from __future__ import annotations

from typing import Any

from pyinfer.core.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, INT32, INT64, UINT8
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_shape,
)
from pyinfer.core.tensor import TensorView
from pyinfer.triton._launch import kernels, next_power_of_2, on_device, torch_view, warps

__all__ = ["merge_state", "merge_state_in_place", "merge_states", "variable_length_merge_states"]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)


def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any) -> tuple[Any, Any]:
    """`pyinfer.merge_state` in Triton."""
    op = "triton.cascade.merge_state"
    module = kernels(op)
    a, b = _pair(op, v_a, s_a, v_b, s_b, ("v_a", "s_a", "v_b", "s_b"))
    v, s = a[0].obj.new_empty(tuple(a[0].shape)), a[1].obj.new_empty(tuple(a[1].shape))
    _merge(module, op, a, b, (torch_view(op, "v", v), torch_view(op, "s", s)), None)
    return v, s


def merge_state_in_place(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None) -> None:
    """`pyinfer.merge_state_in_place` in Triton."""
    op = "triton.cascade.merge_state_in_place"
    module = kernels(op)
    a, b = _pair(op, v, s, v_other, s_other, ("v", "s", "v_other", "s_other"))
    m = None
    if mask is not None:
        m = torch_view(op, "mask", mask)
        check_dtype(op, "mask", m, (BOOL, UINT8))
        check_shape(op, "mask", m, (a[0].shape[0],))
        check_same_device(op, {"v": a[0], "mask": m})
    _merge(module, op, a, b, a, m)


def merge_states(v: Any, s: Any) -> tuple[Any, Any]:
    """`pyinfer.merge_states` in Triton: v [tokens, num_states, heads, head_dim], s [tokens, num_states, heads]."""
    op = "triton.cascade.merge_states"
    module = kernels(op)
    vv, sv = _state(op, v, s, "v", "s", 4)
    n, states, heads, dim = vv.shape
    strides = (*vv.strides[:3], *sv.strides[:3])
    return _many(module, vv, sv, None, n, heads, dim, strides, states)


def variable_length_merge_states(v: Any, s: Any, indptr: Any) -> tuple[Any, Any]:
    """Merge each token's own number of states.

    Parameters
    ----------
    v
        [states, heads, head_dim], float16, bfloat16 or float32: the states of all tokens, one token after another.
    s
        float32 [states, heads], base-2 log-sum-exps.
    indptr
        int32 or int64 [tokens + 1]: token t has states indptr[t] .. indptr[t + 1] - 1. None of its own: 0 and -inf.

    Returns
    -------
    v, s
        [tokens, heads, head_dim] and float32 [tokens, heads].
    """
    op = "triton.cascade.variable_length_merge_states"
    module = kernels(op)
    vv, sv = _state(op, v, s, "v", "s", 3)
    p = torch_view(op, "indptr", indptr)
    check_dtype(op, "indptr", p, (INT32, INT64))
    check_ndim(op, "indptr", p, 1)
    check_last_dim_contiguous(op, "indptr", p)
    check_same_device(op, {"v": vv, "indptr": p})
    _, heads, dim = vv.shape
    strides = (0, vv.strides[0], vv.strides[1], 0, sv.strides[0], sv.strides[1])
    return _many(module, vv, sv, p, max(p.shape[0] - 1, 0), heads, dim, strides, 0)


def _state(op: str, v: Any, s: Any, v_arg: str, s_arg: str, ndim: int) -> tuple[TensorView, TensorView]:
    vv, sv = torch_view(op, v_arg, v), torch_view(op, s_arg, s)
    check_ndim(op, v_arg, vv, ndim)
    check_dtype(op, v_arg, vv, _DTYPES)
    check_dtype(op, s_arg, sv, (FLOAT32,))
    check_shape(op, s_arg, sv, tuple(vv.shape[:-1]))
    check_last_dim_contiguous(op, v_arg, vv)
    check_same_device(op, {v_arg: vv, s_arg: sv})
    return vv, sv


def _pair(op: str, v_a: Any, s_a: Any, v_b: Any, s_b: Any, names: tuple[str, str, str, str]) -> Any:
    a, b = _state(op, v_a, s_a, *names[:2], 3), _state(op, v_b, s_b, *names[2:], 3)
    check_shape(op, names[2], b[0], tuple(a[0].shape))
    check_same_dtype(op, names[2], b[0], names[0], a[0])
    check_same_device(op, {names[0]: a[0], names[2]: b[0]})
    return a, b


def _merge(module: Any, op: str, a: Any, b: Any, out: Any, mask: TensorView | None) -> None:
    n, heads, dim = a[0].shape
    if not (n and heads and dim):
        return
    block = next_power_of_2(dim)
    tensors = [x.obj for x in (*a, *b, *out)]
    strides = [stride for x in (*a, *b, *out) for stride in x.strides[:2]]
    with on_device(a[0]):
        module.merge_pair[(n, heads)](
            *tensors, a[1].obj if mask is None else mask.obj, *strides, 0 if mask is None else mask.strides[0], dim,
            HAS_MASK=mask is not None, BLOCK=block, num_warps=max(1, warps(block) // 4),
        )  # fmt: skip


def _many(
    module: Any,
    v: TensorView,
    s: TensorView,
    indptr: TensorView | None,
    n: int,
    heads: int,
    dim: int,
    strides: tuple[int, ...],
    states: int,
) -> tuple[Any, Any]:
    v_out, s_out = v.obj.new_empty((n, heads, dim)), s.obj.new_empty((n, heads))
    if n and heads and dim:
        block = next_power_of_2(dim)
        with on_device(v):
            module.merge_many[(n, heads)](
                v.obj, s.obj, s.obj if indptr is None else indptr.obj, v_out, s_out, *strides, heads * dim, dim, heads, 1, states, dim,
                HAS_INDPTR=indptr is not None, BLOCK=block, num_warps=max(1, warps(block) // 4),
            )  # fmt: skip
    return v_out, s_out
