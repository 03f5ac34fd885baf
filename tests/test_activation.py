"""silu_and_mul, gelu_and_mul and gelu_tanh_and_mul against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, Backend, assert_same_bits
from tests.reference import activation as reference

DTYPES = ["float16", "bfloat16", "float32"]
OPERATORS = {"silu": "silu_and_mul", "gelu": "gelu_and_mul", "gelu_tanh": "gelu_tanh_and_mul"}
# Half widths: one vector, less than one (4 of 8 elements), part of a warp, SmolLM2, several blocks a row, an odd number of vectors.
WIDTHS = [4, 8, 72, 520, 1536, 4100]
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-125, "float32": 2.0**-125}  # float32 subnormals are flushed


def assert_elementwise(got: np.ndarray, want: np.ndarray, dtype: str, name: str) -> None:
    """Every element for itself: a small result beside large ones must be right too."""
    assert got.shape == want.shape
    allowed = (
        np.abs(want) * (EPSILON[dtype] * 1.02 + 2e-5) + TINY[dtype]
    )  # 2e-5: e^x multiplies the error of a float32 argument by x
    excess = np.abs(got - want) - allowed
    worst = int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))
    assert excess.flat[worst] <= 0, (
        f"{name}: at {np.unravel_index(worst, got.shape)} got {got.flat[worst]!r}, expected {want.flat[worst]!r}"
    )


@pytest.mark.parametrize("act", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_act_and_mul(backend_arrays: Backend, rng: np.random.Generator, act: str, dtype: str, width: int) -> None:
    b, op = backend_arrays, getattr(pyinfer, OPERATORS[act])
    x = rng.standard_normal((int(rng.integers(1, 9)), 2 * width))
    x[..., :width] *= rng.choice([0.1, 1.0, 8.0], x[..., :width].shape)  # gates far into both tails
    xs = b.array(x, dtype)
    before = b.numpy(xs).copy()
    want = reference.act_and_mul(act, b.float64(xs))
    got = op(xs)
    assert tuple(got.shape) == want.shape
    if act == "gelu_tanh":  # the float64 reference itself cancels: 1 + tanh(u) near -1 has an absolute error of 1e-16
        small = np.abs(want) < 1e-9
        assert (np.abs(b.float64(got))[small] < 2e-9).all()
        assert_elementwise(np.where(small, 0, b.float64(got)), np.where(small, 0, want), dtype, op.__name__)
    else:
        assert_elementwise(b.float64(got), want, dtype, op.__name__)
    assert_same_bits(b.numpy(xs), before, "input")
    out = b.full(want.shape, np.nan, dtype)
    assert op(xs, out=out) is out
    assert_same_bits(b.numpy(out), b.numpy(got), "out=")


@pytest.mark.parametrize("act", OPERATORS)
def test_every_float16_gate(backend_arrays: Backend, act: str) -> None:
    """All 65536 gates, infinities and NaN among them, with a factor of one."""
    b = backend_arrays
    gate = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(16, 4096)
    x = b.array(np.concatenate([gate, np.ones_like(gate)], axis=1))
    got = b.float64(getattr(pyinfer, OPERATORS[act])(x))
    g = gate.astype(np.float64)
    finite = np.isfinite(g)
    with np.errstate(all="ignore"):
        want = reference.ACTIVATIONS[act](np.where(finite, g, 0.0))
        rounded = want.astype(np.float16).astype(np.float64)
    ok = np.isinf(rounded) | (np.abs(got - want) <= np.abs(want) * 1.02 * EPSILON["float16"] + 2.0**-24)
    assert ok[finite].all(), (
        f"gate {g[finite & ~ok][:4]}: got {got[finite & ~ok][:4]}, expected {want[finite & ~ok][:4]}"
    )
    assert np.isnan(got[np.isnan(g)]).all()
    assert (got[g == np.inf] == np.inf).all()


def test_leading_axes_and_strides(backend: Backend, rng: np.random.Generator) -> None:
    """[..., 2d] with three axes; rows cut out of wider tensors, at offsets that are no multiple of 16 bytes too."""
    b, dtype = backend, "float16"
    x = b.array(rng.standard_normal((2, 3, 5, 32)), dtype)
    assert_elementwise(b.float64(pyinfer.silu_and_mul(x)), reference.act_and_mul("silu", b.float64(x)), dtype, "4 axes")
    wide = b.array(rng.standard_normal((4, 6, 150)), dtype)
    for start in (0, 1, 8):
        part = wide[:, 1:4, start : start + 128]
        want = reference.act_and_mul("silu", b.float64(part))
        assert_elementwise(b.float64(pyinfer.silu_and_mul(part)), want, dtype, f"strided from {start}")
        out = b.full((4, 3, 70), np.nan, dtype)
        pyinfer.silu_and_mul(part, out=out[..., 3:67])
        host = b.float64(out)
        assert_elementwise(host[..., 3:67], want, dtype, "strided out")
        assert np.isnan(host[..., :3]).all() and np.isnan(host[..., 67:]).all()
    one = b.array(rng.standard_normal(16), dtype)
    assert_elementwise(
        b.float64(pyinfer.silu_and_mul(one)), reference.act_and_mul("silu", b.float64(one)), dtype, "1 axis"
    )


def test_out_over_the_gate(backend_arrays: Backend, rng: np.random.Generator) -> None:
    """Writing over the input's first half: every element is read before it is written."""
    b = backend_arrays
    x = b.array(rng.standard_normal((9, 2 * 1536)), "bfloat16")
    want = reference.act_and_mul("silu", b.float64(x))
    pyinfer.silu_and_mul(x, out=x[:, :1536])
    assert_elementwise(b.float64(x)[:, :1536], want, "bfloat16", "in place")


