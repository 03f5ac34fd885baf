"""pyinfer.triton against the float64 references, and bit for bit where the CUDA operator does the same: on a GPU, or in Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/test_triton.py` runs the kernels on CPU tensors where triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.arrays import EPSILON, NUMPY_DTYPES, assert_close, assert_same_bits
from tests.reference import activation as act_ref
from tests.reference import norm as norm_ref
from tests.reference import page as page_ref
from tests.reference.attention import merge_states as merge_ref

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1" and importlib.util.find_spec("triton") is not None
DTYPES = ("float16", "bfloat16", "float32")
# The interpreter cuts off bits where the GPU rounds to bfloat16.
ROUNDING = {name: e * (2 if INTERPRETED and name == "bfloat16" else 1) for name, e in EPSILON.items()}
no_fp8_rounding = pytest.mark.skipif(
    INTERPRETED, reason="Triton's interpreter rounds to 8 bits wrongly, and makes NaN a number"
)


@pytest.fixture
def b(device, backend_arrays):
    """Torch tensors where Triton runs."""
    if device == "cpu" and not INTERPRETED:
        pytest.skip("Triton runs on a GPU, or with TRITON_INTERPRET=1 where it is installed")
    if device == "cuda":
        pytest.importorskip("triton")
    return backend_arrays


def strided(b, values, dtype):
    """A tensor whose rows do not lie one behind the other."""
    wide = np.concatenate([values, np.full((*values.shape[:-1], 8), np.nan)], -1)
    return b.array(wide, dtype)[..., : values.shape[-1]]


# ---- norm ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (5, 111), (2, 3, 500), (1, 4096), (0, 64), (2, 16384 + 40)])
def test_rmsnorm(b, rng, shape, dtype):
    from pyinfer.triton import norm

    x, w = strided(b, rng.standard_normal(shape) * 3, dtype), b.array(rng.standard_normal(shape[-1]), dtype)
    for f, more in ((norm.rmsnorm, 0), (norm.gemma_rmsnorm, 1)):
        want = norm_ref.rmsnorm(b.float64(x), b.float64(w) + more, 1e-5)
        got = f(x, w, 1e-5)
        assert b.is_own(got) and got.dtype == x.dtype
        assert_close(b.float64(got), want, rtol=2 * ROUNDING[dtype] + 1e-6)
        out = b.full(shape, np.nan, dtype)
        assert f(x, w, 1e-5, out=out) is out
        assert_same_bits(b.numpy(out), b.numpy(got))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 111), (2, 3, 512), (2, 16384 + 40)])
def test_fused_add_rmsnorm(b, rng, shape, dtype):
    from pyinfer.triton import norm

    for f, more in ((norm.fused_add_rmsnorm, 0), (norm.gemma_fused_add_rmsnorm, 1)):
        x, r = strided(b, rng.standard_normal(shape), dtype), b.array(rng.standard_normal(shape) * 3, dtype)
        w = b.array(rng.standard_normal(shape[-1]), dtype)
        want, total = norm_ref.fused_add_rmsnorm(b.float64(x), b.float64(r), b.float64(w) + more)
        assert f(x, r, w) is None
        assert_close(b.float64(x), want, rtol=2 * ROUNDING[dtype] + 1e-6)
        assert_close(b.float64(r), total, rtol=1.01 * ROUNDING[dtype])


FP8_AND_HALF = [pytest.param(f"float8_{kind}", marks=no_fp8_rounding) for kind in ("e4m3fn", "e5m2")] + ["float16"]


@pytest.mark.parametrize("out_dtype", FP8_AND_HALF)
def test_rms_norm_with_scales(b, rng, out_dtype):
    from pyinfer.triton import norm

    x, w = b.array(rng.standard_normal((4, 200)), "bfloat16"), b.array(rng.standard_normal(200), "bfloat16")
    w64 = b.float64(w)
    for scale in (0.7, 1e4):  # the second saturates 8 bits
        out = b.array(np.zeros((4, 200)), out_dtype)
        norm.rms_norm(x, w, out, 1e-6, b.array([2.0], "float32"), scale)
        largest = float(norm.LARGEST[out_dtype])
        want = np.clip(norm_ref.rmsnorm(2.0 * b.float64(x), w64, 1e-6) * scale, -largest, largest)
        step = {"float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3, "float16": 2.0**-11}[out_dtype]
        assert (np.abs(b.float64(out) - want) <= 1.02 * step * np.abs(want) + 2.0**-9).all()
    residual, out = b.array(rng.standard_normal((4, 200)), "bfloat16"), b.array(np.zeros((4, 200)), "bfloat16")
    before, total = b.numpy(x).copy(), 0.5 * b.float64(x) + b.float64(residual)
    norm.rms_norm_add_residual(x, residual, w, 1e-6, out, 0.5)
    assert_close(b.float64(out), norm_ref.rmsnorm(total, w64), rtol=2 * ROUNDING["bfloat16"])
    assert_close(b.float64(residual), total, rtol=1.01 * ROUNDING["bfloat16"])
    assert_same_bits(b.numpy(x), before)


# ---- activation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 14), (2, 3, 2 * 1500), (0, 8), (7, 2)])
def test_activation(b, rng, shape, name, dtype):
    from pyinfer.triton import activation

    x = strided(b, rng.standard_normal(shape) * 3, dtype)
    f = getattr(activation, f"{name}_and_mul")
    got = f(x)
    want = act_ref.act_and_mul(name, b.float64(x))
    assert got.shape == want.shape
    assert_close(b.float64(got), want, rtol=1.01 * ROUNDING[dtype] + 2e-6, atol=1e-6)
    out = b.full(want.shape, np.nan, dtype)
    assert f(x, out=out) is out
    assert_same_bits(b.numpy(out), b.numpy(got))


@no_fp8_rounding
def test_silu_to_fp8(b, rng):
    from pyinfer.triton.activation import silu_and_mul

    x = b.array(rng.standard_normal((5, 300)), "float16")
    for dtype, step, largest in (("float8_e4m3fn", 2.0**-4, 448.0), ("float8_e5m2", 2.0**-3, 57344.0)):
        for scale in (1.5, 1e6):
            got = b.float64(silu_and_mul(x, 0.5, b.array([scale], "float32"), dtype))
            want = np.clip(act_ref.act_and_mul("silu", 0.5 * b.float64(x)) * scale, -largest, largest)
            assert (np.abs(got - want) <= 1.02 * step * np.abs(want) + 2.0**-9).all()


# ---- cascade ---------------------------------------------------------------------------------------------------------
def states(b, rng, n, k, heads, dim, dtype):
    s, v = 20 * rng.standard_normal((n, k, heads)), rng.standard_normal((n, k, heads, dim))
    empty = rng.random(s.shape) < 0.3
    s[empty], v[empty] = -np.inf, np.nan
    return b.array(v, dtype), b.array(s, "float32")


def check_states(b, got, v64, s64, dtype):
    want_v, want_s = merge_ref(v64, s64)
    assert_close(b.float64(got[0]), want_v, rtol=1.01 * ROUNDING[dtype] + 3e-6, atol=1e-6)
    assert_close(b.float64(got[1]), want_s, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n,heads,dim", [(0, 3, 64), (1, 1, 64), (5, 3, 128), (3, 2, 80)])
def test_merge_state(b, rng, n, heads, dim, dtype):
    from pyinfer.triton import cascade

    v, s = states(b, rng, n, 2, heads, dim, dtype)
    args = v[:, 0], s[:, 0], v[:, 1], s[:, 1]
    got = cascade.merge_state(*args)
    check_states(b, got, b.float64(v), b.float64(s), dtype)
    mask = rng.random(n) < 0.5
    mv, ms = args[0].clone(), args[1].clone()
    before = b.numpy(mv).copy()
    cascade.merge_state_in_place(mv, ms, args[2], args[3], b.array(mask))
    assert_same_bits(b.numpy(mv)[mask], b.numpy(got[0])[mask])
    assert_same_bits(b.numpy(ms)[mask], b.numpy(got[1])[mask])
    assert_same_bits(b.numpy(mv)[~mask], before[~mask])


@pytest.mark.parametrize("k", [0, 1, 2, 7])
def test_merge_states(b, rng, k):
    from pyinfer.triton import cascade

    v, s = states(b, rng, 5, k, 3, 64, "bfloat16")
    check_states(b, cascade.merge_states(v, s), b.float64(v), b.float64(s), "bfloat16")


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_variable_length_merge_states(b, rng, index):
    from pyinfer.triton import cascade

    counts = np.array([2, 0, 5, 1])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    v, s = states(b, rng, int(indptr[-1]), 1, 3, 48, "float16")
    got = cascade.variable_length_merge_states(v[:, 0], s[:, 0], b.array(indptr, index))
    for t, (begin, end) in enumerate(zip(indptr[:-1], indptr[1:], strict=True)):
        rows = slice(begin, end)
        v64, s64 = b.float64(v)[rows, 0][None], b.float64(s)[rows, 0][None]
        check_states(b, (got[0][t : t + 1], got[1][t : t + 1]), v64, s64, "float16")


# ---- page ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("index", ["int32", "int64"])
def test_positions_and_lengths(b, rng, index):
    from pyinfer.triton import page

    counts = np.array([3, 0, 300, 1])
    indptr = np.concatenate([[0], np.cumsum(counts)])
    lengths = counts + np.array([0, 7, 20, 100])
    nnz = int(indptr[-1]) + 5
    got = page.get_batch_indices_positions(b.array(indptr, index), b.array(lengths, index), nnz)
    for x, want in zip(got, page_ref.batch_indices_positions(indptr, lengths, nnz), strict=True):
        np.testing.assert_array_equal(b.numpy(x), want)
    table = page_ref.PageTable(rng, lengths, 16)
    last = b.array(table.last_page_len, index)
    np.testing.assert_array_equal(b.numpy(page.get_seq_lens(b.array(table.kv_indptr, index), last, 16)), lengths)


@pytest.mark.parametrize("kind", ["pair", "combined", "HND"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float32"])
def test_append(b, rng, dtype, kind):
    from pyinfer.triton import page

    lengths, page_size, heads, dim = np.array([5, 1, 9]), 4, 2, 24
    table = page_ref.PageTable(rng, lengths, page_size)
    requests = np.array([0, 2, 2, 1, -1, 7, 0])  # one left out, one of no request, one beyond its pages
    positions = np.array([4, 8, 0, 0, 0, 0, 900])
    k, v = rng.standard_normal((7, heads, dim)), rng.standard_normal((7, heads, dim))
    shape = (table.num_pages, page_size, heads, dim)
    k_cache, v_cache = b.array(rng.standard_normal(shape), dtype), b.array(rng.standard_normal(shape), dtype)
    before = b.numpy(k_cache).copy(), b.numpy(v_cache).copy()
    ours = [b.array(x, dtype) for x in (k, v)]
    index = [b.array(x, "int32") for x in (requests, positions)]
    pages = [b.array(x, "int32") for x in (table.kv_indices, table.kv_indptr, table.last_page_len)]
    if kind == "combined":
        import torch

        both = torch.stack([k_cache.view(torch.uint8), v_cache.view(torch.uint8)], 1).view(k_cache.dtype)
        page.append_paged_kv_cache(*ours, *index, both, *pages)
        after = both[:, 0], both[:, 1]
    elif kind == "HND":
        caches = k_cache.transpose(1, 2).clone(), v_cache.transpose(1, 2).clone()
        page.append_paged_kv_cache(*ours, *index, caches, *pages, "HND")
        after = caches[0].transpose(1, 2), caches[1].transpose(1, 2)
    else:
        page.append_paged_kv_cache(*ours, *index, (k_cache, v_cache), *pages)
        after = k_cache, v_cache
    known = np.array([0, 2, 2, 1, -1, -1, -1])
    for cache, old, x in zip(after, before, ours, strict=True):
        want = page_ref.append(old, b.numpy(x), known, positions, table.kv_indices, table.kv_indptr)
        assert_same_bits(b.numpy(cache), want)


# ---- quantization ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", FP8_AND_HALF)
def test_scale_and_clamp(b, rng, dtype):
    from pyinfer.triton.quantize import LARGEST, scale_and_clamp

    values = rng.standard_normal((3, 9000)) * 10.0 ** rng.integers(-3, 6, (3, 9000))
    values[0, 0] = np.nan
    x = strided(b, values, "float32")
    got = b.numpy(scale_and_clamp(x, 0.5, dtype))
    scaled = b.numpy(x) * np.float32(0.5)
    want = np.clip(scaled, -LARGEST[dtype], LARGEST[dtype]).astype(NUMPY_DTYPES.get(dtype, np.float16))
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


@no_fp8_rounding
def test_quantize_per_token(b, rng):
    from pyinfer.triton.quantize import quantize_per_token

    values = rng.standard_normal((2, 3, 300)) * 10.0 ** rng.integers(-6, 6, (2, 3, 1))
    values[0, 1], values[1, 2, 7] = 0.0, np.nan
    x = b.array(values, "bfloat16")
    got, scale = quantize_per_token(x)
    x64, s64 = b.float64(x), b.float64(scale)
    assert s64.shape == (2, 3)
    want = np.abs(x64).max(-1) / 448.0
    assert_close(s64, want, rtol=1e-6)
    assert np.isnan(b.float64(got)[1, 2]).all() and not b.float64(got)[0, 1].any()
    back = b.float64(got) * s64[..., None]
    keep = ~np.isnan(want)
    assert (np.abs(back - x64)[keep] <= (2.0**-4 * np.abs(x64) + 2.0**-7 * want[..., None])[keep]).all()


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("n", [0, 1, 8, 2999])
def test_packbits(b, rng, n, bitorder):
    from pyinfer.triton.quantize import packbits

    bits = rng.random(2 * n) < 0.5
    got = packbits(b.array(bits)[::2], bitorder)
    np.testing.assert_array_equal(b.numpy(got), np.packbits(bits[::2], bitorder=bitorder))


# ---- bad input -------------------------------------------------------------------------------------------------------
def test_errors(b):
    from pyinfer.triton import activation, norm, quantize

    x, w = b.array(np.ones((2, 8)), "float16"), b.array(np.ones(8), "float16")
    with pytest.raises(ValueError, match=r"weight has the wrong shape: got \(4,\), wanted \(8\)"):
        norm.rmsnorm(x, w[:4])
    with pytest.raises(ValueError, match="enable_pdl is not available: got True, wanted None or False"):
        norm.rmsnorm(x, w, enable_pdl=True)
    with pytest.raises(TypeError, match="x is no torch tensor: got numpy, wanted a torch tensor"):
        activation.silu_and_mul(np.ones((2, 8), np.float32))
    with pytest.raises(ValueError, match=r"x has no last axis of two halves: got shape \(2, 7\)"):
        activation.silu_and_mul(x[:, :7])
    with pytest.raises(TypeError, match="in_scale has the wrong dtype: got float16, wanted float32"):
        norm.rms_norm(x, w, x, 1e-6, w[:1])
    with pytest.raises(ValueError, match="in_scale has the wrong number of elements: got 8, wanted 1"):
        norm.rms_norm(x, w, x, 1e-6, b.array(np.ones(8), "float32"))
    with pytest.raises(TypeError, match="dtype is no dtype to clamp to: got float32"):
        quantize.scale_and_clamp(x, 1.0, "float32")
    with pytest.raises(ValueError, match="scale is missing: got None"):
        quantize.scale_and_clamp(x, None, "float16")
    with pytest.raises(TypeError, match="dtype is no 8-bit float: got float16"):
        quantize.quantize_per_token(x, "float16")
    with pytest.raises(ValueError, match="bitorder is no bit order: got 'middle'"):
        quantize.packbits(b.array(np.ones(8, bool)), "middle")


@pytest.mark.cpu
def test_a_cpu_tensor_is_refused(monkeypatch):
    torch = pytest.importorskip("torch")
    from pyinfer.triton import _launch, norm

    monkeypatch.setattr(_launch, "interpreted", lambda: False)
    monkeypatch.setattr(norm, "kernels", lambda op: None)
    with pytest.raises(ValueError, match=r"input is on the CPU: got a CPU tensor, wanted a tensor on a GPU"):
        norm.rmsnorm(torch.ones(2, 8), torch.ones(8))


@pytest.mark.cpu
def test_without_triton():
    """Everything imports; a call says what is missing."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import pyinfer, pyinfer.triton\n"
        "from pyinfer.triton import activation, cascade, norm, page, quantize\n"
        "assert 'torch' not in sys.modules\n"
        "try: norm.rmsnorm(1, 2)\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "triton.norm.rmsnorm: needs the package triton" in done.stdout and "pip install triton" in done.stdout
