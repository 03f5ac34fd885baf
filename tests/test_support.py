"""pyinfer.support: what can be selected, and the exceptions' own words where it cannot."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer

PREFILL, DECODE = "single_prefill_with_kv_cache", "BatchDecodeWithPagedKVCacheWrapper"


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
    ("cpu", {"backend": "trtllm-gen"}, "backend is not available: got 'trtllm-gen', wanted 'auto' or 'fa2'"),
    ("cpu", {"kv_layout": "nhd"}, "kv_layout is no layout: got 'nhd'"),
    ("cpu", {"pos_encoding_mode": "rope"}, "pos_encoding_mode is no positional encoding: got 'rope'"),
    ("cpu", {"rope_theta": -1}, "rope_theta is no positive number: got -1.0"),
    ("cpu", {"logits_soft_cap": float("nan")}, "logits_soft_cap is no soft cap: got nan"),
    ("cpu", {"window_left": -2}, "window_left is no window: got -2"),
    ("cpu", {"page_size": 0}, "page_size is no page size: got 0, wanted 1 or more"),
    ("cpu", {"custom_mask": True}, "custom_mask is no argument of decode"),
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


def test_questions_that_make_no_sense():
    with pytest.raises(
        ValueError, match="support: op is no attention operator: got 'attention', wanted one of single_decode"
    ):
        pyinfer.support("attention")
    with pytest.raises(ValueError, match="support: device is no device: got 'tpu', wanted 'cpu', 'cuda' or 'cuda:N'"):
        pyinfer.support(PREFILL, device="tpu")
    with pytest.raises(TypeError, match="unexpected keyword"):
        pyinfer.support(PREFILL, head_size=64)
    assert pyinfer.support(PREFILL)
