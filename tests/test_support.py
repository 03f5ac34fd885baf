"""pyinfer.support: what can be selected, and the exceptions' own words where it cannot."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import pyinfer
from pyinfer import _support_ask

PREFILL, DECODE = "single_prefill_with_kv_cache", "BatchDecodeWithPagedKVCacheWrapper"
WRAPPERS = sorted(_support_ask._WRAPPERS)
OPERATORS = sorted(_support_ask._PLAIN)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"head_dim": 72, "kv_data_type": "float8_e5m2", "o_data_type": "float32"},
        {"head_dim_qk": 192, "head_dim_vo": 128, "q_data_type": "bfloat16"},
        {"num_qo_heads": 128, "pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 5e5},
        {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 30.0, "window_left": 0, "kv_layout": "HND", "backend": "fa2"},
    ],
    ids=str,
)
@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", 0, -1])
@pytest.mark.parametrize("op", ["BatchPrefillWithRaggedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper", PREFILL])
def test_what_can_be_selected(op, device, config):
    answer = pyinfer.support(op, device=device, custom_mask=True, **config)
    assert answer and answer.selectable and answer.reason == ""


REFUSED = [
    ("cuda", {"q_data_type": "float32"}, "q_data_type has no CUDA kernel: got float32, wanted float16 or bfloat16"),
    ("cpu", {"q_data_type": "float64"}, "q_data_type has no CPU kernel: got float64"),
    ("cuda", {"head_dim": 100}, "head_dim has no CUDA kernel: got 100 (qk), 100 (vo), wanted multiples of 8 up to 256"),
    ("cpu", {"head_dim": 264}, "head_dim has no CPU kernel: got 264 (qk), 264 (vo), wanted 1..256"),
    ("cpu", {"head_dim": 33, "pos_encoding_mode": "ROPE_LLAMA"}, "head_dim cannot be rotated in pairs: got 33 (qk)"),
    ("cpu", {"kv_data_type": "bfloat16"}, "kv_data_type differs from q_data_type: got bfloat16, wanted float16 (q's)"),
    ("cpu", {"o_data_type": "int8"}, "o_data_type is no output dtype: got int8"),
    ("cpu", {"num_qo_heads": 6, "num_kv_heads": 4}, "num_qo_heads does not divide among the kv heads"),
    ("cpu", {"num_qo_heads": 129}, "num_qo_heads makes too large a group: got 129"),
    ("cpu", {"backend": "trtllm-gen"}, "backend is not available: got 'trtllm-gen', wanted 'auto'"),
    ("cpu", {"kv_layout": "nhd"}, "kv_layout is no layout: got 'nhd'"),
    ("cpu", {"pos_encoding_mode": "rope"}, "pos_encoding_mode is no positional encoding: got 'rope'"),
    ("cpu", {"rope_theta": -1}, "rope_theta is no positive number: got -1.0"),
    ("cpu", {"logits_soft_cap": float("nan")}, "logits_soft_cap is no soft cap: got nan"),
    ("cpu", {"window_left": -2}, "window_left is no window: got -2"),
    ("cpu", {"page_size": 0}, "page_size is no page size: got 0, wanted 1 or more"),
    (
        "cpu",
        {"custom_mask": True},
        "custom_mask is no argument here: got True, wanted a prefill or block-sparse wrapper",
    ),
    ("cuda", {"fixed_split_size": 0}, "fixed_split_size is no number of pages: got 0"),
]


@pytest.mark.parametrize(("device", "config", "text"), REFUSED, ids=[str(c) for _, c, _ in REFUSED])
def test_why_it_cannot(device, config, text):
    answer = pyinfer.support(DECODE, device=device, **config)
    assert not answer and not answer.selectable
    assert answer.reason.startswith(f"{DECODE}: {text}")


@pytest.mark.parametrize(
    "config",
    [
        config
        for device, config, _ in REFUSED
        if device == "cpu" and not {"custom_mask", "backend", "kv_layout"} & set(config)
    ],
    ids=str,
)
@pytest.mark.cpu
def test_the_reason_is_the_exception(config):
    """plan() for the CPU raises what support() says, word for word."""
    reason = pyinfer.support(DECODE, device="cpu", **config).reason
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    args = {"num_qo_heads": 1, "num_kv_heads": 1, "head_dim": 64, "page_size": 16, **config}
    with pytest.raises((ValueError, TypeError)) as error:
        wrapper.plan([0, 1], [0], [1], **args)
    assert str(error.value) == reason


def test_a_single_call_raises_the_reason(backend_arrays, device):
    q = backend_arrays.array(np.zeros((2, 1, 300)), "float16")
    with pytest.raises(ValueError) as error:
        pyinfer.single_prefill_with_kv_cache(q, q, q)
    assert str(error.value) == pyinfer.support(PREFILL, device=device, head_dim=300).reason


# ---- every wrapper, every operator ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", [*WRAPPERS, *OPERATORS])
def test_defaults_are_taken(op, device):
    """A question without a configuration is about one that everything takes: were its tensors malformed, the operator would say so."""
    assert pyinfer.support(op, device=device).reason == ""


def test_every_wrapper_can_be_asked_about():
    classes = {
        n for names in pyinfer._FAMILIES.values() for n in names if n.endswith("Wrapper") or n == "BatchAttention"
    }
    assert classes == set(WRAPPERS)


WRAPPER_CASES = [
    ("BatchAttention", {"q_data_type": "float64"}, "q_data_type has no {} kernel: got float64"),
    ("BatchAttention", {"head_dim": 300}, "head_dim has no {} kernel: got 300 (qk), 300 (vo)"),
    ("BatchAttention", {"use_profiler": True}, "use_profiler is not available: got True, wanted False"),
    ("BatchAttention", {"page_size": 0}, "page_size is no page size"),
    ("BatchAttentionWithAttentionSinkWrapper", {"o_data_type": "int32"}, "o_data_type is no output dtype: got int32"),
    ("MultiLevelCascadeAttentionWrapper", {"num_levels": 0}, "num_levels is no number of levels: got 0, wanted 1 or more"),
    ("MultiLevelCascadeAttentionWrapper", {"window_left": 3}, "window_left does not reach across levels: got 3"),
    ("MultiLevelCascadeAttentionWrapper", {"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode does not reach across levels: got 'ALIBI'"),
    ("MultiLevelCascadeAttentionWrapper", {"head_dim": 257}, "head_dim has no {} kernel: got 257 (qk), 257 (vo)"),
    ("BatchDecodeWithSharedPrefixPagedKVCacheWrapper", {"data_type": "int8"}, "q_data_type has no {} kernel: got int8"),
    ("BatchPrefillWithSharedPrefixPagedKVCacheWrapper", {"q_data_type": "int8"}, "q_data_type has no {} kernel: got int8"),
    ("BatchPrefillWithSharedPrefixPagedKVCacheWrapper", {"kv_layout": "DHN"}, "kv_layout is no layout: got 'DHN'"),
    ("PODWithPagedKVCacheWrapper", {"num_qo_heads": 3, "num_kv_heads": 2}, "num_qo_heads does not divide among the kv heads: got 3 query heads, 2 kv heads"),
    ("PODWithPagedKVCacheWrapper", {"jit_args": ("uri",)}, "jit_args is not supported: got tuple, wanted None"),
    ("BlockSparseAttentionWrapper", {"R": 0}, "R is no block size: got 0, wanted 1 or more"),
    ("BlockSparseAttentionWrapper", {"M": 17}, "M is no multiple of R: got 17 (R 16), wanted a multiple of 16"),
    ("BlockSparseAttentionWrapper", {"head_dim": 512}, "head_dim has no {} kernel: got 512 (qk)"),
    ("VariableBlockSparseAttentionWrapper", {"num_qo_heads": 500}, "num_qo_heads makes too large a group: got 500"),
    ("VariableBlockSparseAttentionWrapper", {"logits_soft_cap": -1}, "logits_soft_cap is no soft cap: got -1"),
    ("BatchMLAPagedAttentionWrapper", {"q_data_type": "int8"}, "q_data_type has no {} kernel: got int8"),
    ("BatchMLAPagedAttentionWrapper", {"num_heads": 0}, "num_heads is no head count: got 0"),
    ("BatchMLAPagedAttentionWrapper", {"sm_scale": None}, "sm_scale is missing: got None"),
    ("BatchMLAPagedAttentionWrapper", {"head_dim_ckv": 2048}, "head_dim_ckv has no {} kernel: got 2048 (ckv), 64 (kpe)"),
    ("BatchDecodeMlaWithPagedKVCacheWrapper", {"use_tensor_cores": False}, "use_tensor_cores asks for a kernel that rotates q_pe and kpe itself: got False"),
    ("CUDAGraphBatchDecodeWithPagedKVCacheWrapper", {"head_dim": 0}, "head_dim is no head dimension: got 0"),
    ("BatchPrefillWithRaggedKVCacheWrapper", {"rope_scale": 0.0}, "rope_scale is no positive number: got 0.0"),
    ("BatchPrefillWithPagedKVCacheWrapper", {"token_pos_in_items_len": 4}, "token_pos_in_items_len was given without prefix_len_ptr"),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("op", "config", "text"), WRAPPER_CASES, ids=[f"{op}-{c}" for op, c, _ in WRAPPER_CASES])
def test_wrappers(op, config, text, device):
    assert pyinfer.support(op, device=device, **config).reason.startswith(f"{op}: {text.format(device.upper())}")


OPERATOR_CASES = [
    ("rmsnorm", {"dtype": "int32"}, "input has the wrong dtype: got int32"),
    ("gemma_fused_add_rmsnorm", {"dtype": "float64"}, "input has the wrong dtype: got float64"),
    ("rmsnorm_quant", {"quantize_dtype": "int32"}, "out has the wrong dtype: got int32"),
    ("layernorm", {"dtype": "int8"}, "input has the wrong dtype: got int8"),
    ("silu_and_mul_quant", {"quantize_dtype": "float16"}, "out has the wrong dtype: got float16"),
    ("tinygemm_bf16", {"dtype": "float32"}, "input has the wrong dtype: got float32"),
    ("top_k", {"k": -1}, "k "),
    ("silu_and_mul", {"hidden": 3}, "input has a last axis of the wrong length: got 12 bytes"),
    ("apply_rope", {"head_dim": 64, "rotary_dim": 66}, "rotary_dim cannot be rotated: got 66"),
    ("apply_llama31_rope_pos_ids_inplace", {"rotary_dim": 7}, "rotary_dim cannot be rotated: got 7, wanted an even number from 2 to 128 (head_dim 128)"),
    ("apply_rope_with_cos_sin_cache", {"cache_dtype": "float16"}, "cos_sin_cache"),
    ("append_paged_kv_cache", {"kv_layout": "x"}, "kv_layout is no layout: got 'x'"),
    ("append_paged_kv_cache", {"kv_data_type": "float32"}, "append_key differs in dtype"),
    ("append_paged_kv_cache", {"page_size": 0}, "paged_kv_cache (K) has pages of no tokens: got 0"),
    ("append_paged_mla_kv_cache", {"kv_data_type": "bfloat16"}, "append_ckv differs in dtype"),
    ("get_batch_indices_positions", {"nnz": -1}, "nnz is negative: got -1"),
    ("get_seq_lens", {"page_size": 0}, "page_size is too small: got 0"),
    ("merge_state", {"dtype": "int8"}, "v_a has the wrong dtype: got int8"),
    ("merge_states", {"dtype": "int8"}, "v has the wrong dtype: got int8"),
    ("merge_state_in_place", {"dtype": "float64"}, "v has the wrong dtype: got float64"),
    ("softmax", {"vocab": 300_000}, "logits has an unsupported vocabulary: got 300000"),
    ("sampling_from_probs", {"vocab": 0}, "probs has an unsupported vocabulary: got 0"),
    ("top_k_sampling_from_probs", {"top_k": 0}, "top_k is out of range: got 0"),
    ("top_k_top_p_sampling_from_logits", {"filter_apply_order": "x"}, "filter_apply_order is unknown: got 'x'"),
    ("chain_speculative_sampling", {"dtype": "int32"}, "target_probs has the wrong dtype: got int32"),
    ("packbits", {"dtype": "int32"}, "x has the wrong dtype: got int32"),
    ("segment_packbits", {"bitorder": "middle"}, "bitorder is no bit order: got 'middle'"),
    ("single_decode_with_kv_cache", {"window_left": -3}, "window_left is no window: got -3"),
    ("single_decode_with_kv_cache", {"custom_mask": True}, "custom_mask is no argument here: got True, wanted a prefill operator"),
    (PREFILL, {"o_data_type": "int8", "custom_mask": True}, "o_dtype is no output dtype: got int8"),
    (PREFILL, {"custom_mask": True, "logits_soft_cap": -2}, "logits_soft_cap is no soft cap: got -2"),
]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("op", "config", "text"), OPERATOR_CASES, ids=[f"{op}-{c}" for op, c, _ in OPERATOR_CASES])
def test_operators(op, config, text, device):
    assert pyinfer.support(op, device=device, **config).reason.startswith(f"{op}: {text}")


def test_operators_raise_the_reason(backend_arrays, device):
    """The same call with tensors that are there, made of what the question was made of."""
    b = backend_arrays

    def zeros(dtype, *shape):
        return b.array(np.zeros(shape), dtype)

    calls = {
        "rmsnorm": ({"dtype": "float64", "hidden": 8}, lambda: pyinfer.rmsnorm(zeros("float64", 3, 8), zeros("float64", 8))),
        "silu_and_mul": ({"hidden": 3}, lambda: pyinfer.silu_and_mul(zeros("float16", 3, 6))),
        "apply_rope_pos_ids": ({"head_dim": 9}, lambda: pyinfer.apply_rope_pos_ids(zeros("float16", 3, 1, 9), zeros("float16", 3, 1, 9), zeros("int32", 3))),
        "top_p_renorm_probs": ({"top_p": 1.5, "vocab": 7}, lambda: pyinfer.top_p_renorm_probs(zeros("float32", 3, 7), 1.5)),
        "merge_states": ({"dtype": "int32"}, lambda: pyinfer.merge_states(zeros("int32", 3, 2, 1, 128), zeros("float32", 3, 2, 1))),
        "packbits": ({"bitorder": "x"}, lambda: pyinfer.packbits(zeros("bool", 3), "x")),
    }  # fmt: skip
    for op, (config, call) in calls.items():
        with pytest.raises((ValueError, TypeError)) as error:
            call()
        assert str(error.value) == pyinfer.support(op, device=device, **config).reason


def test_tensors_may_be_described_by_name():
    ok = pyinfer.support("rmsnorm", device="cuda", input=("bfloat16", (5, 7)), weight=("bfloat16", (7,)))
    assert ok
    assert pyinfer.support("rmsnorm", device="cuda", weight=("bfloat16", (7,))).reason.startswith(
        "rmsnorm: weight has the wrong shape: got (7,), wanted (4096)"
    )
    narrow = pyinfer.support("append_paged_kv_cache", device="cuda", head_dim=64, append_value=("float16", (3, 1, 32)))
    assert narrow.reason.startswith("append_paged_kv_cache: paged_kv_cache (V) has the wrong shape: got (1, 16, 1, 64)")
    pair = (("float16", (4, 16, 2, 64)), ("float16", (4, 16, 2, 32)))  # a tuple of two tensors
    pages = {"source_pages": ("int32", (1,)), "target_pages": ("int32", (1,))}
    assert pyinfer.support("copy_pages", device="cuda", cache=pair, **pages).reason == ""
    pages["target_pages"] = ("float32", (1,))
    assert (
        "target_pages has the wrong dtype" in pyinfer.support("copy_pages", device="cuda", cache=pair, **pages).reason
    )
    assert "input is no element type" in pyinfer.support("rmsnorm", device="cuda", input=("float7", (5, 7))).reason


def test_nothing_is_allocated_compiled_or_launched(monkeypatch):
    """Not even where a kernel is there already: imagined tensors have no stream."""
    from pyinfer.jit import compiler

    monkeypatch.setattr(compiler, "build", lambda *args, **kwargs: pytest.fail("compiled"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # deprecated wrappers are asked about without a word
        for op in (*WRAPPERS, *OPERATORS):
            assert pyinfer.support(op, device="cuda:7")  # a GPU that no machine here has


def test_questions_that_make_no_sense():
    with pytest.raises(
        ValueError, match=r"support: op is no operator: got 'attention', wanted one of .*BatchAttention, "
    ):
        pyinfer.support("attention")
    with pytest.raises(ValueError, match="support: device is no device: got 'tpu', wanted 'cpu', 'cuda' or 'cuda:N'"):
        pyinfer.support(PREFILL, device="tpu")
    for op in (PREFILL, DECODE, "rmsnorm"):
        with pytest.raises(TypeError, match="unexpected keyword"):
            pyinfer.support(op, head_size=64)
    assert pyinfer.support(PREFILL)
