"""Matrix products against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, assert_close

SHAPES = (
    (1, 8, 1),
    (1, 576, 960),
    (2, 1536, 37),
    (3, 64, 5),
    (7, 264, 130),
    (8, 4104, 9),
    (9, 2048, 33),
    (20, 136, 70),
)


def draw(rng, b, dtype, rows, depth, columns, pad=0):
    """x, weight, bias, and their exact values; `pad` columns of NaN behind each row."""
    made = []
    for shape in ((rows, depth), (columns, depth)):
        values = np.full((shape[0], shape[1] + pad), np.nan)
        values[:, :depth] = rng.standard_normal(shape)
        made.append(b.array(values, dtype)[:, :depth])
    bias = b.array(rng.standard_normal(columns), dtype)
    return *made, bias, *(b.float64(t) for t in (*made, bias))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_tinygemm(rng, backend, device, dtype, shape):
    rows, depth, columns = shape
    pad = 8 * int(rng.integers(0, 2))
    x, w, bias, x64, w64, bias64 = draw(rng, backend, dtype, rows, depth, columns, pad)
    # A sum of n products in float32: its error grows like sqrt(n) roundings of the running sum.
    slack = 4 * EPSILON["float32"] * depth**0.5 * (np.abs(x64) @ np.abs(w64).T).max()
    for out_dtype in (dtype, "float32"):
        for with_bias in (False, True):
            out = backend.full((rows, columns + pad), np.nan, out_dtype)
            target = out[:, :columns]
            for _ in range(2):  # the second call is a remembered one
                assert pyinfer.tinygemm_bf16(x, w, target, bias if with_bias else None, use_pdl=with_bias) is None
            want = x64 @ w64.T + (bias64 if with_bias else 0)
            tolerance = {"rtol": 1.01 * EPSILON[out_dtype], "atol": slack}
            assert_close(backend.float64(target), want, **tolerance, name=f"{out_dtype}, bias {with_bias}")
            assert np.isnan(backend.float64(out)[:, columns:]).all()


def test_rows_do_not_depend_on_each_other(rng, backend_arrays):
    """NaN and infinity stay in their row, and a row's bits are the same in any company of its size class."""
    b = backend_arrays
    x, w, *_ = draw(rng, b, "bfloat16", 8, 576, 40)
    out, other = b.full((8, 40), 0, "bfloat16"), b.full((8, 40), 0, "bfloat16")
    pyinfer.tinygemm_bf16(x, w, out)
    x[1:] = float("nan")
    pyinfer.tinygemm_bf16(x, w, other)
    assert np.isnan(b.float64(other)[1:]).all()
    assert (b.float64(other)[0] == b.float64(out)[0]).all()


def test_nothing_to_do(backend_arrays):
    b = backend_arrays
    for rows, columns in ((0, 5), (5, 0)):
        pyinfer.tinygemm_bf16(*(b.full(s, 1, "float16") for s in ((rows, 16), (columns, 16), (rows, columns))))


@pytest.mark.parametrize(
    ("shapes", "dtypes", "error", "match"),
    [
        (((2, 16), (3, 16), (2, 3)), ("float64",) * 3, TypeError, "input has the wrong dtype: got float64"),
        (
            ((2, 16), (3, 16), (2, 3)),
            ("float16", "bfloat16", "float16"),
            TypeError,
            "weight differs in dtype from input",
        ),
        (((2, 16), (3, 16), (2, 3)), ("bfloat16", "bfloat16", "float16"), TypeError, "out has the wrong dtype"),
        (((2, 16), (3, 8), (2, 3)), ("float16",) * 3, ValueError, "weight has the wrong shape"),
        (((2, 16), (3, 16), (3, 2)), ("float16",) * 3, ValueError, "out has the wrong shape"),
        (((2, 1, 16), (3, 16), (2, 3)), ("float16",) * 3, ValueError, "input has the wrong number of axes"),
        (((2, 12), (3, 12), (2, 3)), ("float16",) * 3, ValueError, "input has a last axis of the wrong length: got 12"),
        (((2, 16), (3, 16), (2, 3), (4,)), ("float16",) * 4, ValueError, "bias has the wrong shape"),
    ],
    ids=lambda x: x if isinstance(x, str) and " " in x else "",
)
def test_refusals(backend_arrays, shapes, dtypes, error, match):
    tensors = [backend_arrays.full(s, 1, d) for s, d in zip(shapes, dtypes, strict=True)]
    with pytest.raises(error, match=f"tinygemm_bf16: {match}"):
        pyinfer.tinygemm_bf16(*tensors)


def test_layout_is_refused(backend_arrays):
    b = backend_arrays
    x, w, out = (b.full(s, 1, "float16") for s in ((2, 32), (3, 16), (2, 3)))
    with pytest.raises(ValueError, match=r"input is not contiguous along its last axis: got strides \(32, 2\)"):
        pyinfer.tinygemm_bf16(x[:, ::2], w, out)
    with pytest.raises(ValueError, match=r"input is not aligned: got address 2 modulo 16, rows 64 bytes apart"):
        pyinfer.tinygemm_bf16(x[:, 1:17], w, out)
    odd = b.full((2, 20), 1, "float16")
    with pytest.raises(
        ValueError, match=r"rows 40 bytes apart, wanted multiples of 16 bytes. Pass input.contiguous\(\)"
    ):
        pyinfer.tinygemm_bf16(odd[:, :16], w, out)
