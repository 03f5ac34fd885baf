"""Attention variants as Python functions: every example on every operator that takes one, against float64; what cannot be compiled; linking for each arch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import pyinfer
from pyinfer import AttentionVariant
from tests.arrays import EPSILON, Backend, assert_close
from tests.attention_cases import Shape, lse_tolerance, paged_cache
from tests.reference.attention import rotated
from tests.reference.variants import variant_attention
from tests.variant_cases import EXAMPLES, Example

DTYPE = "float16"
QO, KV = (3, 0, 40, 1), (70, 9, 150, 1)  # ragged batch: more than one tile, an empty request, one key


def tolerance(device: str) -> dict[str, float]:
    """Without softmax weights are not below 1, and their rounding on the GPU counts for as much as the sum: the same relative bound, a little wider."""
    return {
        "rtol": EPSILON[DTYPE] * (6 if device == "cuda" else 1.5) + 4e-6,
        "atol": 2e-3 if device == "cuda" else 3e-5,
    }


def given(backend: Backend, args: list[Any]) -> list[Any]:
    return [backend.array(x) if isinstance(x, np.ndarray) else x for x in args]


def draw(rng: np.random.Generator, backend: Backend, *shape: int) -> tuple[Any, np.ndarray]:
    x = backend.array(rng.standard_normal(shape), DTYPE)
    return x, backend.float64(x)


def twin_of(example: Example, args: list[Any], device: str, **overrides: Any) -> dict[str, Any]:
    """The reference's functions and options. A GPU rounds what a query function gives to the queries' type, and so does the twin."""
    twin = {**example.options, **example.twin(args), **overrides}
    query = twin.get("query")
    if query is not None and device == "cuda":
        twin["query"] = lambda x, at: query(x, at).astype(np.float16).astype(np.float64)
    return twin


def without_lse(example: Example) -> bool:
    return not example.variant.use_softmax


def plan_options(options: dict[str, Any]) -> dict[str, Any]:
    names = {"soft_cap": "logits_soft_cap"}
    return {names.get(k, k): v for k, v in options.items() if k != "v_scale"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_single(name: str, backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """One request, prefill of both tile heights and decode."""
    example, backend = EXAMPLES[name], backend_arrays
    args = example.draw(rng, 4, [150])
    for n in (2, 45):
        q, q64 = draw(rng, backend, n, 4, 64)
        k, k64 = draw(rng, backend, 150, 2, 64)
        v, v64 = draw(rng, backend, 150, 2, 64)
        options = plan_options(example.options)
        scale = example.options.get("v_scale")
        lse = not without_lse(example)
        got = pyinfer.single_prefill_with_kv_cache(
            q,
            k,
            v,
            scale_v=scale,
            return_lse=lse,
            variant=example.variant,
            variant_args=given(backend, args),
            **options,
        )
        want, want_lse = variant_attention(q64, k64, v64, **twin_of(example, args, device))
        if lse:
            assert_close(backend.float64(got[1]), want_lse, **lse_tolerance(device), name="lse")
            got = got[0]
        assert_close(backend.float64(got), want, **tolerance(device))
    options.pop("causal", None)
    got = pyinfer.single_decode_with_kv_cache(
        q[-1], k, v, v_scale=scale, variant=example.variant, variant_args=given(backend, args), **options
    )
    want, _ = variant_attention(q64[-1:], k64, v64, **twin_of(example, args, device, causal=False))
    assert_close(backend.float64(got), want[0], **tolerance(device))


@pytest.mark.parametrize("name", EXAMPLES)
def test_batch_decode(name: str, backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """Pages, requests of very different lengths (so that some are split), one without keys."""
    example, backend = EXAMPLES[name], backend_arrays
    shape = Shape(DTYPE, 8, 2, 64, lens=(0, 1, 700, 33), qo_lens=(1, 1, 1, 1))
    cache = paged_cache(rng, backend, shape)
    args = example.draw(rng, 8, shape.lens)
    q, q64 = draw(rng, backend, 4, 8, 64)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(variant=example.variant)
    options = plan_options(example.options)
    options.pop("causal", None)
    wrapper.plan(
        cache.indptr, cache.indices, cache.last_page_len, 8, 2, 64, 16, q_data_type=DTYPE, fixed_split_size=9, **options
    )
    assert "window_left" in options or wrapper.plan_info.num_partials > 0
    scale = example.options.get("v_scale")
    values = given(backend, args)
    got = wrapper.run(q, cache.cache, *values, v_scale=scale, return_lse=not without_lse(example))
    outs, lses = [], []
    for b in range(4):
        out, lse = variant_attention(
            q64[b : b + 1], cache.k[b], cache.v[b], request=b, **twin_of(example, args, device, causal=False)
        )
        outs.append(out)
        lses.append(lse)
    if not without_lse(example):
        assert_close(backend.float64(got[1]), np.concatenate(lses), **lse_tolerance(device), name="lse")
        got = got[0]
    assert_close(backend.float64(got), np.concatenate(outs), **tolerance(device))
    again = wrapper.run(q, cache.cache, *values, v_scale=scale)
    assert (backend.numpy(again) == backend.numpy(got)).all(), "the same bits each time"


@pytest.mark.parametrize("paged", [True, False], ids=["paged", "ragged"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_batch_prefill(name: str, paged: bool, backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    example, backend = EXAMPLES[name], backend_arrays
    qo_indptr = np.cumsum([0, *QO])
    args = example.draw(rng, 4, KV)
    q, q64 = draw(rng, backend, sum(QO), 4, 64)
    options = plan_options(example.options)
    if paged:
        cache = paged_cache(rng, backend, Shape(DTYPE, 4, 2, 64, lens=KV, qo_lens=QO))
        wrapper: Any = pyinfer.BatchPrefillWithPagedKVCacheWrapper(variant=example.variant)
        wrapper.plan(
            qo_indptr, cache.indptr, cache.indices, cache.last_page_len, 4, 2, 64, 16, q_data_type=DTYPE, **options
        )
        tensors, keys, values = (cache.cache,), cache.k, cache.v
    else:
        k, k64 = draw(rng, backend, sum(KV), 2, 64)
        v, v64 = draw(rng, backend, sum(KV), 2, 64)
        wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(variant=example.variant)
        wrapper.plan(qo_indptr, np.cumsum([0, *KV]), 4, 2, 64, q_data_type=DTYPE, **options)
        ends = np.cumsum(KV)[:-1]
        tensors, keys, values = (k, v), np.split(k64, ends), np.split(v64, ends)
    got = wrapper.run(q, *tensors, *given(backend, args), v_scale=example.options.get("v_scale"))
    want = [
        variant_attention(
            q64[qo_indptr[b] : qo_indptr[b + 1]], keys[b], values[b], request=b, **twin_of(example, args, device)
        )[0]
        for b in range(len(KV))
    ]
    assert_close(backend.float64(got), np.concatenate(want), **tolerance(device))


@pytest.mark.parametrize("name", ["softcap_alibi", "document"])
def test_batch_attention(name: str, backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """Prefill and decode together."""
    example, backend, qo_lens = EXAMPLES[name], backend_arrays, (3, 1, 40)
    shape = Shape(DTYPE, 4, 2, 64, lens=(70, 9, 150), qo_lens=qo_lens)
    cache = paged_cache(rng, backend, shape)
    args = example.draw(rng, 4, shape.lens)
    q, q64 = draw(rng, backend, sum(qo_lens), 4, 64)
    wrapper = pyinfer.BatchAttention(variant=example.variant)
    qo_indptr = np.cumsum([0, *qo_lens]).astype(np.int32)
    wrapper.plan(
        qo_indptr, cache.indptr, cache.indices, np.array(shape.lens, np.int32), 4, 2, 64, 64, 16, causal=True, q_data_type=DTYPE, kv_data_type=DTYPE
    )  # fmt: skip
    out, lse = wrapper.run(q, cache.cache, variant_args=given(backend, args))
    twin = twin_of(example, args, device, causal=True)
    rows = [slice(*qo_indptr[b : b + 2]) for b in range(3)]
    want = [variant_attention(q64[r], cache.k[b], cache.v[b], request=b, **twin) for b, r in enumerate(rows)]
    assert_close(backend.float64(out), np.concatenate([x[0] for x in want]), **tolerance(device))
    assert_close(backend.float64(lse), np.concatenate([x[1] for x in want]), **lse_tolerance(device), name="lse")


def test_with_the_built_in_options(backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """A variant on top of ALiBi, a custom mask and a soft cap: logits come with the bias and before the cap, both masks hide."""
    backend = backend_arrays
    q, q64 = draw(rng, backend, 40, 4, 64)
    k, k64 = draw(rng, backend, 90, 2, 64)
    v, v64 = draw(rng, backend, 90, 2, 64)
    keep = rng.random((40, 90)) < 0.7
    variant = AttentionVariant("halves", logits=lambda score: score / 2, mask=lambda kv_idx: kv_idx % 5 != 2)
    got = pyinfer.single_prefill_with_kv_cache(
        q, k, v, custom_mask=backend.array(keep), pos_encoding_mode="ALIBI", logits_soft_cap=1.5, variant=variant
    )
    slopes = [2.0 ** (-2 * (h + 1)) for h in range(4)]
    want, _ = variant_attention(
        q64, k64, v64, keep=keep, soft_cap=1.5, logits=lambda s, at: (s + slopes[at.head] * (at.j - at.i)) / 2, mask=lambda at: at.j % 5 != 2,
    )  # fmt: skip
    assert_close(backend.float64(got), want, **tolerance(device))


@pytest.mark.parametrize("kv_dtype", [None, pytest.param("float8_e4m3fn", marks=pytest.mark.gpu)])
def test_query_before_rope(
    kv_dtype: str | None, backend_arrays: Backend, device: str, rng: np.random.Generator
) -> None:
    """A query function works on what was given, RoPE on what it made of it; keys of 8 bits permute the queries afterwards."""
    backend, example = backend_arrays, EXAMPLES["query_output"]
    q, q64 = draw(rng, backend, 40, 4, 64)
    k, v = (backend.array(rng.standard_normal((90, 2, 64)), kv_dtype or DTYPE) for _ in range(2))
    args = example.draw(rng, 4, [90])
    twin = twin_of(example, args, device)
    stretched = twin["query"]
    twin["query"] = lambda x, at: rotated(stretched(x, at)[:, None], 50, 1.0, 1e4)[:, 0]
    got = pyinfer.single_prefill_with_kv_cache(
        q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA", variant=example.variant, variant_args=given(backend, args)
    )
    want, _ = variant_attention(q64, rotated(backend.float64(k), 0, 1.0, 1e4), backend.float64(v), causal=True, **twin)
    # On the GPU queries are rounded twice, keys once more, before the products.
    loose = {"rtol": 6e-3, "atol": 6e-3} if device == "cuda" else tolerance(device)
    assert_close(backend.float64(got), want, **loose)


def test_rows_that_see_nothing(backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """Every second query sees no key: zeros and -inf; logits that are not finite count as nothing or as the largest."""
    backend = backend_arrays
    variant = AttentionVariant("odd_rows", logits=wild, mask=lambda q_idx: q_idx % 2 == 1)
    for n in (3, 50):
        q, _ = draw(rng, backend, n, 4, 64)
        k, _ = draw(rng, backend, 70, 2, 64)
        chosen = np.arange(70) % 7 == 3  # +inf: these alone count
        values = rng.standard_normal((70, 2, 64))
        if device == "cuda":  # there keys may be split, and splits with such keys weigh alike, however many they have
            values[chosen] = values[3]
        v = backend.array(values, DTYPE)
        v64 = backend.float64(v)
        out, lse = pyinfer.single_prefill_with_kv_cache(q, k, v, return_lse=True, variant=variant)
        out, lse = backend.float64(out), backend.float64(lse)
        assert (out[::2] == 0).all() and (lse[::2] == -np.inf).all()
        want = np.repeat(v64[chosen].mean(0), 2, axis=0)
        assert_close(out[1::2], np.broadcast_to(want, out[1::2].shape), **tolerance(device))


def wild(score, kv_idx):
    if kv_idx % 7 == 3:
        return math.inf
    return -math.inf if kv_idx % 2 == 0 else score


def test_cuda_graph_mode(backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """A wrapper with fixed buffers plans and runs a variant like any other; a tensor's values are read anew by each run."""
    backend, example = backend_arrays, EXAMPLES["softcap_alibi"]
    shape = Shape(DTYPE, 4, 2, 64, lens=(40, 17))
    cache = paged_cache(rng, backend, shape)
    buffers = [backend.array(np.zeros(n, np.int32)) for n in (3, 8, 2)]
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD", True, False, *buffers, variant=example.variant)
    wrapper.plan(cache.indptr, cache.indices, cache.last_page_len, 4, 2, 64, 16, q_data_type=DTYPE)
    q, q64 = draw(rng, backend, 2, 4, 64)
    args = example.draw(rng, 4, shape.lens)
    slopes = backend.array(args[0])
    for factor in (1.0, 0.25):
        got = wrapper.run(q, cache.cache, slopes, args[1])
        twin = example.twin([args[0] * factor, args[1]])
        want = [variant_attention(q64[b : b + 1], cache.k[b], cache.v[b], request=b, **twin)[0] for b in range(2)]
        assert_close(backend.float64(got), np.concatenate(want), **tolerance(device))
        slopes *= 0.25


