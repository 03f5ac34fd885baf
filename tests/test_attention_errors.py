"""Bad input to attention: what, got, wanted, before any launch."""

# ruff: noqa: E501 - the tables below hold one case a line
from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from tests.attention_cases import dtypes

DECODE = "BatchDecodeWithPagedKVCacheWrapper"
PAGED = "BatchPrefillWithPagedKVCacheWrapper"
RAGGED = "BatchPrefillWithRaggedKVCacheWrapper"


class Inputs:
    """Valid arguments of every operator, to be spoilt one at a time."""

    def __init__(self, b, device: str) -> None:
        self.b, self.device, self.dtype = b, device, dtypes(device)[0]
        self.other = dtypes(device)[1]
        self.q = self.zeros(2, 4, 64)
        self.cache = (self.zeros(6, 16, 2, 64), self.zeros(6, 16, 2, 64))
        self.k = self.zeros(9, 2, 64)
        self.table = ([0, 2, 3], [4, 0, 5], [3, 16])

    def zeros(self, *shape: int, dtype: str | None = None):
        return self.b.full(shape, 0, dtype or self.dtype)

    def decode(self, **changes):
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, changes.pop("kv_layout", "NHD"))
        indptr, indices, last = self.table
        args = dict(
            indptr=indptr,
            indices=indices,
            last_page_len=last,
            num_qo_heads=4,
            num_kv_heads=2,
            head_dim=64,
            page_size=16,
            q_data_type=self.dtype,
        )
        wrapper.plan(**{**args, **changes})
        return wrapper

    def paged(self, **changes):
        wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
        args = dict(
            qo_indptr=[0, 1, 2], paged_kv_indptr=self.table[0], paged_kv_indices=self.table[1], paged_kv_last_page_len=self.table[2], num_qo_heads=4,
            num_kv_heads=2, head_dim_qk=64, page_size=16, q_data_type=self.dtype,
        )  # fmt: skip
        wrapper.plan(**{**args, **changes})
        return wrapper

    def ragged(self, **changes):
        wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
        args = dict(
            qo_indptr=[0, 1, 2],
            kv_indptr=[0, 4, 9],
            num_qo_heads=4,
            num_kv_heads=2,
            head_dim_qk=64,
            q_data_type=self.dtype,
        )
        wrapper.plan(**{**args, **changes})
        return wrapper


@pytest.fixture
def x(backend_arrays, device) -> Inputs:
    return Inputs(backend_arrays, device)


def test_the_inputs_are_valid(x):
    assert x.decode().run(x.q, x.cache).shape == (2, 4, 64)
    assert x.paged().run(x.q, x.cache).shape == (2, 4, 64)
    assert x.ragged().run(x.q, x.k, x.k).shape == (2, 4, 64)


def graph_prefill(x, **changes):
    buffers = dict(
        qo_indptr_buf=x.b.array(np.zeros(2), "int32"), paged_kv_indptr_buf=x.b.array(np.zeros(2), "int32"),
        paged_kv_indices_buf=x.b.array(np.zeros(4), "int32"), paged_kv_last_page_len_buf=x.b.array(np.zeros(1), "int32"),
    )  # fmt: skip
    return pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, "NHD", True, **{**buffers, **changes})


def small_workspace(x):
    """A plan that splits, in 64 bytes."""
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(x.b.array(np.zeros(64, np.uint8)))
    wrapper.plan([0, 40], np.arange(40), [16], 4, 2, 64, 16, q_data_type=x.dtype, fixed_split_size=10)


