"""rmsnorm, fused_add_rmsnorm and their Gemma forms against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits
from tests.reference import norm as reference

DTYPES = ["float16", "bfloat16", "float32"]
# One element; odd; even but no multiple of 8; each shape of row kernel: part of a warp, a warp, a block, a block that reads twice; SmolLM2 and Llama sizes.
HIDDEN = [1, 7, 64, 111, 128, 500, 576, 1030, 2048, 4096, 8192, 65536]
# float32 results carry the error of the sum and of the square root besides the rounding: 1e-6 relative.
RTOL = {"float16": 1.1 * EPSILON["float16"], "bfloat16": 1.05 * EPSILON["bfloat16"], "float32": 2e-6}


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape) * rng.uniform(0.1, 4.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_rmsnorm(backend_arrays: Backend, rng: np.random.Generator, hidden: int, dtype: str) -> None:
    b = backend_arrays
    rows = int(rng.integers(1, 12))
    x, w = b.array(draw(rng, rows, hidden), dtype), b.array(draw(rng, hidden), dtype)
    before = b.numpy(x).copy()
    got = pyinfer.rmsnorm(x, w)
    assert_close(b.float64(got), reference.rmsnorm(b.float64(x), b.float64(w)), rtol=RTOL[dtype])
    assert_same_bits(b.numpy(x), before, "input")
    out = b.full((rows, hidden), np.nan, dtype)
    assert pyinfer.rmsnorm(x, w, out=out) is out
    assert_same_bits(b.numpy(out), b.numpy(got), "out=")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_fused_add_rmsnorm(backend_arrays: Backend, rng: np.random.Generator, hidden: int, dtype: str) -> None:
    b = backend_arrays
    rows = int(rng.integers(1, 12))
    x, r = b.array(draw(rng, rows, hidden), dtype), b.array(draw(rng, rows, hidden) * 8, dtype)
    w = b.array(draw(rng, hidden), dtype)
    want, total = reference.fused_add_rmsnorm(b.float64(x), b.float64(r), b.float64(w))
    rounded = b.numpy(b.array(total.astype(np.float32), dtype))
    assert pyinfer.fused_add_rmsnorm(x, r, w) is None
    assert_same_bits(b.numpy(r), rounded, "residual")
    assert_close(b.float64(x), want, rtol=RTOL[dtype])


def test_fused_add_sum_is_float32(backend_arrays: Backend) -> None:
    """One row built so that rounding first changes the result by more than a unit in the last place."""
    b = backend_arrays
    residual = np.array([[256.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    x = np.array([[0.875, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])  # 256.875 is 256 or 258 in bfloat16
    xs, rs, w = b.array(x, "bfloat16"), b.array(residual, "bfloat16"), b.full((8,), 1.0, "bfloat16")
    pyinfer.fused_add_rmsnorm(xs, rs, w)
    want, _ = reference.fused_add_rmsnorm(x, residual, np.ones(8))
    late = reference.rmsnorm(np.array([[256.0, 1.0, 0, 0, 0, 0, 0, 0]]), np.ones(8))
    got = b.float64(xs)[0, 1]
    assert got == b.float64(b.array(want, "bfloat16"))[0, 1] != b.float64(b.array(late, "bfloat16"))[0, 1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("hidden", [111, 576, 4096])
def test_gemma(backend_arrays: Backend, rng: np.random.Generator, hidden: int, dtype: str) -> None:
    b = backend_arrays
    x, r, w = (b.array(draw(rng, *s), dtype) for s in ((5, hidden), (5, hidden), (hidden,)))
    plus_one = b.float64(w) + 1.0
    assert_close(b.float64(pyinfer.gemma_rmsnorm(x, w)), reference.rmsnorm(b.float64(x), plus_one), rtol=RTOL[dtype])
    want, _ = reference.fused_add_rmsnorm(b.float64(x), b.float64(r), plus_one)
    pyinfer.gemma_fused_add_rmsnorm(x, r, w)
    assert_close(b.float64(x), want, rtol=RTOL[dtype])


@pytest.mark.parametrize("hidden,pad", [(128, 128), (111, 3), (576, 8), (576, 1), (4096, 4)])
def test_strided_rows(backend: Backend, rng: np.random.Generator, hidden: int, pad: int) -> None:
    """Rows of a wider tensor, at offsets that are no multiple of 16 bytes too; the columns between stay as they were."""
    b, dtype = backend, "float16" if backend.framework != "torch" else "bfloat16"
    wide = b.array(draw(rng, 6, hidden + pad), dtype)
    residual = b.array(draw(rng, 6, 2 * hidden), dtype)
    w = b.array(draw(rng, hidden), dtype)
    x, r = wide[:, pad // 2 : pad // 2 + hidden], residual[:, hidden:]
    assert_close(b.float64(pyinfer.rmsnorm(x, w)), reference.rmsnorm(b.float64(x), b.float64(w)), rtol=RTOL[dtype])
    out = b.full((6, hidden + 5), np.nan, dtype)
    pyinfer.rmsnorm(x, w, out=out[:, 2 : 2 + hidden])
    host = b.float64(out)
    assert np.isnan(host[:, :2]).all() and np.isnan(host[:, 2 + hidden :]).all()
    assert_close(host[:, 2 : 2 + hidden], reference.rmsnorm(b.float64(x), b.float64(w)), rtol=RTOL[dtype])
    outside = np.ones(hidden + pad, bool)
    outside[pad // 2 : pad // 2 + hidden] = False
    before, left = b.numpy(wide)[:, outside].copy(), b.numpy(residual)[:, :hidden].copy()
    want, _ = reference.fused_add_rmsnorm(b.float64(x), b.float64(r), b.float64(w))
    pyinfer.fused_add_rmsnorm(x, r, w)
    assert_close(b.float64(x), want, rtol=RTOL[dtype])
    assert_same_bits(b.numpy(wide)[:, outside], before, "columns outside the view")
    assert_same_bits(b.numpy(residual)[:, :hidden], left, "residual outside the view")


@pytest.mark.parametrize("heads,hidden", [(5, 128), (3, 64), (1, 111), (4, 1)])
def test_three_axes(backend_arrays: Backend, rng: np.random.Generator, heads: int, hidden: int) -> None:
    """Norm of q and k: the heads of a fused qkv tensor, whose rows have two strides."""
    b = backend_arrays
    qkv = b.array(draw(rng, 7, heads + 2, hidden), "bfloat16")
    w = b.array(draw(rng, hidden), "bfloat16")
    x = qkv[:, 1 : 1 + heads]
    want = reference.rmsnorm(b.float64(x), b.float64(w))
    got = pyinfer.rmsnorm(x, w)
    assert tuple(got.shape) == (7, heads, hidden)
    assert_close(b.float64(got), want, rtol=RTOL["bfloat16"])
    permuted = b.full((heads, 7, hidden), np.nan, "bfloat16").swapaxes(0, 1)
    pyinfer.rmsnorm(x, w, out=permuted)
    assert_close(b.float64(permuted), want, rtol=RTOL["bfloat16"])
    rest = b.numpy(qkv)[:, [0, heads + 1]].copy()
    pyinfer.rmsnorm(x, w, out=x)  # in place
    assert_close(b.float64(x), want, rtol=RTOL["bfloat16"])
    assert_same_bits(b.numpy(qkv)[:, [0, heads + 1]], rest, "other heads")


def test_many_rows(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """More rows than a grid dimension of 65535, and several blocks per thread range on the CPU."""
    b = backend_arrays
    x, w = b.array(draw(rng, 70001, 16), "float16"), b.array(draw(rng, 16), "float16")
    assert_close(b.float64(pyinfer.rmsnorm(x, w)), reference.rmsnorm(b.float64(x), b.float64(w)), rtol=RTOL["float16"])


def test_rows_do_not_influence_each_other(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """A NaN, an infinity and a row of zeros stay in their rows; a row's bits do not depend on the batch."""
    b = backend_arrays
    x = rng.standard_normal((8, 576)).astype(np.float32)
    x[2, 5], x[4, 7], x[6] = np.nan, np.inf, 0.0
    w = b.array(rng.standard_normal(576), "float16")
    got = b.numpy(pyinfer.rmsnorm(b.array(x, "float16"), w))
    assert (
        np.isnan(got[2]).all()
        and not np.isnan(got[[0, 1, 3, 5, 6, 7]].astype(np.float32)).any()
        and (got[6] == 0).all()
    )
    alone = b.numpy(pyinfer.rmsnorm(b.array(x[3:4], "float16"), w))
    assert_same_bits(alone[0], got[3], "row 3")


