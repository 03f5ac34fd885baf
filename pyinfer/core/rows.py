"""Tensors seen as rows: every axis but the last collapsed into at most two strides."""

from __future__ import annotations

from pyinfer.core.errors import fail
from pyinfer.core.tensor import TensorView


def row_layout(op: str, arg: str, x: TensorView, inner: int = 0) -> tuple[int, int, int, int]:
    """How the rows (last axis) of `x` lie: row r begins at element (r // inner) * outer_stride + (r % inner) * inner_stride.

    Parameters
    ----------
    op, arg
        Names for the error message.
    x
        A tensor of one or more axes; the last one must be contiguous (size 0 and 1 pass).
    inner
        If not 0, the grouping another tensor of the same shape already fixed: kernels index both with one (r // inner, r % inner).

    Returns
    -------
    tuple of int
        (rows, inner, outer_stride, inner_stride), strides in elements, inner >= 1. A tensor without elements has 0 rows.

    Raises
    ------
    ValueError
        If the last axis is not contiguous, or the others do not collapse into two strides.
    """
    shape, strides = x.shape, x.strides
    n = len(shape)
    if 0 in shape:
        return 0, inner or 1, 0, 0
    if n and shape[-1] > 1 and strides[-1] != 1:
        fail(
            op,
            arg,
            "is not contiguous in its last axis",
            f"strides {tuple(strides)} for shape {tuple(shape)}",
            "last stride 1",
            "Call .contiguous() on it.",
        )
    if n == 2:
        rows, stride = shape[0], strides[0]
        if not inner or inner == rows:
            return rows, rows, 0, stride
        return rows, inner, stride * inner, stride
    if n == 1:
        return 1, inner or 1, 0, 0
    # Merge axes from the right: `levels` holds (size, stride) pairs, innermost first.
    levels: list[list[int]] = []
    rows = 1
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        rows *= size
        if size == 1:
            continue
        if levels and stride == levels[-1][0] * levels[-1][1]:
            levels[-1][0] *= size
        else:
            levels.append([size, stride])
    if not levels:
        return 1, inner or 1, 0, 0
    if len(levels) == 1:
        size, stride = levels[0]
        if not inner or inner == rows:
            return rows, rows, 0, stride
        return rows, inner, stride * inner, stride
    if len(levels) == 2 and (not inner or inner == levels[0][0]):
        return rows, levels[0][0], levels[1][1], levels[0][1]
    fail(
        op,
        arg,
        "has too many independent strides",
        f"strides {tuple(strides)} for shape {tuple(shape)}",
        "leading axes that collapse into two",
        "Call .contiguous() on it.",
    )


def common_row_layout(
    op: str, first_arg: str, first: TensorView, second_arg: str, second: TensorView
) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """`row_layout` of two tensors of equal leading shape, under one grouping."""
    a = row_layout(op, first_arg, first)
    b = row_layout(op, second_arg, second)
    if a[1] == b[1]:
        return a, b
    if a[1] == a[0]:  # the first is one run of rows: it splits anywhere
        return row_layout(op, first_arg, first, b[1]), b
    return a, row_layout(op, second_arg, second, a[1])


def vector_length(itemsize: int, bits: int) -> int:
    """Elements one access may cover: as many as 16 bytes and the common alignment allow, at least 1.

    Parameters
    ----------
    itemsize
        Bytes per element.
    bits
        Everything that must be a multiple of the access, or-ed together: pointers, strides and row lengths, all in bytes.
    """
    aligned = bits & -bits
    return 16 // itemsize if aligned >= 16 or not aligned else (aligned // itemsize or 1)