# A case: what is called, the exception, the text (a regular expression).
PLAN_CASES = {
    "decode: indptr start": (lambda x: x.decode(indptr=[1, 2, 3]), ValueError, rf"{DECODE}: paged_kv_indptr does not start at 0: got 1, wanted 0"),
    "decode: indptr decreases": (lambda x: x.decode(indptr=[0, 2, 1]), ValueError, r"paged_kv_indptr decreases: got 1 at entry 2 after 2, wanted a non-decreasing"),
    "decode: last_page_len 0": (lambda x: x.decode(last_page_len=[0, 16]), ValueError, r"paged_kv_last_page_len is out of range: got 0 for request 0 \(2 pages\), wanted 1\.\.16"),
    "decode: last_page_len large": (lambda x: x.decode(last_page_len=[3, 17]), ValueError, r"paged_kv_last_page_len is out of range: got 17 for request 1"),
    "decode: last_page_len count": (lambda x: x.decode(last_page_len=[3]), ValueError, "paged_kv_last_page_len has the wrong length: got 1, wanted 2"),
    "decode: negative page": (lambda x: x.decode(indices=[4, -1, 5]), ValueError, "paged_kv_indices holds a negative page: got -1 at entry 1, wanted 0 or more"),
    "decode: too few pages": (lambda x: x.decode(indices=[4, 0]), ValueError, r"paged_kv_indices is too short: got 2, wanted at least 3 \(paged_kv_indptr\[-1\]\)"),
    "decode: float indptr": (lambda x: x.decode(indptr=np.array([0.0, 2, 3])), TypeError, "indptr holds no integers.*: got float64, wanted int32 or int64"),
    "decode: 2-D indptr": (lambda x: x.decode(indptr=np.zeros((2, 2), np.int32)), ValueError, "indptr has the wrong number of axes: got 2"),
    "decode: no tensor": (lambda x: x.decode(indptr="abc"), TypeError, "indptr is no tensor: got builtins.str"),
    "decode: page_size": (lambda x: x.decode(page_size=0), ValueError, "page_size is no page size: got 0, wanted 1 or more"),
    "decode: heads": (lambda x: x.decode(num_qo_heads=5), ValueError, "num_qo_heads does not divide among the kv heads: got 5 query heads, 2 kv heads, wanted a multiple"),
    "decode: no heads": (lambda x: x.decode(num_kv_heads=0), ValueError, "num_qo_heads does not divide among the kv heads: got 4 query heads, 0 kv heads"),
    "decode: q_data_type": (lambda x: x.decode(q_data_type="float12"), TypeError, "q_data_type is no element type known here: got 'float12'"),
    "decode: int type": (lambda x: x.decode(q_data_type="int32"), TypeError, r"q_data_type has no \w+ kernel: got int32, wanted float16 or bfloat16"),
    "decode: o_data_type": (lambda x: x.decode(o_data_type="int32"), TypeError, "o_data_type is no output dtype: got int32, wanted None, float16, bfloat16 or float32"),
    "decode: fp8 q": (lambda x: x.decode(q_data_type="float8_e4m3fn"), TypeError, r"q_data_type has no \w+ kernel: got float8_e4m3fn"),
    "decode: large group": (lambda x: x.decode(num_qo_heads=258), ValueError, r"num_qo_heads makes too large a group: got 129 \(258 query heads, 2 kv heads\), wanted at most 128"),
    "decode: rope_theta": (lambda x: x.decode(pos_encoding_mode="ROPE_LLAMA", rope_theta=0), ValueError, "rope_theta is no positive number: got 0.0"),
    "decode: rope_scale": (lambda x: x.decode(pos_encoding_mode="ROPE_LLAMA", rope_scale=float("inf")), ValueError, "rope_scale is no positive number: got inf"),
    "decode: rope_scale off": (lambda x: x.decode(rope_scale=2.0), ValueError, "rope_scale does nothing with pos_encoding_mode 'NONE': got 2.0, wanted None"),
    "decode: rope_theta off": (lambda x: x.decode(pos_encoding_mode="ALIBI", rope_theta=5e5), ValueError, "rope_theta does nothing with pos_encoding_mode 'ALIBI': got 500000.0, wanted None. Pass pos_encoding_mode='ROPE_LLAMA', or leave it out if queries and keys are rotated already."),
    "decode: two types": (lambda x: x.decode(kv_data_type=x.other), TypeError, r"kv_data_type differs from q_data_type: got \w+, wanted \w+ \(q's\), float8_e4m3fn or float8_e5m2"),
    "decode: nonsense encoding": (lambda x: x.decode(pos_encoding_mode="rope"), ValueError, "pos_encoding_mode is no positional encoding: got 'rope'"),
    "decode: window": (lambda x: x.decode(window_left=-2), ValueError, r"window_left is no window: got -2, wanted -1 \(none\)"),
    "decode: soft cap": (lambda x: x.decode(logits_soft_cap=-1.0), ValueError, "logits_soft_cap is no soft cap: got -1.0"),
    "decode: soft cap nan": (lambda x: x.decode(logits_soft_cap=float("nan")), ValueError, "logits_soft_cap is no soft cap: got nan"),
    "decode: sm_scale": (lambda x: x.decode(sm_scale="large"), TypeError, "sm_scale is no number: got str, wanted a float"),
    "decode: block_tables": (lambda x: x.decode(block_tables=x.q), ValueError, "block_tables is not supported: got Tensor, wanted None. It belongs to the trtllm-gen backend"),
    "decode: split size": (lambda x: x.decode(fixed_split_size=0), ValueError, "fixed_split_size is no number of pages: got 0, wanted 1 or more"),
    "decode: layout": (lambda x: x.decode(kv_layout="NDH"), ValueError, f"{DECODE}: kv_layout is no layout: got 'NDH', wanted 'NHD' or 'HND'"),
    "paged: qo_indptr": (lambda x: x.paged(qo_indptr=[0, 2, 1]), ValueError, f"{PAGED}: qo_indptr decreases: got 1 at entry 2 after 2"),
    "paged: qo_indptr start": (lambda x: x.paged(qo_indptr=[1, 1, 2]), ValueError, "qo_indptr does not start at 0: got 1"),
    "paged: qo_indptr length": (lambda x: x.paged(qo_indptr=[0, 1]), ValueError, r"qo_indptr has the wrong length: got 2, wanted 3 \(as paged_kv_indptr\)"),
    "paged: qo_indptr empty": (lambda x: x.paged(qo_indptr=[]), ValueError, "qo_indptr is empty: got 0 entries, wanted batch_size \\+ 1 entries"),
    "paged: custom mask": (lambda x: x.paged(custom_mask=x.q), TypeError, "custom_mask has the wrong dtype: got float"),
    "paged: custom mask size": (lambda x: x.paged(custom_mask=x.b.array(np.ones(34, bool))), ValueError, r"custom_mask has the wrong size: got 34 \(shape \(34,\)\), wanted 35 \(the sum of qo_len \* kv_len\)"),
    "paged: packed mask": (lambda x: x.paged(packed_custom_mask=x.q), TypeError, "packed_custom_mask has the wrong dtype"),
    "paged: packed mask axes": (lambda x: x.paged(packed_custom_mask=x.b.array(np.ones((2, 3), np.uint8))), ValueError, "packed_custom_mask has the wrong number of axes: got 2"),
    "paged: packed mask size": (lambda x: x.paged(packed_custom_mask=x.b.array(np.ones(4, np.uint8))), ValueError, "packed_custom_mask is too short: got 4 bytes, wanted 5"),
    "paged: multi-item": (lambda x: x.paged(prefix_len_ptr=x.q), ValueError, "token_pos_in_items_ptr is missing: got None"),
    "paged: multi-item length": (lambda x: x.paged(token_pos_in_items_len=4), ValueError, "token_pos_in_items_len was given without prefix_len_ptr"),
    "paged: multi-item zero": (lambda x: x.paged(prefix_len_ptr=[1, 1], token_pos_in_items_ptr=[0, 0]), ValueError, "token_pos_in_items_len is no length: got 0, wanted 1 or more"),
    "paged: multi-item batch": (lambda x: x.paged(prefix_len_ptr=[1], token_pos_in_items_ptr=[0, 0], token_pos_in_items_len=1), ValueError, "prefix_len_ptr is too short: got 1 entries, wanted at least 2"),
    "paged: multi-item places": (lambda x: x.paged(prefix_len_ptr=[1, 1], token_pos_in_items_ptr=[0], token_pos_in_items_len=1), ValueError, "token_pos_in_items_ptr is too short: got 1 entries, wanted at least 2"),
    "paged: multi-item range": (lambda x: x.paged(prefix_len_ptr=[1, 1], token_pos_in_items_ptr=[0, 70000], token_pos_in_items_len=1), ValueError, "token_pos_in_items_ptr does not fit uint16: got values from 0 to 70000"),
    "paged: two masks": (lambda x: x.paged(prefix_len_ptr=[1, 1], token_pos_in_items_ptr=[0, 0], token_pos_in_items_len=1, custom_mask=x.b.array(np.ones(35, bool))), ValueError, "custom_mask excludes multi-item scoring"),
    "ragged: kv_indptr": (lambda x: x.ragged(kv_indptr=[0, 4, 3]), ValueError, f"{RAGGED}: kv_indptr decreases: got 3 at entry 2 after 4"),
    "ragged: lengths": (lambda x: x.ragged(kv_indptr=[0, 4]), ValueError, r"qo_indptr has the wrong length: got 3, wanted 2 \(as kv_indptr\)"),
    "head_dim": (lambda x: x.decode(head_dim=0), ValueError, "head_dim is no head dimension: got 0, wanted 1 or more"),
    "backend": (lambda x: pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, backend="cudnn"), ValueError, "backend is not available: got 'cudnn', wanted 'auto', 'fa2' or 'fa3'"),
    "workspace": (lambda x: pyinfer.BatchDecodeWithPagedKVCacheWrapper("128MB"), TypeError, "float_workspace_buffer is no tensor: got builtins.str"),
    "mask buffer": (lambda x: graph_prefill(x, custom_mask_buf=x.q[0, 0]), TypeError, "custom_mask_buf has the wrong dtype: got \\w+, wanted uint8"),
    "no mask buffer": (lambda x: graph_prefill(x).plan([0, 1], [0, 1], [0], [16], 4, 2, 64, 16, q_data_type=x.dtype, custom_mask=x.b.array(np.ones(16, bool))), ValueError, "custom_mask_buf is missing: got None, wanted a tensor that stays where it is. A plan with a custom mask needs it"),
    "workspace size": (lambda x: small_workspace(x), ValueError, r"float_workspace_buffer is too small: got 64 bytes, wanted \d+ for this plan. Pass a larger one"),
}  # fmt: skip