def test_eps_and_huge_values(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    x = b.array(rng.standard_normal((4, 300)) * 1e-4, "float32")
    w = b.array(rng.standard_normal(300), "float32")
    for eps in (1e-12, 1e-5, 0.1):
        assert_close(
            b.float64(pyinfer.rmsnorm(x, w, eps)),
            reference.rmsnorm(b.float64(x), b.float64(w), eps),
            rtol=RTOL["float32"],
        )
    x = b.array(rng.choice([-60000.0, 60000.0], (3, 512)), "float16")  # squares beyond float16
    one = b.full((512,), 1.0, "float16")
    assert_close(b.float64(pyinfer.rmsnorm(x, one)), np.sign(b.float64(x)), rtol=RTOL["float16"])


def test_empty(backend: Backend) -> None:
    b = backend
    w = b.full((64,), 1.0, "float16")
    assert tuple(pyinfer.rmsnorm(b.full((0, 64), 0.0, "float16"), w).shape) == (0, 64)
    assert tuple(pyinfer.rmsnorm(b.full((3, 0), 0.0, "float16"), b.full((0,), 1.0, "float16")).shape) == (3, 0)
    pyinfer.fused_add_rmsnorm(b.full((0, 64), 0.0, "float16"), b.full((0, 64), 0.0, "float16"), w)


def test_result_is_the_callers_kind(backend: Backend, rng: np.random.Generator) -> None:
    b = backend
    got = pyinfer.rmsnorm(b.array(draw(rng, 2, 64), "float16"), b.array(draw(rng, 64), "float16"))
    assert b.is_own(got)


def test_errors(backend: Backend) -> None:
    b = backend
    x, w = b.full((2, 64), 1.0, "float16"), b.full((64,), 1.0, "float16")
    with pytest.raises(ValueError, match=r"rmsnorm: weight .*got \(63,\), wanted \(64\)"):
        pyinfer.rmsnorm(x, b.full((63,), 1.0, "float16"))
    with pytest.raises(TypeError, match=r"rmsnorm: weight .*float32"):
        pyinfer.rmsnorm(x, b.full((64,), 1.0, "float32"))
    with pytest.raises(TypeError, match=r"rmsnorm: input .*int32"):
        pyinfer.rmsnorm(b.full((2, 64), 1, "int32"), b.full((64,), 1, "int32"))
    with pytest.raises(TypeError, match=r"rmsnorm: input is no tensor"):
        pyinfer.rmsnorm([1.0], w)
    with pytest.raises(ValueError, match=r"rmsnorm: input .*axes"):
        pyinfer.rmsnorm(b.full((64,), 1.0, "float16"), w)
    with pytest.raises(ValueError, match=r"rmsnorm: input is not contiguous"):
        pyinfer.rmsnorm(b.full((2, 128), 1.0, "float16")[:, ::2], w)
    with pytest.raises(ValueError, match=r"rmsnorm: out .*shape"):
        pyinfer.rmsnorm(x, w, out=b.full((2, 65), 1.0, "float16"))
    with pytest.raises(TypeError, match=r"rmsnorm: out differs"):
        pyinfer.rmsnorm(x, w, out=b.full((2, 64), 1.0, "float32"))
    with pytest.raises(ValueError, match=r"fused_add_rmsnorm: residual .*shape"):
        pyinfer.fused_add_rmsnorm(x, b.full((3, 64), 1.0, "float16"), w)


@pytest.mark.gpu
def test_device_mismatch(backend_arrays: Backend) -> None:
    x = backend_arrays.full((2, 64), 1.0, "float16")
    with pytest.raises(ValueError, match=r"rmsnorm: weight is on another device"):
        pyinfer.rmsnorm(x, x[0].cpu())


@pytest.mark.gpu
@pytest.mark.parametrize("enable_pdl", [None, True, False])
def test_pdl_chain(backend_arrays: Backend, rng: np.random.Generator, enable_pdl: bool | None) -> None:
    """A long chain of dependent launches: each must see the one before it."""
    b = backend_arrays
    x, w = b.array(draw(rng, 64, 4096), "float32"), b.full((4096,), 1.0, "float32")
    residual = b.full((64, 4096), 0.0, "float32")
    want_x, want_r = b.float64(x), b.float64(residual)
    for _ in range(50):
        pyinfer.fused_add_rmsnorm(x, residual, w, enable_pdl=enable_pdl)
        want_x, want_r = reference.fused_add_rmsnorm(want_x, want_r, np.ones(4096))
    assert_close(b.float64(residual), want_r, rtol=1e-4)
    assert_close(b.float64(x), want_x, rtol=1e-4)


@pytest.mark.compile
def test_row_config_covers_every_row() -> None:
    """Every vector of a row belongs to exactly one (lane, slot), or to the part that is read twice; blocks and registers stay within bounds."""
    from pyinfer.jit.norm import row_config

    for slots, longest in ((4, (512, 12)), (2, (1024, 4))):
        for vectors in (*range(1, 5000, 7), 128, 129, 2048, 4096, 4097, 8192, 65536):
            c = row_config(vectors, slots, longest)
            assert c.lanes * c.rows <= 1024 and (c.lanes <= 32 or c.lanes % 32 == 0)
            assert c.rows == 1 or (32 % c.lanes == 0 and c.lanes * c.rows == 128)
            assert c.reread == (c.lanes * c.slots < vectors)
