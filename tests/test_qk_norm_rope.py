"""fused_qk_rmsnorm_rope against float64."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits, with_fp8
from tests.reference import norm as reference
from tests.reference.quantization_fp8 import assert_rounded

# float32 results carry the sum's, the sine's and the cosine's errors besides the rounding.
RTOL = {"float16": 1.1 * EPSILON["float16"], "bfloat16": 1.05 * EPSILON["bfloat16"], "float32": 6e-6}
# grid, channels of a head, heads of q, k and v: Wan's head; heads that differ; pairs of one coordinate only; odd vectors; more heads than threads;
# a half-filled warp
SHAPES = [
    ((2, 3, 4), (44, 42, 42), (12, 12, 12)),
    ((3, 1, 5), (24, 20, 20), (8, 2, 3)),
    ((1, 1, 7), (0, 0, 64), (1, 1, 1)),
    ((4, 2, 1), (6, 2, 6), (5, 1, 2)),
    ((2, 2, 2), (96, 80, 80), (40, 40, 8)),
    ((2, 2, 2), (20, 20, 8), (3, 5, 1)),
]


def arguments(grid, channels, heads):
    names = (("ppf", "pph", "ppw"), ("num_frame_channels", "num_height_channels", "num_width_channels"))
    names = (*names, ("num_heads_q", "num_heads_k", "num_heads_v"))
    values = zip(names, (grid, channels, heads), strict=True)
    return {n: v for group, numbers in values for n, v in zip(group, numbers, strict=True)} | {
        "head_dim": sum(channels)
    }


def draw(rng, b, grid, channels, heads, dtype, batch=2):
    dim, tokens = sum(channels), batch * int(np.prod(grid))
    qkv = b.array(rng.standard_normal((tokens, sum(heads) * dim)) * rng.uniform(0.1, 4.0), dtype)
    weights = [b.array(rng.uniform(0.2, 2.0, n * dim), dtype) for n in heads[:2]]
    return qkv, weights


def wanted(b, qkv, weights, shape, **options):
    given = None if weights is None else [b.float64(w) for w in weights]
    return reference.qk_norm_rope(b.float64(qkv), given, *shape, **options)


@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("dtype", RTOL)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results(backend_arrays: Backend, rng: np.random.Generator, shape, dtype: str, interleave: bool) -> None:
    b = backend_arrays
    qkv, weights = draw(rng, b, *shape, dtype)
    before = b.numpy(qkv).copy()
    options = dict(interleave=interleave, eps=1e-5, base=float(rng.uniform(100.0, 1e5)))
    got = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape), **options)
    for name, x, want in zip("qkv", got, wanted(b, qkv, weights, shape, **options), strict=True):
        assert b.is_own(x)
        assert_close(b.float64(x), want, rtol=RTOL[dtype], name=name)
    assert_same_bits(b.numpy(qkv), before, "input")
    values = b.numpy(qkv)[:, (shape[2][0] + shape[2][1]) * sum(shape[1]) :]
    assert_same_bits(b.numpy(got[2]).reshape(values.shape), values, "v")
    outs = [b.full(tuple(x.shape), np.nan, dtype) for x in got]
    given = dict(zip(("q_out", "k_out", "v_out"), outs, strict=True))
    again = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape), **options, **given)
    for x, y, out in zip(got, again, outs, strict=True):
        assert y is out
        assert_close(b.float64(x), b.float64(y), rtol=RTOL[dtype], name="given outputs")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("norm", [True, False])
def test_fp8(backend_arrays: Backend, rng: np.random.Generator, dtype: str, norm: bool) -> None:
    b, shape = with_fp8(backend_arrays), SHAPES[1]
    qkv, weights = draw(rng, b, *shape, dtype)
    want = wanted(b, qkv, weights if norm else None, shape)
    scale, v_scale = 100.0 / np.abs(want[0]).max(), 1000.0 / np.abs(want[2]).max()  # the latter saturates
    options = dict(is_qk_norm=norm, output_fp8=True, output_quant_scale=scale, v_quant_scale=v_scale)
    got = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape), **options)
    for name, x, w, s in zip("qkv", got, want, (scale, scale, v_scale), strict=True):
        assert_rounded(b.float64(x), w * s, "float8_e4m3fn", 4e-6, 1e-5 * np.abs(w * s).max(), what=name)
    plain = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape), is_qk_norm=norm, output_quant_scale=scale)
    assert_close(b.float64(plain[0]), want[0], rtol=RTOL[dtype], name="no scale where nothing is rounded to 8 bits")


def test_yarn(backend_arrays: Backend, rng: np.random.Generator) -> None:
    b, shape = backend_arrays, ((5, 9, 7), (24, 20, 20), (2, 1, 1))
    qkv, weights = draw(rng, b, *shape, "float32", batch=1)
    options = dict(factor=4.0, low=2.0, high=7.0, attention_factor=1.2)
    got = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape), **options)
    want = wanted(b, qkv, weights, shape, yarn=(4.0, 2.0, 7.0), attention_factor=1.2)
    for name, x, w in zip("qk", got, want, strict=False):
        assert_close(b.float64(x), w, rtol=RTOL["float32"], name=name)
    # low == high: a step between two pairs
    step = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape), factor=4.0, low=3.0, high=3.0)
    want = wanted(b, qkv, weights, shape, yarn=(4.0, 3.0, 3.001))
    assert_close(b.float64(step[0]), want[0], rtol=RTOL["float32"], name="step")


def test_batches_and_strides(backend: Backend, rng: np.random.Generator) -> None:
    """[batch, tokens, ...], and rows of a wider tensor at odd addresses: the same bits as from contiguous rows."""
    b, shape, dtype = backend, SHAPES[1], "float16"
    qkv, weights = draw(rng, b, *shape, dtype)
    want = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape))
    tokens, width = int(np.prod(shape[0])), qkv.shape[1]
    batched = pyinfer.fused_qk_rmsnorm_rope(qkv.reshape(2, tokens, width), *weights, **arguments(*shape))
    for n, x, y in zip(shape[2], batched, want, strict=True):
        assert tuple(x.shape) == (2, tokens, n, sum(shape[1]))
        assert_same_bits(b.numpy(x).reshape(y.shape), b.numpy(y), "batch")
    for pad in (8, 3):
        wide = b.array(rng.standard_normal((2 * tokens, width + pad)), dtype)
        wide[:, pad:] = qkv
        for x, y in zip(pyinfer.fused_qk_rmsnorm_rope(wide[:, pad:], *weights, **arguments(*shape)), want, strict=True):
            assert_close(b.float64(x), b.float64(y), rtol=2 * EPSILON[dtype], name=f"pad {pad}")


def test_empty(backend: Backend, rng: np.random.Generator) -> None:
    b, shape = backend, SHAPES[1]
    qkv, weights = draw(rng, b, *shape, "float16", batch=0)
    got = pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **arguments(*shape))
    assert [tuple(x.shape) for x in got] == [(0, n, 64) for n in shape[2]]


BAD = [
    ({"ppf": 4}, "qkv has another number of tokens: got 30, wanted a multiple of 20 (ppf * pph * ppw)"),
    ({"pph": 0}, "pph is too small: got 0, wanted 1 or more"),
    ({"num_heads_v": 0}, "num_heads_v is no head count: got 0"),
    ({"head_dim": 63}, "head_dim cannot be rotated: got 63, wanted an even number from 2 to 512"),
    ({"num_height_channels": 21}, "num_height_channels does not make pairs: got 21"),
    ({"num_width_channels": 22}, "num_frame_channels and those of height and width are not a head's: got 24 + 20 + 22, wanted head_dim 64 in all"),
    ({"base": 0.0}, "base is no positive number: got 0.0"),
    ({"factor": -1.0}, "factor is no positive number: got -1.0"),
    ({"attention_factor": 2.0}, "attention_factor is given without YaRN: got 2.0, wanted 1.0 where factor is 1.0"),
    ({"v_quant_scale": float("nan")}, "v_quant_scale is no scale: got nan"),
    ({"num_heads_k": 3}, "qkv has the wrong shape"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "text"), BAD, ids=[next(iter(c)) for c, _ in BAD])
def test_errors(backend: Backend, rng: np.random.Generator, changes, text: str) -> None:
    b, shape = backend, SHAPES[1]
    qkv, weights = draw(rng, b, *shape, "float16")
    with pytest.raises(ValueError) as e:
        pyinfer.fused_qk_rmsnorm_rope(qkv, *weights, **(arguments(*shape) | changes))
    assert str(e.value).startswith(f"fused_qk_rmsnorm_rope: {text}")


def test_errors_of_tensors(backend: Backend, rng: np.random.Generator) -> None:
    b, shape = backend, SHAPES[1]
    qkv, (q_weight, k_weight) = draw(rng, b, *shape, "float16")
    sizes = arguments(*shape)
    with pytest.raises(TypeError, match="q_weight differs in dtype from qkv"):
        pyinfer.fused_qk_rmsnorm_rope(qkv, b.array(b.numpy(q_weight), "float32"), k_weight, **sizes)
    with pytest.raises(ValueError, match="k_weight has the wrong shape"):
        pyinfer.fused_qk_rmsnorm_rope(qkv, q_weight, q_weight, **sizes)
    with pytest.raises(ValueError, match=r"another number of tokens: got 10, wanted 15 \(ppf"):
        pyinfer.fused_qk_rmsnorm_rope(qkv.reshape(3, 10, -1), q_weight, k_weight, **sizes)
    out = b.full((30, 64, 8), np.nan, "float16")
    turned = out.swapaxes(1, 2) if b.framework != "torch" else out.transpose(1, 2)
    with pytest.raises(ValueError, match=r"q_out is not contiguous: got strides \(512, 1, 8\), wanted \(512, 64, 1\)"):
        pyinfer.fused_qk_rmsnorm_rope(qkv, q_weight, k_weight, **sizes, q_out=turned)
    with pytest.raises(TypeError, match="q_out has the wrong dtype: got float16, wanted float8_e4m3fn"):
        pyinfer.fused_qk_rmsnorm_rope(qkv, q_weight, k_weight, **sizes, q_out=out, output_fp8=True)