RUN_CASES = {
    "before plan": (lambda x: pyinfer.BatchDecodeWithPagedKVCacheWrapper().run(x.q, x.cache), ValueError, rf"{DECODE}: plan\(\) was not called: got run\(\) first, wanted plan\(\) before run\(\)"),
    "before plan, paged": (lambda x: pyinfer.BatchPrefillWithPagedKVCacheWrapper().run(x.q, x.cache), ValueError, rf"{PAGED}: plan\(\) was not called"),
    "before plan, ragged": (lambda x: pyinfer.BatchPrefillWithRaggedKVCacheWrapper().run(x.q, x.k, x.k), ValueError, rf"{RAGGED}: plan\(\) was not called"),
    "q no tensor": (lambda x: x.decode().run([1], x.cache), TypeError, "q is no tensor: got builtins.list"),
    "q rank": (lambda x: x.decode().run(x.q[0], x.cache), ValueError, r"q has the wrong number of axes: got 2 \(shape \(4, 64\)\), wanted 3"),
    "q rows": (lambda x: x.decode().run(x.zeros(3, 4, 64), x.cache), ValueError, r"q has the wrong shape: got \(3, 4, 64\), wanted \(2, 4, 64\)"),
    "q heads": (lambda x: x.decode().run(x.zeros(2, 2, 64), x.cache), ValueError, r"q has the wrong shape: got \(2, 2, 64\), wanted \(2, 4, 64\)"),
    "q dtype": (lambda x: x.decode().run(x.zeros(2, 4, 64, dtype=x.other), x.cache), TypeError, r"q differs from the planned dtype: got \w+, wanted \w+\. Pass q_data_type to plan\(\)"),
    "q stride": (lambda x: x.decode().run(x.zeros(2, 64, 4).transpose(1, 2), x.cache), ValueError, r"q is not contiguous in its last axis: got strides \(256, 1, 4\) for shape \(2, 4, 64\), wanted last stride 1. Call .contiguous\(\)"),
    "cache list": (lambda x: x.decode().run(x.q, list(x.cache)), TypeError, r"paged_kv_cache is a list: got list, wanted a tuple .* Pass tuple\(paged_kv_cache\)"),
    "cache triple": (lambda x: x.decode().run(x.q, (*x.cache, x.q)), ValueError, "paged_kv_cache is no pair: got a tuple of 3"),
    "cache rank": (lambda x: x.decode().run(x.q, x.cache[0]), ValueError, r"paged_kv_cache has the wrong number of axes: got 4 \(shape \(6, 16, 2, 64\)\), wanted 5"),
    "cache axis": (lambda x: x.decode().run(x.q, x.zeros(6, 3, 16, 2, 64)), ValueError, r"paged_kv_cache does not hold K and V in axis 1: got shape \(6, 3, 16, 2, 64\), wanted \[pages, 2, page_size, heads, dim\]"),
    "cache page size": (lambda x: x.decode().run(x.q, (x.zeros(6, 8, 2, 64),) * 2), ValueError, r"paged_kv_cache \(K\) has the wrong shape: got \(6, 8, 2, 64\), wanted \(any, 16, 2, 64\)"),
    "cache heads": (lambda x: x.decode().run(x.q, (x.cache[0], x.zeros(6, 16, 4, 64))), ValueError, r"paged_kv_cache \(V\) has the wrong shape: got \(6, 16, 4, 64\), wanted \(any, 16, 2, 64\)"),
    "cache layout": (lambda x: x.decode(kv_layout="HND").run(x.q, x.cache), ValueError, r"paged_kv_cache \(K\) has the wrong shape: got \(6, 16, 2, 64\), wanted \(any, 2, 16, 64\)"),
    "cache dtype": (lambda x: x.decode().run(x.q, (x.zeros(6, 16, 2, 64, dtype=x.other),) * 2), TypeError, r"paged_kv_cache \(K\) differs from the planned dtype"),
    "cache fp8": (lambda x: x.decode().run(x.q, (x.zeros(6, 16, 2, 64, dtype="float8_e4m3fn"),) * 2), TypeError, "got float8_e4m3fn, wanted .* Pass kv_data_type to plan"),
    "cache stride": (lambda x: x.decode().run(x.q, (x.zeros(6, 16, 64, 2).transpose(2, 3),) * 2), ValueError, r"paged_kv_cache \(K\) is not contiguous in its last axis"),
    "page outside": (lambda x: x.decode(indices=[4, 6, 5]).run(x.q, x.cache), ValueError, r"paged_kv_indices names a page outside the cache: got 6, wanted 0\.\.5 \(paged_kv_cache \(K\) has 6 pages\)"),
    "window": (lambda x: x.decode(window_left=5).run(x.q, x.cache, window_left=6), ValueError, r"window_left differs from the plan: got 6, wanted 5. It is an argument of plan\(\)"),
    "extra arguments": (lambda x: x.decode().run(x.q, x.cache, x.q), TypeError, r"\*args are not supported: got 1 extra arguments"),
    "sinks": (lambda x: x.decode().run(x.q, x.cache, sinks=x.zeros(4, dtype="float16")), TypeError, "sinks has the wrong dtype: got float16, wanted float32"),
    "sinks shape": (lambda x: x.decode().run(x.q, x.cache, sinks=x.zeros(2, dtype="float32")), ValueError, r"sinks has the wrong shape: got \(2,\), wanted \(4,?\)"),
    "sinks stride": (lambda x: x.decode().run(x.q, x.cache, sinks=x.zeros(8, dtype="float32")[::2]), ValueError, r"sinks is not contiguous: got strides \(2,\)"),
    "v_scale": (lambda x: x.decode().run(x.q, x.cache, v_scale="2x"), TypeError, "v_scale is no number: got str"),
    "k_scale per head": (lambda x: x.decode().run(x.q, x.cache, k_scale=np.ones(2)), ValueError, r"k_scale is not one number: got shape \(2,\)"),
    "out shape": (lambda x: x.decode().run(x.q, x.cache, out=x.zeros(2, 4, 32)), ValueError, r"out has the wrong shape: got \(2, 4, 32\), wanted \(2, 4, 64\)"),
    "out dtype": (lambda x: x.decode().run(x.q, x.cache, out=x.zeros(2, 4, 64, dtype=x.other)), TypeError, "out has the wrong dtype"),
    "out stride": (lambda x: x.decode().run(x.q, x.cache, out=x.zeros(2, 64, 4).transpose(1, 2)), ValueError, "out is not contiguous in its last axis"),
    "lse shape": (lambda x: x.decode().run(x.q, x.cache, lse=x.zeros(2, 3, dtype="float32"), return_lse=True), ValueError, r"lse has the wrong shape: got \(2, 3\), wanted \(2, 4\)"),
    "lse dtype": (lambda x: x.decode().run(x.q, x.cache, lse=x.zeros(2, 4, dtype="float16"), return_lse=True), TypeError, "lse has the wrong dtype: got float16, wanted float32"),
    "lse stride": (lambda x: x.decode().run(x.q, x.cache, lse=x.zeros(2, 8, dtype="float32")[:, :4], return_lse=True), ValueError, r"lse is not contiguous: got strides \(8, 1\)"),
    "paged q rows": (lambda x: x.paged().run(x.zeros(5, 4, 64), x.cache), ValueError, rf"{PAGED}: q has the wrong shape: got \(5, 4, 64\), wanted \(2, 4, 64\)"),
    "ragged k rank": (lambda x: x.ragged().run(x.q, x.k[0], x.k), ValueError, f"{RAGGED}: k has the wrong number of axes: got 2"),
    "ragged k heads": (lambda x: x.ragged().run(x.q, x.zeros(9, 4, 64), x.k), ValueError, r"k has the wrong shape: got \(9, 4, 64\), wanted \(any, 2, 64\)"),
    "ragged v short": (lambda x: x.ragged().run(x.q, x.k, x.k[:8]), ValueError, r"v is shorter than the plan: got 8 tokens, wanted at least 9 \(kv_indptr\[-1\]\)"),
}  # fmt: skip