# ---- CUDA source ------------------------------------------------------------------------------------------------------------------
SCALED = """
PYINFER_DEVICE float user_logits_transform(const Params& p, float logit, const VariantPlace& at) {
    return logit * p.factor + p.bias[at.qo_head] * (at.q_position() - at.kv_token);
}
"""
SCALED_PARAMS = {"bias": "float32[head]", "factor": "float32"}


def scaled(score, q_pos, kv_idx, bias, factor):
    return score * factor + bias * (q_pos - kv_idx)


def test_cuda_source_beside_python(backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """One variant, CUDA for the GPU and Python for the CPU."""
    backend = backend_arrays
    variant = AttentionVariant("scaled", logits=scaled, params=SCALED_PARAMS, cuda_source=SCALED)
    assert variant.user.functions == () and variant.user.hooks == ("logits",)
    q, q64 = draw(rng, backend, 20, 4, 64)
    k, k64 = draw(rng, backend, 60, 2, 64)
    v, v64 = draw(rng, backend, 60, 2, 64)
    bias = rng.standard_normal(4).astype(np.float32) / 16
    got = pyinfer.single_prefill_with_kv_cache(
        q, k, v, causal=True, variant=variant, variant_args=(backend.array(bias), 0.5)
    )
    want, _ = variant_attention(
        q64, k64, v64, causal=True, logits=lambda s, at: s * 0.5 + bias[at.head] * (at.position - at.j)
    )
    assert_close(backend.float64(got), want, **tolerance(device))


@pytest.mark.cpu
def test_cuda_source_alone_has_no_cpu_form() -> None:
    variant = AttentionVariant("scaled", params=SCALED_PARAMS, cuda_source=SCALED)
    x = np.zeros((2, 1, 8), np.float32)
    with pytest.raises(
        ValueError,
        match=r"variant is CUDA only: got scaled and tensors on the CPU.*Give the functions in Python as well",
    ):
        pyinfer.single_prefill_with_kv_cache(x, x, x, variant=variant, variant_args=(np.zeros(1, np.float32), 1.0))
