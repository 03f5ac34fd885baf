"""Normalisation with 8-bit results, rmsnorm + silu and layernorm against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits, with_fp8
from tests.reference import norm as reference
from tests.reference.activation import silu
from tests.reference.quantization_fp8 import LARGEST, assert_rounded

DTYPES = ["float16", "bfloat16", "float32"]
FP8 = ["float8_e4m3fn", "float8_e5m2"]
# One element; odd; each shape of row kernel: part of a warp, a warp, a block, a block that reads twice.
HIDDEN = [1, 7, 64, 111, 576, 1030, 4096, 8192, 65536]
RTOL = {"float16": 1.1 * EPSILON["float16"], "bfloat16": 1.05 * EPSILON["bfloat16"], "float32": 2e-6}
NEAR = 4e-6  # what float32 arithmetic is off by before the one rounding


def draw(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape) * rng.uniform(0.1, 4.0)


def case(b: Backend, rng: np.random.Generator, hidden: int, dtype: str, fused: bool):
    rows = int(rng.integers(1, 9))
    x, w = b.array(draw(rng, rows, hidden), dtype), b.array(draw(rng, hidden), dtype)
    r = b.array(draw(rng, rows, hidden) * 4, dtype) if fused else None
    if r is None:
        return x, None, w, reference.rmsnorm(b.float64(x), b.float64(w)), None
    want, total = reference.fused_add_rmsnorm(b.float64(x), b.float64(r), b.float64(w))
    return x, r, w, want, b.array(total.astype(np.float32), dtype)


@pytest.mark.parametrize("fused", [False, True], ids=["rmsnorm", "fused_add"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_by_a_scale(backend_arrays: Backend, rng: np.random.Generator, hidden: int, dtype: str, fused: bool) -> None:
    b = backend_arrays
    x, r, w, want, total = case(b, rng, hidden, dtype, fused)
    before = b.numpy(x).copy()
    for name in FP8:
        scale = float(np.float32(np.abs(want).max() / LARGEST[name] * rng.uniform(0.5, 2.0)))
        results = []
        for given in (scale, b.array(np.array([scale]), "float32")):
            out = b.full(x.shape, np.nan, name)
            if fused:
                fresh = b.array(b.numpy(r))
                assert pyinfer.fused_add_rmsnorm_quant(out, x, fresh, w, given) is None
                assert_same_bits(b.numpy(fresh), b.numpy(total), "residual")
            else:
                assert pyinfer.rmsnorm_quant(out, x, w, given) is None
            assert_rounded(b.float64(out), want / scale, name, NEAR, what=name)
            results.append(b.numpy(out))
        assert_same_bits(results[0], results[1], "a number and a tensor")
    assert_same_bits(b.numpy(x), before, "input")


@pytest.mark.parametrize("fused", [False, True], ids=["rmsnorm", "fused_add"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_by_each_rows_own(
    backend_arrays: Backend, rng: np.random.Generator, hidden: int, dtype: str, fused: bool
) -> None:
    b = backend_arrays
    x, r, w, want, total = case(b, rng, hidden, dtype, fused)
    for name in FP8:
        fresh = None if r is None else b.array(b.numpy(r))
        if fused:
            out, scale = pyinfer.fused_add_rmsnorm_dynamic_quant(x, fresh, w, quantize_dtype=name)
            assert_same_bits(b.numpy(fresh), b.numpy(total), "residual")
        else:
            out, scale = pyinfer.rmsnorm_dynamic_quant(x, w, quantize_dtype=name)
        scales = np.maximum(np.abs(want).max(axis=-1, keepdims=True) / LARGEST[name], 1e-12)
        assert_close(b.float64(scale), scales, rtol=2 * NEAR, name="scale")
        assert_rounded(b.float64(out), want / b.float64(scale), name, 2 * NEAR, what=name)
        if not fused:
            own, own_scale = b.full(x.shape, np.nan, name), b.full((x.shape[0], 1), np.nan, "float32")
            got = pyinfer.rmsnorm_dynamic_quant(x, w, 1e-6, own, own_scale)
            assert got[0] is own and got[1] is own_scale
            assert_same_bits(b.numpy(own), b.numpy(out), "out=")
            assert_same_bits(b.numpy(own_scale), b.numpy(scale), "scale=")


def test_strided_rows(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """Rows of a wider tensor, and the heads of a packed qkv."""
    b = backend_arrays
    packed, w = b.array(draw(rng, 5, 12, 64), "bfloat16"), b.array(draw(rng, 64), "bfloat16")
    q = packed[:, 2:9]
    want = reference.rmsnorm(b.float64(q), b.float64(w))
    out = b.full((5, 9, 80), np.nan, "float8_e4m3fn")
    pyinfer.rmsnorm_quant(out[:, 1:8, 16:], q, w, 0.02)
    assert_rounded(b.float64(out)[:, 1:8, 16:], want / np.float32(0.02), "float8_e4m3fn", NEAR)
    assert np.isnan(b.float64(out)[:, 0]).all() and np.isnan(b.float64(out)[..., :16]).all(), "written outside"
    got, scale = pyinfer.rmsnorm_dynamic_quant(q, w)
    assert tuple(got.shape) == (5, 7, 64) and tuple(scale.shape) == (5, 7, 1)
    assert_rounded(b.float64(got), want / b.float64(scale), "float8_e4m3fn", 2 * NEAR)
    wide = b.array(draw(rng, 6, 300), "float16")
    residual = b.array(draw(rng, 6, 200), "float16")
    total = b.float64(wide)[:, 7:128] + b.float64(residual)[:, 3:124]
    w = b.array(draw(rng, 121), "float16")
    got, scale = pyinfer.fused_add_rmsnorm_dynamic_quant(wide[:, 7:128], residual[:, 3:124], w)
    assert_rounded(b.float64(got), reference.rmsnorm(total, b.float64(w)) / b.float64(scale), "float8_e4m3fn", 2 * NEAR)
    assert_close(b.float64(residual)[:, 3:124], total, rtol=RTOL["float16"])


@pytest.mark.parametrize("name", FP8)
def test_saturation_and_nan(backend_arrays: Backend, name: str) -> None:
    """Beyond the largest value stands the largest value; NaN stays, in the row's scale as well; a row of zeros is zeros."""
    b = backend_arrays
    x = np.tile(np.linspace(-3.0, 3.0, 64), (4, 1))
    x[1, 5] = np.nan
    x[2] = 0.0
    x[3, 7] = np.inf
    xs, w = b.array(x, "bfloat16"), b.full((64,), 1.0, "bfloat16")
    out = b.full((4, 64), np.nan, name)
    pyinfer.rmsnorm_quant(out, xs, w, 1e-8)
    got = b.float64(out)
    assert set(np.abs(got[0])) == {LARGEST[name]} and (np.sign(got[0]) == np.sign(x[0])).all()
    assert np.isnan(got[1]).all()
    assert (got[2] == 0).all()
    assert np.isnan(got[3, 7])
    out, scale = pyinfer.rmsnorm_dynamic_quant(xs, w, quantize_dtype=name)
    got, scales = b.float64(out), b.float64(scale)[:, 0]
    assert np.abs(got[0]).max() == LARGEST[name]
    assert np.isnan(got[1]).all() and np.isnan(scales[1]) and np.isnan(scales[3])
    assert (got[2] == 0).all() and scales[2] == np.float32(1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_layernorm(backend_arrays: Backend, rng: np.random.Generator, hidden: int, dtype: str) -> None:
    b = backend_arrays
    rows = int(rng.integers(1, 9))
    x = b.array(draw(rng, rows, hidden) + rng.uniform(-20, 20), dtype)
    for param in dict.fromkeys(("float32", dtype)):
        w, beta = b.array(draw(rng, hidden), param), b.array(draw(rng, hidden), param)
        want = reference.layernorm(b.float64(x), b.float64(w), b.float64(beta))
        got = pyinfer.layernorm(x, w, beta)
        # Deviations are differences of float32 numbers up to 24 times as large as they.
        assert_close(b.float64(got), want, rtol=RTOL[dtype], atol=1e-4 if hidden > 1 else 1e-6)
        out = b.full((rows, hidden), np.nan, dtype)
        assert pyinfer.layernorm(x, w, beta, out=out, enable_pdl=False) is out
        assert_same_bits(b.numpy(out), b.numpy(got), "out=")


def test_layernorm_of_a_large_mean(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """mean(x^2) - mean(x)^2 would lose everything here."""
    b = backend_arrays
    x = b.array(rng.standard_normal((3, 1000)) + 1e4, "float32")
    one, zero = b.full((1000,), 1.0, "float32"), b.full((1000,), 0.0, "float32")
    want = reference.layernorm(b.float64(x), b.float64(one), b.float64(zero))
    assert_close(b.float64(pyinfer.layernorm(x, one, zero)), want, rtol=0, atol=5e-3)


def test_layernorm_in_place_of_heads(backend: Backend, rng: np.random.Generator) -> None:
    b = backend
    packed = b.array(draw(rng, 4, 6, 96), "float16")
    w, beta = b.array(draw(rng, 96), "float32"), b.array(draw(rng, 96), "float32")
    before = b.float64(packed).copy()
    heads = packed[:, 1:4]
    got = pyinfer.layernorm(heads, w, beta, out=heads)
    assert b.is_own(got)
    want = before.copy()
    want[:, 1:4] = reference.layernorm(before[:, 1:4], b.float64(w), b.float64(beta))
    assert_close(b.float64(packed), want, rtol=2 * RTOL["float16"], atol=1e-6)


@pytest.mark.parametrize("hidden", [7, 64, 4096])
def test_rmsnorm_silu(backend_arrays: Backend, rng: np.random.Generator, hidden: int) -> None:
    b = backend_arrays
    for dtype in DTYPES:
        x, w = b.array(draw(rng, 5, hidden), dtype), b.array(draw(rng, hidden), dtype)
        want = silu(reference.rmsnorm(b.float64(x), b.float64(w)))
        assert_close(b.float64(pyinfer.fused_rmsnorm_silu(x, w)), want, rtol=RTOL[dtype] * 1.5, atol=1e-5)
        out = b.full((5, hidden), np.nan, "float8_e4m3fn")
        assert pyinfer.fused_rmsnorm_silu(x, w, 1e-6, out) is out
        assert_rounded(b.float64(out), want, "float8_e4m3fn", 2e-5, 1e-6)


def test_empty(backend: Backend) -> None:
    b = with_fp8(backend)
    w, none = b.full((64,), 1.0, "float16"), b.full((0, 64), 0.0, "float16")
    out, scale = pyinfer.rmsnorm_dynamic_quant(none, w)
    assert tuple(out.shape) == (0, 64) and tuple(scale.shape) == (0, 1) and b.is_own(out)
    pyinfer.fused_add_rmsnorm_quant(out, none, b.full((0, 64), 0.0, "float16"), w, 1.0)
    pyinfer.rmsnorm_quant(b.full((3, 0), 0.0, "float8_e5m2"), b.full((3, 0), 0.0, "float16"), w[:0], 1.0)
    assert tuple(pyinfer.layernorm(none, w, w).shape) == (0, 64)


def test_errors(backend: Backend) -> None:
    b = with_fp8(backend)
    x, w = b.full((2, 64), 1.0, "float16"), b.full((64,), 1.0, "float16")
    out = b.full((2, 64), 0.0, "float8_e4m3fn")
    with pytest.raises(TypeError, match=r"rmsnorm_quant: out has the wrong dtype: got float16"):
        pyinfer.rmsnorm_quant(x, x, w, 1.0)
    with pytest.raises(ValueError, match=r"rmsnorm_quant: out .*shape"):
        pyinfer.rmsnorm_quant(out[:1], x, w, 1.0)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"rmsnorm_quant: scale is no scale"):
            pyinfer.rmsnorm_quant(out, x, w, bad)
    with pytest.raises(TypeError, match=r"rmsnorm_quant: scale has the wrong dtype: got float16"):
        pyinfer.rmsnorm_quant(out, x, w, w[:1])
    with pytest.raises(
        ValueError, match=r"rmsnorm_quant: scale has the wrong number of elements: got 2 .*wanted one element"
    ):
        pyinfer.rmsnorm_quant(out, x, w, b.full((2,), 1.0, "float32"))
    with pytest.raises(ValueError, match=r"fused_add_rmsnorm_quant: residual .*shape"):
        pyinfer.fused_add_rmsnorm_quant(out, x, x[:1], w, 1.0)
    with pytest.raises(TypeError, match=r"rmsnorm_dynamic_quant: quantize_dtype is no 8-bit float: got float16"):
        pyinfer.rmsnorm_dynamic_quant(x, w, quantize_dtype="float16")
    with pytest.raises(TypeError, match=r"rmsnorm_dynamic_quant: out has the wrong dtype"):
        pyinfer.rmsnorm_dynamic_quant(x, w, out=out, quantize_dtype="float8_e5m2")
    with pytest.raises(
        ValueError, match=r"rmsnorm_dynamic_quant: scale has the wrong shape: got \(2,\), wanted \(2, 1\)"
    ):
        pyinfer.rmsnorm_dynamic_quant(x, w, scale=b.full((2,), 1.0, "float32"))
    with pytest.raises(ValueError, match=r"rmsnorm_dynamic_quant: scale is not contiguous"):
        pyinfer.rmsnorm_dynamic_quant(x, w, scale=b.full((2, 2), 1.0, "float32")[:, :1])
    with pytest.raises(ValueError, match=r"rmsnorm_dynamic_quant: input has rows of no elements"):
        pyinfer.rmsnorm_dynamic_quant(x[:, :0], w[:0])
    with pytest.raises(ValueError, match=r"fused_rmsnorm_silu: block_scale is given"):
        pyinfer.fused_rmsnorm_silu(x, w, block_scale=out)
    f = b.full((64,), 1.0, "float32")
    with pytest.raises(TypeError, match=r"layernorm: beta differs in dtype from gemma"):
        pyinfer.layernorm(x, f, w)
    with pytest.raises(TypeError, match=r"layernorm: gemma has the wrong dtype: got bfloat16"):
        pyinfer.layernorm(x, b.full((64,), 1.0, "bfloat16"), f)
    with pytest.raises(ValueError, match=r"layernorm: beta .*shape"):
        pyinfer.layernorm(x, f, f[:1])
    with pytest.raises(ValueError, match=r"layernorm: input .*axes"):
        pyinfer.layernorm(w, f, f)


@pytest.mark.gpu
def test_scale_on_another_device(backend_arrays: Backend) -> None:
    b = backend_arrays
    x, w = b.full((2, 64), 1.0, "float16"), b.full((64,), 1.0, "float16")
    with pytest.raises(ValueError, match=r"rmsnorm_quant: scale is on another device: got cpu, wanted cuda:0"):
        pyinfer.rmsnorm_quant(b.full((2, 64), 0.0, "float8_e4m3fn"), x, w, b.full((1,), 1.0, "float32").cpu())


@pytest.mark.gpu
def test_frameworks_without_8_bit_floats(backend: Backend) -> None:
    """CuPy cannot hold the results: that is said, whatever the operator; what it can hold it gets."""
    b = backend
    if b.framework == "torch":
        assert b.is_own(
            pyinfer.rmsnorm_dynamic_quant(b.full((2, 64), 1.0, "float16"), b.full((64,), 1.0, "float16"))[0]
        )
        return
    x, w = b.full((2, 64), 1.0, "float16"), b.full((64,), 1.0, "float16")
    text = "comes from a framework without 8-bit floats: got a CuPy array, wanted a torch tensor"
    with pytest.raises(TypeError, match=f"rmsnorm_dynamic_quant: input {text}"):
        pyinfer.rmsnorm_dynamic_quant(x, w)
    with pytest.raises(TypeError, match=f"silu_and_mul_dynamic_quant: input {text}"):
        pyinfer.silu_and_mul_dynamic_quant(x)
    assert b.is_own(pyinfer.layernorm(x, w, w))