SINGLE_CASES = {
    "decode q rank": (lambda x: pyinfer.single_decode_with_kv_cache(x.q, x.k, x.k), ValueError, "single_decode_with_kv_cache: q has the wrong number of axes: got 3"),
    "decode heads": (lambda x: pyinfer.single_decode_with_kv_cache(x.zeros(3, 64), x.k, x.k), ValueError, "q does not divide among the kv heads: got 3 query heads, 2 kv heads"),
    "decode layout": (lambda x: pyinfer.single_decode_with_kv_cache(x.q[0], x.k, x.k, "nhd"), ValueError, "kv_layout is no layout: got 'nhd'"),
    "decode encoding": (lambda x: pyinfer.single_decode_with_kv_cache(x.q[0], x.k, x.k, "NHD", "alibi"), ValueError, "pos_encoding_mode is no positional encoding: got 'alibi'"),
    "v dtype": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.zeros(9, 2, 64, dtype="float8_e5m2"), x.k), TypeError, "v differs in dtype from k: got \\w+, wanted float8_e5m2"),
    "k rank": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k[0], x.k), ValueError, r"single_prefill_with_kv_cache: k has the wrong number of axes: got 2 \(shape \(2, 64\)\), wanted 3: \[kv_len, num_kv_heads, head_dim\] \(NHD\)"),
    "k dtype": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.zeros(9, 2, 64, dtype=x.other), x.k), TypeError, "k differs in dtype from q"),
    "k dim": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.zeros(9, 2, 32), x.k), ValueError, r"k differs from q in head_dim: got 32 \(shape \(9, 2, 32\)\), wanted 64 \(q's\)"),
    "v length": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k, x.k[:4]), ValueError, r"v differs from k in its first axes: got \(4, 2, 64\), wanted \(9, 2, any\)"),
    "v stride": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k, x.zeros(9, 64, 2).transpose(1, 2)), ValueError, "v is not contiguous in its last axis"),
    "custom mask": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k, x.k, custom_mask=x.b.array(np.ones((2, 8), bool))), ValueError, r"custom_mask has the wrong size: got 16 \(shape \(2, 8\)\), wanted 18"),
    "o_dtype": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k, x.k, o_dtype="int8"), TypeError, "o_dtype is no output dtype: got int8"),
    "integers": (lambda x: pyinfer.single_prefill_with_kv_cache(*(x.zeros(4, 2, 64, dtype="int32"),) * 3), TypeError, r"q has no \w+ kernel: got int32"),
    "head_dim": (lambda x: pyinfer.single_prefill_with_kv_cache(*(x.zeros(4, 2, 512),) * 3), ValueError, r"head_dim has no \w+ kernel: got 512 \(qk\), 512 \(vo\)"),
    "two scales": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k, x.k, scale_k=2.0, k_scale=2.0), ValueError, "k_scale was given twice: got both, wanted scale_k or k_scale"),
    "scale per head": (lambda x: pyinfer.single_prefill_with_kv_cache(x.q, x.k, x.k, np.ones(4)), ValueError, r"scale_q is not one number: got shape \(4,\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*PLAN_CASES, *RUN_CASES, *SINGLE_CASES])
def test_message(x, name):
    call, error, text = {**PLAN_CASES, **RUN_CASES, **SINGLE_CASES}[name]
    with pytest.raises(error, match=text):
        call(x)


def test_a_bad_plan_leaves_the_last_one(x):
    wrapper = x.decode()
    good = wrapper.plan_info
    with pytest.raises(ValueError, match="decreases"):
        wrapper.plan([0, 2, 1], *x.table[1:], 4, 2, 64, 16, q_data_type=x.dtype)
    with pytest.raises(TypeError, match="has no"):
        wrapper.plan(*x.table, 4, 2, 64, 16, q_data_type="int32")
    assert wrapper.plan_info is good
    wrapper.run(x.q, x.cache)


def graph_decode(x, batch=2, pages=4, **changes):
    b = x.b
    buffers = dict(
        paged_kv_indptr_buffer=b.array(np.zeros(batch + 1), "int32"), paged_kv_indices_buffer=b.array(np.zeros(pages), "int32"),
        paged_kv_last_page_len_buffer=b.array(np.zeros(batch), "int32"),
    )  # fmt: skip
    return pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD", True, **{**buffers, **changes})


def test_graph_mode_messages(x):
    with pytest.raises(
        ValueError,
        match=rf"{DECODE}: paged_kv_indices_buffer is missing: got None, wanted an int32 tensor\. CUDA graph mode needs",
    ):
        graph_decode(x, paged_kv_indices_buffer=None)
    with pytest.raises(TypeError, match="paged_kv_indptr_buffer has the wrong dtype: got int64, wanted int32"):
        graph_decode(x, paged_kv_indptr_buffer=x.b.array(np.zeros(3), "int64"))
    with pytest.raises(ValueError, match=r"paged_kv_indptr_buffer has the wrong length: got 5, wanted 3"):
        graph_decode(x, paged_kv_indptr_buffer=x.b.array(np.zeros(5), "int32"))
    shape = dict(num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, q_data_type=x.dtype)
    wrapper = graph_decode(x)
    with pytest.raises(
        ValueError,
        match=r"paged_kv_indptr_buffer does not fit the plan: got 3 entries, wanted 2 for this plan\. The buffers fix the batch size",
    ):
        wrapper.plan([0, 1], [0], [1], **shape)
    with pytest.raises(ValueError, match="paged_kv_indices_buffer is too small: got 4 entries, wanted 5 for this plan"):
        wrapper.plan([0, 3, 5], [0, 1, 2, 3, 4], [1, 1], **shape)
    with pytest.raises(ValueError, match="holds a negative page"):  # a bad first plan fixes nothing
        wrapper.plan([0, 1, 2], [0, -1], [1, 1], **{**shape, "num_qo_heads": 8})
    wrapper.plan([0, 1, 2], [0, 1], [1, 1], **shape)
    with pytest.raises(
        ValueError,
        match=r"num_qo_heads differs from the first plan: got 8, wanted 4\. In CUDA graph mode the first plan fixes it",
    ):
        wrapper.plan([0, 1, 2], [0, 1], [1, 1], **{**shape, "num_qo_heads": 8})


def test_graph_mode_prefill_rows(x):
    b = x.b
    buffers = [b.array(np.zeros(n), "int32") for n in (3, 3, 8, 2)]
    wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, "NHD", True, *buffers)
    args = ([0, 1, 2], [0, 1], [16, 16], 4, 2, 64, 16)
    wrapper.plan([0, 4, 8], *args, q_data_type=x.dtype)
    wrapper.plan([0, 8, 8], *args, q_data_type=x.dtype)
    with pytest.raises(
        ValueError,
        match=rf"{PAGED}: qo_indptr has more query rows than the first plan: got 9, wanted at most 8\. In CUDA graph mode",
    ):
        wrapper.plan([0, 4, 9], *args, q_data_type=x.dtype)


