"""Merging attention states against the float64 reference, and against attention over all keys."""

# ruff: noqa: E501 - a table of cases, one a line
from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer.prefill import single_prefill_with_kv_cache_return_lse
from tests import attention_cases as cases
from tests.arrays import EPSILON, assert_close, assert_same_bits
from tests.reference.attention import attention, merge_states

SHAPES = [(0, 3, 64), (1, 1, 64), (5, 3, 128), (33, 7, 256), (17, 2, 80), (4, 5, 3)]
DTYPES = ("float16", "bfloat16", "float32")


def states(rng, backend, dtype, n, k, heads, dim):
    """v [n, k, H, D] and s [n, k, H] of widely spread scores; a third of the states are empty, with NaN for values."""
    s = 20 * rng.standard_normal((n, k, heads))
    v = rng.standard_normal((n, k, heads, dim))
    empty = rng.random(s.shape) < 0.3
    s[empty] = -np.inf
    v[empty] = np.nan
    return backend.array(v, dtype), backend.array(s, "float32")


def check(backend, device, dtype, got_v, got_s, v, s):
    want_v, want_s = merge_states(v, s)
    assert_close(backend.float64(got_v), want_v, rtol=1.01 * EPSILON[dtype] + 3e-6, atol=1e-6)
    assert_close(backend.float64(got_s), want_s, rtol=1e-6, atol=1e-6 if device == "cpu" else 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,heads,dim", SHAPES)
def test_merge_state(rng, backend, device, dtype, n, heads, dim):
    v, s = states(rng, backend, dtype, n, 2, heads, dim)
    v64, s64 = backend.float64(v), backend.float64(s)
    args = [v[:, 0], s[:, 0], v[:, 1], s[:, 1]]  # strided over tokens
    got = pyinfer.merge_state(*args)
    assert all(map(backend.is_own, got))
    check(backend, device, dtype, *got, v64, s64)
    mask = rng.random(n) < 0.5
    masks = [backend.array(mask), backend.array(mask.astype(np.uint8))]
    for m in (None, *masks):
        mv, ms = backend.array(v64[:, 0], dtype), backend.array(s64[:, 0], "float32")
        before = backend.numpy(mv).copy(), backend.numpy(ms).copy()
        assert pyinfer.merge_state_in_place(mv, ms, args[2], args[3], m) is None
        keep = np.zeros(n, bool) if m is None else ~mask
        assert_same_bits(backend.numpy(mv)[~keep], backend.numpy(got[0])[~keep], "in place")
        assert_same_bits(backend.numpy(ms)[~keep], backend.numpy(got[1])[~keep], "in place, lse")
        assert_same_bits(backend.numpy(mv)[keep], before[0][keep], "masked")
        assert_same_bits(backend.numpy(ms)[keep], before[1][keep], "masked, lse")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [0, 1, 2, 7, 40])
def test_merge_states(rng, backend, device, dtype, k):
    for n, heads, dim in SHAPES[:4] if k == 7 else SHAPES[2:3]:
        v, s = states(rng, backend, dtype, n, k, heads, dim)
        got = pyinfer.merge_states(v, s)
        assert got[0].shape == (n, heads, dim) and all(map(backend.is_own, got))
        check(backend, device, dtype, *got, backend.float64(v), backend.float64(s))
        assert_same_bits(backend.numpy(pyinfer.merge_states(v, s)[0]), backend.numpy(got[0]), "second run")


def test_empty_states_merge_to_zero(backend, device):
    v = backend.full((2, 3, 64), np.nan, "float16")
    s = backend.full((2, 3), -np.inf, "float32")
    for got_v, got_s in (pyinfer.merge_state(v, s, v, s), pyinfer.merge_states(v[:, None], s[:, None])):
        assert (backend.numpy(got_v) == 0).all() and (backend.numpy(got_s) == -np.inf).all()


def test_attention_in_parts_is_attention(rng, backend_arrays, device):
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    q, k, v = (b.array(rng.standard_normal(s), dtype) for s in ((9, 4, 64), (100, 2, 64), (100, 2, 64)))
    parts = [single_prefill_with_kv_cache_return_lse(q, k[i:j], v[i:j]) for i, j in ((0, 0), (0, 37), (37, 100))]
    merged = pyinfer.merge_state(*pyinfer.merge_state(*parts[0], *parts[1]), *parts[2])
    want = attention(b.float64(q), b.float64(k), b.float64(v))
    assert_close(b.float64(merged[0]), want[0], rtol=8 * EPSILON[dtype] + 4e-6, atol=1e-6)
    assert_close(b.float64(merged[1]), want[1], **cases.lse_tolerance(device))


def test_errors(backend_arrays, device):
    b = backend_arrays
    v, s = b.full((4, 2, 64), 0, "float16"), b.full((4, 2), 0, "float32")
    for call, error, message in (
        (lambda: pyinfer.merge_state(v, s, v[:3], s[:3]), ValueError, r"merge_state: v_b has the wrong shape: got \(3, 2, 64\), wanted \(4, 2, 64\)"),
        (lambda: pyinfer.merge_state(v, s[:, :1], v, s), ValueError, r"merge_state: s_a has the wrong shape: got \(4, 1\), wanted \(4, 2\)"),
        (lambda: pyinfer.merge_state(v, b.full((4, 2), 0, "float16"), v, s), TypeError, "merge_state: s_a has the wrong dtype: got float16, wanted float32"),
        (lambda: pyinfer.merge_state(v, s, b.full((4, 2, 64), 0, "float32"), s), TypeError, "merge_state: v_b differs in dtype from v_a: got float32, wanted float16"),
        (lambda: pyinfer.merge_state(b.full((4, 2, 64), 0, "int32"), s, v, s), TypeError, "merge_state: v_a has the wrong dtype: got int32"),
        (lambda: pyinfer.merge_state_in_place(v, s, v, s, b.full((3,), 0, "uint8")), ValueError, r"mask has the wrong shape: got \(3,\), wanted \(4\)"),
        (lambda: pyinfer.merge_state_in_place(v, s, v, s, b.full((4,), 0, "int32")), TypeError, "mask has the wrong dtype: got int32, wanted bool or uint8"),
        (lambda: pyinfer.merge_states(v, s), ValueError, r"merge_states: v has the wrong number of axes: got 3 \(shape \(4, 2, 64\)\), wanted 4"),
        (lambda: pyinfer.merge_states(v.reshape(4, 1, 64, 2).transpose(2, 3), s[:, None]), ValueError, "merge_states: v is not contiguous in its last axis"),
        (lambda: pyinfer.merge_state([1], s, v, s), TypeError, "merge_state: v_a is no tensor: got builtins.list"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            call()


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "89", "90a", "100a", "120a"])
def test_every_spec_compiles_without_spills(arch):
    from pyinfer.jit.cascade import all_specs

    for spec in all_specs():
        r = spec.build(arch).resources
        assert r.spill_stores == r.spill_loads == r.stack == 0, f"{spec}: {r}"
