"""Gated activations with 8-bit results against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import Backend, assert_close, assert_same_bits, with_fp8
from tests.reference.activation import act_and_mul
from tests.reference.quantization_fp8 import LARGEST, assert_rounded

FP8 = ["float8_e4m3fn", "float8_e5m2"]
# Part of a warp, a warp, blocks, a block that computes twice; 20 and 1000: accesses of less than 16 bytes.
WIDTHS = [8, 20, 64, 1000, 1536, 14336, 40000]
NEAR = 2e-5  # exp and erf in float32


def both(act: str):
    return getattr(pyinfer, f"{act}_and_mul_quant"), getattr(pyinfer, f"{act}_and_mul_dynamic_quant")


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("width", WIDTHS)
def test_against_float64(backend_arrays: Backend, rng: np.random.Generator, act: str, width: int) -> None:
    b = backend_arrays
    static, dynamic = both(act)
    for dtype in ("bfloat16", "float16", "float32"):
        if width * 2 * (4 if dtype == "float32" else 2) % 16:
            continue
        x = b.array(rng.standard_normal((int(rng.integers(1, 5)), 2 * width)) * 2, dtype)
        want = act_and_mul(act, b.float64(x))
        rows = want.shape[0]
        for name in FP8:
            scale = float(np.float32(np.abs(want).max() / LARGEST[name] * rng.uniform(0.5, 2.0)))
            outs = []
            for given in (scale, b.array(np.array(scale), "float32")):
                out = b.full((rows, width), np.nan, name)
                assert static(out, x, given) is None
                assert_rounded(b.float64(out), want / scale, name, NEAR, 1e-6 / scale, f"{act} {dtype} {name}")
                outs.append(b.numpy(out))
            assert_same_bits(outs[0], outs[1], "a number and a tensor")
            got, scales = dynamic(x, quantize_dtype=name)
            assert_close(b.float64(scales), np.abs(want).max(-1, keepdims=True) / LARGEST[name], rtol=NEAR, atol=1e-8)
            s = b.float64(scales)
            assert_rounded(b.float64(got), want / s, name, 2 * NEAR, 1e-6 / s, f"{act} {dtype} {name} by rows")


def test_strided_and_given(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    wide = b.array(rng.standard_normal((4, 3, 200)), "bfloat16")
    x = wide[:, 1:, 40:168]
    want = act_and_mul("silu", b.float64(x))
    out = b.full((4, 2, 80), np.nan, "float8_e4m3fn")
    pyinfer.silu_and_mul_quant(out[..., 8:72], x, 0.01)
    assert_rounded(b.float64(out)[..., 8:72], want / np.float32(0.01), "float8_e4m3fn", NEAR, 1e-4)
    assert np.isnan(b.float64(out)[..., :8]).all() and np.isnan(b.float64(out)[..., 72:]).all(), "written outside"
    own, scale = b.full((4, 2, 64), np.nan, "float8_e5m2"), b.full((4, 2, 1), np.nan, "float32")
    got = pyinfer.silu_and_mul_dynamic_quant(x, own, scale)
    assert got[0] is own and got[1] is scale
    assert_rounded(b.float64(own), want / b.float64(scale), "float8_e5m2", 2 * NEAR, 1e-3)


def test_saturation_and_nan(backend_arrays: Backend) -> None:
    b = backend_arrays
    x = np.full((4, 16), 30.0)
    x[1, 3] = np.nan
    x[2] = 0.0
    xs = b.array(x, "float16")
    out = b.full((4, 8), np.nan, "float8_e4m3fn")
    pyinfer.silu_and_mul_quant(out, xs, 0.001)
    got = b.float64(out)
    assert (got[0] == 448).all() and np.isnan(got[1, 3]) and (np.delete(got[1], 3) == 448).all() and (got[2] == 0).all()
    out, scale = pyinfer.silu_and_mul_dynamic_quant(xs)
    got, scales = b.float64(out), b.float64(scale)[:, 0]
    assert (got[0] == 448).all() and np.isnan(scales[1]) and np.isnan(got[1]).all()
    assert (got[2] == 0).all() and scales[2] == np.float32(1e-12)


def test_empty(backend: Backend) -> None:
    b = with_fp8(backend)
    out, scale = pyinfer.gelu_and_mul_dynamic_quant(b.full((0, 16), 0.0, "float16"))
    assert tuple(out.shape) == (0, 8) and tuple(scale.shape) == (0, 1) and b.is_own(out)
    pyinfer.gelu_and_mul_quant(out, b.full((0, 16), 0.0, "float16"), 1.0)


def test_errors(backend: Backend) -> None:
    b = with_fp8(backend)
    x, out = b.full((2, 16), 1.0, "float16"), b.full((2, 8), 0.0, "float8_e4m3fn")
    with pytest.raises(
        ValueError, match=r"silu_and_mul_quant: out has the wrong shape: got \(2, 16\), wanted \(2, 8\)"
    ):
        pyinfer.silu_and_mul_quant(b.full((2, 16), 0.0, "float8_e4m3fn"), x, 1.0)
    with pytest.raises(TypeError, match=r"gelu_and_mul_quant: out has the wrong dtype: got float16"):
        pyinfer.gelu_and_mul_quant(x, x, 1.0)
    with pytest.raises(ValueError, match=r"gelu_tanh_and_mul_quant: scale is no scale: got 0"):
        pyinfer.gelu_tanh_and_mul_quant(out, x, 0)
    with pytest.raises(ValueError, match=r"silu_and_mul_quant: input has a last axis of the wrong length"):
        pyinfer.silu_and_mul_quant(out, b.full((2, 12), 1.0, "float16"), 1.0)
    with pytest.raises(ValueError, match=r"silu_and_mul_dynamic_quant: scale has the wrong shape"):
        pyinfer.silu_and_mul_dynamic_quant(x, scale=b.full((2,), 1.0, "float32"))
    with pytest.raises(TypeError, match=r"silu_and_mul_dynamic_quant: out has the wrong dtype"):
        pyinfer.silu_and_mul_dynamic_quant(x, out=out, quantize_dtype="float8_e5m2")
    with pytest.raises(ValueError, match=r"silu_and_mul_dynamic_quant: input has rows of no elements"):
        pyinfer.silu_and_mul_dynamic_quant(x[:, :0])