@pytest.mark.gpu
def test_devices_must_agree(x):
    import torch

    cpu = torch.zeros(2, 4, 64, dtype=torch.float16)
    with pytest.raises(
        ValueError, match=r"paged_kv_cache \(K\) is on another device: got cpu, wanted cuda:0 \(where q is\)"
    ):
        x.decode().run(x.q, (torch.zeros(6, 16, 2, 64, dtype=torch.float16),) * 2)
    with pytest.raises(ValueError, match="k is on another device: got cpu, wanted cuda:0"):
        pyinfer.single_prefill_with_kv_cache(x.q, torch.zeros(9, 2, 64, dtype=torch.float16), x.k)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(x.b.array(np.zeros(1 << 24, np.uint8)))
    wrapper.plan(*x.table, 4, 2, 64, 16)
    with pytest.raises(ValueError, match="q is on another device: got cpu, wanted cuda:0 "):
        wrapper.run(cpu, x.cache)
    with pytest.raises(ValueError, match="out is on another device: got cpu"):
        wrapper.run(x.q, x.cache, out=cpu)
    with pytest.raises(TypeError, match="has no CUDA kernel: got float32"):
        pyinfer.single_prefill_with_kv_cache(*(torch.zeros(4, 2, 64, device="cuda"),) * 3)
    with pytest.raises(
        ValueError,
        match=r"head_dim has no CUDA kernel: got 81 \(qk\), 81 \(vo\), wanted multiples of 8 up to 256. Pad",
    ):
        pyinfer.single_prefill_with_kv_cache(*(torch.zeros(4, 2, 81, dtype=torch.float16, device="cuda"),) * 3)
