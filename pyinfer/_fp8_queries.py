"""Prefill with queries in float8_e4m3fn: scales of heads, and the CPU backend, which computes with the values in float32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer import _attention as common
from pyinfer.core.dtypes import FLOAT32
from pyinfer.core.errors import check_dtype, device_name, fail
from pyinfer.core.tensor import TensorView, as_numpy, is_tensor, view

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.jit.attention_options import AttentionExtras


class HeadScales(NamedTuple):
    """What a stored 1 of a head is worth: float32 [num_qo_heads], [num_kv_heads] and [num_kv_heads], where q is; None: 1."""

    q: TensorView | None = None
    k: TensorView | None = None
    v: TensorView | None = None

    def addresses(self, extras: AttentionExtras) -> AttentionExtras:
        """The extras of a launch with these."""
        q, k, v = (0 if x is None else x.ptr for x in self)
        return extras._replace(q_scales_ptr=q, k_scales_ptr=k, v_scales_ptr=v)


NO_HEADS = HeadScales()


def split_scales(
    op: str, scales: tuple[Any, Any, Any], q: TensorView, num_kv_heads: int, names: tuple[str, ...] = ("scale_q", "scale_k", "scale_v")
) -> tuple[float, float, HeadScales]:  # fmt: skip
    """Scales of q, k and v, each None, a number or a tensor of one element, or float32 a head, taken apart.

    Returns
    -------
    float
        The product of the numbers of q and k, a factor of the scores.
    float
        That of v, a factor of the output.
    HeadScales
        Those that heads have of their own.

    Raises
    ------
    ValueError, TypeError
        For a tensor of another shape, type or device.
    """
    factors: list[float] = []
    heads: list[TensorView | None] = []
    for arg, value, count in zip(names, scales, (q.shape[1], num_kv_heads, num_kv_heads), strict=True):
        own = view(value, op, arg) if is_tensor(value) else None
        if own is None or (math.prod(own.shape) == 1 and tuple(own.shape) != (count,)):
            factors.append(common.scale(op, arg, value))
            heads.append(None)
            continue
        check_dtype(op, arg, own, (FLOAT32,))
        if tuple(own.shape) != (count,):
            wanted = f"({count},), one a head, or one element"
            fail(op, arg, "has the wrong shape", f"shape {tuple(own.shape)}", wanted)
        if own.device != q.device:
            fail(op, arg, "is on another device", device_name(own.device), f"{device_name(q.device)} (where q is)")
        if not own.is_contiguous():
            fail(op, arg, "is not contiguous", f"strides {tuple(own.strides)}", "a contiguous tensor")
        factors.append(1.0)
        heads.append(own)
    return factors[0] * factors[1], factors[2], HeadScales(*heads)


def fixed(scales: tuple[Any, ...], heads: HeadScales) -> bool:
    """Whether a launch with these scales can be repeated: no number in it was read from a tensor, whose value may change."""
    return all(own is not None or not is_tensor(scale) for scale, own in zip(scales, heads, strict=True))


# ---- the CPU backend -----------------------------------------------------------------------------------------------------------
def cpu_queries(q: TensorView, heads: HeadScales, num_kv_heads: int) -> TensorView:
    """The queries in float32, with the scales of their own heads and of the keys' heads."""
    import numpy as np

    values = as_numpy(q).astype(np.float32)
    if heads.q is not None:
        values *= as_numpy(heads.q)[:, None]
    if heads.k is not None:
        values *= _of_queries(heads.k, q.shape[1] // num_kv_heads)[:, None]
    return view(values)


def cpu_output(out: TensorView, heads: HeadScales) -> TensorView:
    """Where the backend writes: the output, or where values have scales of their own float32 for `cpu_finish`."""
    import numpy as np

    return out if heads.v is None else view(np.zeros(tuple(out.shape), np.float32))


def cpu_finish(written: TensorView, out: TensorView, heads: HeadScales, rows: int) -> None:
    """Scale what `cpu_output` gave, of which the first `rows` count, into the output."""
    if heads.v is not None:
        scale = _of_queries(heads.v, out.shape[1] // heads.v.shape[0])
        as_numpy(out)[:rows] = as_numpy(written)[:rows] * scale[:, None]


def _of_queries(scales: TensorView, group: int) -> np.ndarray:
    """A scale for each query head from those of kv heads."""
    return as_numpy(scales).repeat(group)