def test_many_rows(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b = backend_arrays
    x = b.array(rng.standard_normal((66000, 16)), "float16")
    assert_elementwise(
        b.float64(pyinfer.gelu_and_mul(x)), reference.act_and_mul("gelu", b.float64(x)), "float16", "66000 rows"
    )


def test_empty(backend: Backend) -> None:
    b = backend
    assert tuple(pyinfer.silu_and_mul(b.full((0, 64), 0.0, "float16")).shape) == (0, 32)
    assert tuple(pyinfer.silu_and_mul(b.full((3, 0), 0.0, "float16")).shape) == (3, 0)
    assert b.is_own(pyinfer.silu_and_mul(b.full((2, 64), 0.0, "float16")))


def test_errors(backend: Backend) -> None:
    b = backend
    with pytest.raises(ValueError, match=r"silu_and_mul: input .*got 12 bytes.*multiple of 16 bytes"):
        pyinfer.silu_and_mul(b.full((2, 6), 0.0, "float16"))
    with pytest.raises(TypeError, match=r"gelu_and_mul: input .*int32"):
        pyinfer.gelu_and_mul(b.full((2, 64), 0, "int32"))
    with pytest.raises(ValueError, match=r"gelu_tanh_and_mul: out .*\(2, 32\)"):
        x = b.full((2, 64), 0.0, "float16")
        pyinfer.gelu_tanh_and_mul(x, out=x)
    with pytest.raises(ValueError, match=r"silu_and_mul: input is not contiguous"):
        pyinfer.silu_and_mul(b.full((2, 128), 0.0, "float16")[:, ::2])
    with pytest.raises(TypeError, match=r"silu_and_mul: input is no tensor"):
        pyinfer.silu_and_mul(None)


@pytest.mark.compile
def test_config_covers_every_row() -> None:
    """Every vector of a row belongs to exactly one (part, thread, step); no part is empty."""
    from pyinfer.jit.activation import act_config

    for vectors in (*range(1, 4000, 3), 64, 65, 512, 513, 1024, 1792):
        c = act_config(vectors)
        assert c.lanes * c.rows <= 1024 and (c.rows == 1 or c.lanes * c.rows == 128)
        per_part = c.lanes * c.unroll
        assert per_part * c.chunks >= vectors > per_part * (c.chunks - 1)


def test_flashinfers_names() -> None:
    from pyinfer.activation import act_func_def_str, gen_act_and_mul_module

    assert set(act_func_def_str) == set(OPERATORS)
    assert all(
        spec.name.startswith(f"{act}_and_mul") for act in act_func_def_str for spec in gen_act_and_mul_module(act).specs
    )
    with pytest.raises(ValueError, match="relu"):
        gen_act_and_mul_module("relu")
