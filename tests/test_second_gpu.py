"""Everything follows the tensors: on cuda:1, with cuda:0 current, all operators and wrappers give what they give on cuda:0, to the bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests.attention_cases import Shape

pytestmark = pytest.mark.gpu
HEADS = (8, 2, 64, 16)
DTYPE = "bfloat16"


class Box:
    """Makes the same tensors on whichever GPU it is for."""

    def __init__(self, device: str, seed: int) -> None:
        self.device, self.seed = device, seed
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, dtype: str = DTYPE) -> Any:
        import torch

        return torch.from_numpy(self.rng.standard_normal(shape)).to(getattr(torch, dtype)).to(self.device)

    def probs(self, *shape: int) -> Any:
        return self.normal(*shape, dtype="float32").softmax(-1)

    def ints(self, *values: int, dtype: str = "int32") -> Any:
        import torch

        return torch.tensor(values, dtype=getattr(torch, dtype), device=self.device)

    def workspace(self) -> Any:
        import torch

        return torch.empty(32 << 20, dtype=torch.uint8, device=self.device)

    def zeros(self, *shape: int, dtype: str = DTYPE) -> Any:
        import torch

        return torch.zeros(shape, dtype=getattr(torch, dtype), device=self.device)

    def paged(self) -> tuple[Any, tuple[np.ndarray, ...]]:
        from tests.arrays import Backend

        shape = Shape(DTYPE, 8, 2, 64, lens=(900, 3, 40), qo_lens=(1, 1, 1))
        made = cases.paged_cache(self.rng, Backend("torch", self.device), shape)
        return made.cache, (made.indptr, made.indices, made.last_page_len)


# ---- operators: name -> a call on a box's tensors, returning tensors
def _norm(name: str) -> Any:
    def call(x: Box) -> Any:
        a, r, w = x.normal(5, 96), x.normal(5, 96), x.normal(96)
        f = getattr(pyinfer, name)
        return (f(a, w),) if "add" not in name else (f(a, r, w), a, r)[1:]

    return call


def _rope(name: str) -> Any:
    def call(x: Box) -> Any:
        q, k = x.normal(7, 4, 64), x.normal(7, 2, 64)
        where = (x.ints(3, 1, 4, 1, 5, 9, 2),) if "pos_ids" in name else (x.ints(0, 3, 7), x.ints(10, 20))
        got = getattr(pyinfer, name)(q, k, *where)
        return (q, k) if got is None else got

    return call


def _cached_rope(name: str) -> Any:
    def call(x: Box) -> Any:
        q, k, cache = x.normal(7, 256), x.normal(7, 128), x.normal(16, 64, dtype="float32")
        got = getattr(pyinfer, name)(x.ints(3, 1, 4, 1, 5, 9, 2), q, k, 64, cache)
        return (q, k) if got is None else got

    return call


def _append(x: Box) -> Any:
    cache = x.zeros(4, 2, 16, 2, 64)
    table = (x.ints(2, 0), x.ints(0, 1, 2), x.ints(3, 5))
    pyinfer.append_paged_kv_cache(
        x.normal(3, 2, 64), x.normal(3, 2, 64), x.ints(0, 1, 1), x.ints(2, 3, 4), cache, *table
    )
    return (cache,)


def _append_mla(x: Box) -> Any:
    ckv, kpe = x.zeros(4, 16, 512), x.zeros(4, 16, 64)
    table = (x.ints(2, 0), x.ints(0, 1, 2), x.ints(3, 5))
    pyinfer.append_paged_mla_kv_cache(
        x.normal(3, 512), x.normal(3, 64), x.ints(0, 1, 1), x.ints(2, 3, 4), ckv, kpe, *table
    )
    return ckv, kpe


def _merge_in_place(x: Box) -> Any:
    v, s = x.normal(5, 4, 64), x.normal(5, 4, dtype="float32")
    pyinfer.merge_state_in_place(
        v, s, x.normal(5, 4, 64), x.normal(5, 4, dtype="float32"), x.ints(1, 0, 1, 1, 0).bool()
    )
    return v, s


def _sample(name: str, *args: Any) -> Any:
    def call(x: Box) -> Any:
        rows = x.probs(6, 500) if "logits" not in name and name != "softmax" else x.normal(6, 500, dtype="float32")
        options = {"seed": 7} if "sampling" in name else {}
        return (getattr(pyinfer, name)(rows, *args, **options),)

    return call


def _chain(x: Box) -> Any:
    tokens = x.ints(3, 4, 5, 6).reshape(2, 2)
    return pyinfer.chain_speculative_sampling(x.probs(2, 2, 50), tokens, x.probs(2, 3, 50), seed=3)


OPERATORS: dict[str, Any] = {
    **{n: _norm(n) for n in ("rmsnorm", "gemma_rmsnorm", "fused_add_rmsnorm", "gemma_fused_add_rmsnorm")},
    **{n: (lambda x, n=n: (getattr(pyinfer, n)(x.normal(5, 128)),)) for n in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")},
    **{n: _rope(n) for n in pyinfer._FAMILIES["rope"] if n.startswith("apply_") and "cos_sin" not in n},
    **{n: _cached_rope(n) for n in ("apply_rope_with_cos_sin_cache", "apply_rope_with_cos_sin_cache_inplace")},
    "append_paged_kv_cache": _append,
    "append_paged_mla_kv_cache": _append_mla,
    "get_batch_indices_positions": lambda x: pyinfer.get_batch_indices_positions(x.ints(0, 3, 5), x.ints(9, 2), 5),
    "get_seq_lens": lambda x: (pyinfer.get_seq_lens(x.ints(0, 3, 5), x.ints(9, 2), 16),),
    "merge_state": lambda x: pyinfer.merge_state(*[t for _ in "ab" for t in (x.normal(5, 4, 64), x.normal(5, 4, dtype="float32"))]),
    "merge_state_in_place": _merge_in_place,
    "merge_states": lambda x: pyinfer.merge_states(x.normal(5, 3, 4, 64), x.normal(5, 3, 4, dtype="float32")),
    "packbits": lambda x: (pyinfer.packbits(x.normal(77) > 0),),
    "segment_packbits": lambda x: pyinfer.segment_packbits(x.normal(77) > 0, x.ints(0, 30, 77), "little"),
    "convert_bsr_mask_layout": lambda x: (pyinfer.convert_bsr_mask_layout(x.normal(3, 4, 5) > 0, x.ints(0, 2, 3)),),
    "single_decode_with_kv_cache": lambda x: (pyinfer.single_decode_with_kv_cache(x.normal(8, 64), x.normal(3000, 2, 64), x.normal(3000, 2, 64)),),
    "single_prefill_with_kv_cache": lambda x: pyinfer.single_prefill_with_kv_cache(
        x.normal(70, 8, 64), x.normal(90, 2, 64), x.normal(90, 2, 64), custom_mask=x.normal(70, 90) > 0, return_lse=True
    ),
    "softmax": _sample("softmax"),
    "sampling_from_probs": _sample("sampling_from_probs"),
    "sampling_from_logits": _sample("sampling_from_logits"),
    "top_k_sampling_from_probs": _sample("top_k_sampling_from_probs", 9),
    "top_p_sampling_from_probs": _sample("top_p_sampling_from_probs", 0.7),
    "min_p_sampling_from_probs": _sample("min_p_sampling_from_probs", 0.2),
    "top_k_top_p_sampling_from_probs": _sample("top_k_top_p_sampling_from_probs", 9, 0.7),
    "top_k_top_p_sampling_from_logits": _sample("top_k_top_p_sampling_from_logits", 9, 0.7),
    "top_k_renorm_probs": _sample("top_k_renorm_probs", 9),
    "top_p_renorm_probs": _sample("top_p_renorm_probs", 0.7),
    "top_k_mask_logits": _sample("top_k_mask_logits", 9),
    "chain_speculative_sampling": _chain,
}  # fmt: skip


# ---- wrappers: name -> plan and run on a box's tensors
def _decode(x: Box, cls: str = "BatchDecodeWithPagedKVCacheWrapper", workspace: bool = True) -> Any:
    cache, table = x.paged()
    wrapper = getattr(pyinfer, cls)(x.workspace() if workspace else None)
    wrapper.plan(*table, *HEADS, q_data_type=DTYPE)
    return wrapper.run(x.normal(3, 8, 64), cache, return_lse=True)


def _graph_decode(x: Box) -> Any:
    cache, table = x.paged()
    buffers = [x.zeros(n, dtype="int32") for n in (4, 80, 3)]
    wrapper = pyinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(x.workspace(), *buffers)
    wrapper.plan(*table, *HEADS, q_data_type=DTYPE)
    return wrapper.run(x.normal(3, 8, 64), cache, return_lse=True)


def _paged(x: Box, workspace: bool) -> Any:
    cache, table = x.paged()
    mask = x.rng.random(943) < 0.5
    wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(x.workspace() if workspace else None)
    wrapper.plan([0, 1, 2, 3], *table, *HEADS, custom_mask=mask, q_data_type=DTYPE)
    return wrapper.run(x.normal(3, 8, 64), cache, sinks=x.normal(8, dtype="float32"), return_lse=True)


def _ragged(x: Box) -> Any:
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(x.workspace())
    wrapper.plan([0, 5, 40], [0, 9, 400], 8, 2, 64, causal=True, q_data_type=DTYPE)
    return wrapper.run(x.normal(40, 8, 64), x.normal(400, 2, 64), x.normal(400, 2, 64), return_lse=True)


def _sinks(x: Box) -> Any:
    cache, table = x.paged()
    wrapper = pyinfer.BatchAttentionWithAttentionSinkWrapper(x.workspace(), head_dim_qk=64, head_dim_vo=64)
    wrapper.plan([0, 1, 2, 3], *table, 8, 2, page_size=16)
    return wrapper.run(x.normal(3, 8, 64), cache, x.normal(8, dtype="float32"), 0.1, return_lse=True)


def _batch_attention(x: Box) -> Any:
    cache, (indptr, indices, _) = x.paged()
    wrapper = pyinfer.BatchAttention("NHD", x.device)
    wrapper.plan([0, 1, 2, 30], indptr, indices, [900, 3, 40], 8, 2, 64, 64, 16, causal=True)
    return wrapper.run(x.normal(30, 8, 64), cache)


def _cascade(x: Box) -> Any:
    cache, (indptr, indices, last) = x.paged()
    wrapper = pyinfer.MultiLevelCascadeAttentionWrapper(2, x.workspace())
    tables = [[0, 3], [0, 1, 2, 3]], [[0, 2], indptr], [[5, 6], indices], [[16], last]
    wrapper.plan(*tables, *HEADS, q_data_type=DTYPE)
    return wrapper.run(x.normal(3, 8, 64), cache, return_lse=True)


def _shared_prefix(x: Box, cls: str) -> Any:
    cache, table = x.paged()
    wrapper = getattr(pyinfer, cls)(x.workspace())
    if "Decode" in cls:
        wrapper.begin_forward(*table, *HEADS, data_type=DTYPE)
    else:
        wrapper.begin_forward([0, 1, 2, 3], *table, *HEADS, q_data_type=DTYPE)
    return (wrapper.forward(x.normal(3, 8, 64), x.normal(200, 2, 64), x.normal(200, 2, 64), cache),)


def _pod(x: Box) -> Any:
    cache, table = x.paged()
    wrapper = pyinfer.PODWithPagedKVCacheWrapper(x.workspace())
    wrapper.plan(*table, *HEADS, q_data_type=DTYPE)
    return wrapper.run(
        x.normal(60, 8, 64), x.normal(90, 2, 64), x.normal(90, 2, 64), x.normal(3, 8, 64), cache, causal_p=True
    )


def _batch_pod(x: Box) -> Any:
    cache, (indptr, indices, last) = x.paged()
    wrapper = pyinfer.BatchPODWithPagedKVCacheWrapper(x.workspace())
    tables = ([0, 40, 43, 60], indptr, indices, last), ([0, 1, 2, 3], indptr, indices, last)
    wrapper.plan(*tables[0], *tables[1], *HEADS, q_data_type=DTYPE)
    return wrapper.run(x.normal(60, 8, 64), cache, x.normal(3, 8, 64), cache, causal_p=True)


def _block_sparse(x: Box) -> Any:
    wrapper = pyinfer.BlockSparseAttentionWrapper(x.workspace())
    wrapper.plan([0, 2, 3], [0, 3, 1], 32, 64, 16, 16, 8, 2, 64, q_data_type=DTYPE)
    return wrapper.run(x.normal(32, 8, 64), x.normal(64, 2, 64), x.normal(64, 2, 64), return_lse=True)


def _variable_sparse(x: Box) -> Any:
    wrapper = pyinfer.VariableBlockSparseAttentionWrapper(x.workspace())
    mask = np.array([[[1, 0], [1, 1]], [[0, 1], [1, 0]]], bool)
    wrapper.plan(mask, np.array([[3, 5], [4, 4]]), np.array([[8, 24], [16, 16]]), 4, 2, 64, q_data_type=DTYPE)
    return wrapper.run(x.normal(4, 8, 64), x.normal(2, 32, 64), x.normal(2, 32, 64), return_lse=True)


def _mla(x: Box, old: bool = False) -> Any:
    ckv, kpe = x.normal(70, 16, 512), x.normal(70, 16, 64)
    indptr, indices, lens = [0, 57, 58, 61], list(range(61)), [900, 3, 40]
    q = x.normal(3, 16, 512), x.normal(3, 16, 64)
    if old:
        wrapper: Any = pyinfer.BatchDecodeMlaWithPagedKVCacheWrapper(x.workspace(), use_tensor_cores=True)
        wrapper.plan(indptr, indices, [4, 3, 8], 16, 512, 16, 0.1, data_type=DTYPE)
    else:
        wrapper = pyinfer.BatchMLAPagedAttentionWrapper(x.workspace())
        wrapper.plan([0, 1, 2, 3], indptr, indices, lens, 16, 512, 64, 16, True, 0.1, DTYPE, DTYPE)
    return wrapper.run(*q, ckv, kpe, return_lse=True)


WRAPPERS: dict[str, Any] = {
    "BatchDecodeWithPagedKVCacheWrapper": _decode,
    "BatchDecodeWithPagedKVCacheWrapper, its own workspace": lambda x: _decode(x, workspace=False),
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": _graph_decode,
    "BatchPrefillWithPagedKVCacheWrapper": lambda x: _paged(x, True),
    "BatchPrefillWithPagedKVCacheWrapper, its own workspace": lambda x: _paged(x, False),
    "BatchPrefillWithRaggedKVCacheWrapper": _ragged,
    "BatchAttentionWithAttentionSinkWrapper": _sinks,
    "BatchAttention": _batch_attention,
    "MultiLevelCascadeAttentionWrapper": _cascade,
    **{n: (lambda x, n=n: _shared_prefix(x, n)) for n in (f"Batch{k}WithSharedPrefixPagedKVCacheWrapper" for k in ("Decode", "Prefill"))},
    "PODWithPagedKVCacheWrapper": _pod,
    "BatchPODWithPagedKVCacheWrapper": _batch_pod,
    "BlockSparseAttentionWrapper": _block_sparse,
    "VariableBlockSparseAttentionWrapper": _variable_sparse,
    "BatchMLAPagedAttentionWrapper": _mla,
    "BatchDecodeMlaWithPagedKVCacheWrapper": lambda x: _mla(x, old=True),
}  # fmt: skip


def _flat(x: Any) -> list[Any]:
    return [t for y in x for t in _flat(y)] if isinstance(x, tuple | list) else [x]


@pytest.mark.parametrize("name", [*OPERATORS, *WRAPPERS])
def test_on_the_second_gpu(rng, name):
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    call, seed = (OPERATORS | WRAPPERS)[name], int(rng.integers(1 << 30))
    results = []
    for device in ("cuda:0", "cuda:1"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            tensors = _flat(call(Box(device, seed)))
        assert torch.cuda.current_device() == 0
        assert all(str(t.device) == device for t in tensors)
        results.append([t.cpu() for t in tensors])
    for first, second in zip(*results, strict=True):
        assert torch.equal(torch.nan_to_num(first.float(), 7.0), torch.nan_to_num(second.float(), 7.0))


@pytest.mark.parametrize("name", [*OPERATORS, *WRAPPERS])
def test_these_cases_run(name):
    """On one GPU, so that a case that is wrong is seen where there is no second."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert all(str(t.device) == "cuda:0" for t in _flat((OPERATORS | WRAPPERS)[name](Box("cuda:0", 1))))
