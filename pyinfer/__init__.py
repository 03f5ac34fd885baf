"""LLM-serving kernels for NVIDIA GPUs and CPUs, with FlashInfer's names and no compiler.

CUDA tensors run CUDA kernels, built by NVRTC on first use; CPU tensors (NumPy, torch) run Numba kernels. There is no
switch to set. Importing this package imports nothing else: a name is looked up when it is first used (PEP 562).
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Operator family -> its names at the top level. TYPE_CHECKING below repeats it for type checkers and editors;
# tests/test_import.py fails when the two, or a family's __all__, part ways.
_FAMILIES: dict[str, tuple[str, ...]] = {
    "activation": (
        "gelu_and_mul",
        "gelu_and_mul_dynamic_quant",
        "gelu_and_mul_quant",
        "gelu_tanh_and_mul",
        "gelu_tanh_and_mul_dynamic_quant",
        "gelu_tanh_and_mul_quant",
        "silu_and_mul",
        "silu_and_mul_dynamic_quant",
        "silu_and_mul_quant",
    ),
    "attention": ("BatchAttention", "BatchAttentionWithAttentionSinkWrapper"),
    "cascade": (
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
        "MultiLevelCascadeAttentionWrapper",
        "merge_state",
        "merge_state_in_place",
        "merge_states",
    ),
    "decode": (
        "BatchDecodeWithPagedKVCacheWrapper",
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
        "fast_decode_plan",
        "single_decode_with_kv_cache",
    ),
    "gemm": ("tinygemm_bf16",),
    "mla": ("BatchDecodeMlaWithPagedKVCacheWrapper", "BatchMLAPagedAttentionWrapper"),
    "norm": (
        "fused_add_rmsnorm",
        "fused_add_rmsnorm_dynamic_quant",
        "fused_add_rmsnorm_quant",
        "fused_qk_rmsnorm_rope",
        "fused_rmsnorm_silu",
        "gemma_fused_add_rmsnorm",
        "gemma_rmsnorm",
        "layernorm",
        "rmsnorm",
        "rmsnorm_dynamic_quant",
        "rmsnorm_quant",
    ),
    "page": (
        "append_paged_kv_cache",
        "append_paged_mla_kv_cache",
        "block_sparse_indices_to_vector_sparse_offsets",
        "copy_pages",
        "gather_paged_kv_cache",
        "gather_paged_mla_kv_cache",
        "get_batch_indices_positions",
        "get_seq_lens",
    ),
    "prefill": (
        "BatchPrefillWithPagedKVCacheWrapper",
        "BatchPrefillWithRaggedKVCacheWrapper",
        "single_prefill_with_kv_cache",
        "single_prefill_with_kv_cache_return_lse",
    ),
    "quantization": ("packbits", "segment_packbits"),
    "pod": ("BatchPODWithPagedKVCacheWrapper", "PODWithPagedKVCacheWrapper"),
    "rope": (
        "apply_llama31_rope",
        "apply_llama31_rope_inplace",
        "apply_llama31_rope_pos_ids",
        "apply_llama31_rope_pos_ids_inplace",
        "apply_rope",
        "apply_rope_inplace",
        "apply_rope_pos_ids",
        "apply_rope_pos_ids_inplace",
        "apply_rope_with_cos_sin_cache",
        "apply_rope_with_cos_sin_cache_inplace",
        "mla_rope_quantize_fp8",
        "rope_append_paged_kv_cache",
        "rope_quantize_fp8",
        "rope_quantize_fp8_append_paged_kv_cache",
    ),
    "sampling": (
        "chain_speculative_sampling",
        "min_p_sampling_from_probs",
        "sampling_from_logits",
        "sampling_from_probs",
        "softmax",
        "top_k_mask_logits",
        "top_k_renorm_prob",
        "top_k_renorm_probs",
        "top_k_sampling_from_probs",
        "top_k_top_p_sampling_from_logits",
        "top_k_top_p_sampling_from_probs",
        "top_p_renorm_prob",
        "top_p_renorm_probs",
        "top_p_sampling_from_probs",
    ),
    "sparse": (
        "BlockSparseAttentionWrapper",
        "VariableBlockSparseAttentionWrapper",
        "convert_bsr_mask_layout",
    ),
    "topk": (
        "TopKTieBreak",
        "top_k",
        "top_k_page_table_transform",
        "top_k_ragged_transform",
        "top_k_varlen",
    ),
    "variants": ("AttentionVariant",),
}
_MODULE_OF = {name: family for family, names in _FAMILIES.items() for name in names}
_MODULE_OF |= {"ModelConfig": "jit.warmup", "warmup": "jit.warmup", "support": "_support"}
_MODULE_OF |= {"install_as_flashinfer": "_flashinfer"}
_SUBMODULES = (*_FAMILIES, "core", "jit", "logits_processor", "profiler", "schedulers", "torch_ops", "triton", "utils")

__all__ = ["__version__", *sorted(_MODULE_OF), *_SUBMODULES]

# In a checkout that is not installed, schedulers/ and cuda_src/ lie beside this package, not in it. Imports find them
# there, so that `python -c "import pyinfer"` in a checkout behaves as it does after an install.
if not os.path.isdir(os.path.join(__path__[0], "schedulers")):
    __path__.append(os.path.dirname(__path__[0]))

if TYPE_CHECKING:
    from pyinfer._flashinfer import install_as_flashinfer as install_as_flashinfer
    from pyinfer._support import support as support
    from pyinfer.activation import gelu_and_mul as gelu_and_mul
    from pyinfer.activation import gelu_and_mul_dynamic_quant as gelu_and_mul_dynamic_quant
    from pyinfer.activation import gelu_and_mul_quant as gelu_and_mul_quant
    from pyinfer.activation import gelu_tanh_and_mul as gelu_tanh_and_mul
    from pyinfer.activation import gelu_tanh_and_mul_dynamic_quant as gelu_tanh_and_mul_dynamic_quant
    from pyinfer.activation import gelu_tanh_and_mul_quant as gelu_tanh_and_mul_quant
    from pyinfer.activation import silu_and_mul as silu_and_mul
    from pyinfer.activation import silu_and_mul_dynamic_quant as silu_and_mul_dynamic_quant
    from pyinfer.activation import silu_and_mul_quant as silu_and_mul_quant
    from pyinfer.attention import BatchAttention as BatchAttention
    from pyinfer.attention import BatchAttentionWithAttentionSinkWrapper as BatchAttentionWithAttentionSinkWrapper
    from pyinfer.cascade import (
        BatchDecodeWithSharedPrefixPagedKVCacheWrapper as BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    )
    from pyinfer.cascade import (
        BatchPrefillWithSharedPrefixPagedKVCacheWrapper as BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    )
    from pyinfer.cascade import MultiLevelCascadeAttentionWrapper as MultiLevelCascadeAttentionWrapper
    from pyinfer.cascade import merge_state as merge_state
    from pyinfer.cascade import merge_state_in_place as merge_state_in_place
    from pyinfer.cascade import merge_states as merge_states
    from pyinfer.decode import BatchDecodeWithPagedKVCacheWrapper as BatchDecodeWithPagedKVCacheWrapper
    from pyinfer.decode import (
        CUDAGraphBatchDecodeWithPagedKVCacheWrapper as CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    )
    from pyinfer.decode import fast_decode_plan as fast_decode_plan
    from pyinfer.decode import single_decode_with_kv_cache as single_decode_with_kv_cache
    from pyinfer.gemm import tinygemm_bf16 as tinygemm_bf16
    from pyinfer.jit.warmup import ModelConfig as ModelConfig
    from pyinfer.jit.warmup import warmup as warmup
    from pyinfer.mla import BatchDecodeMlaWithPagedKVCacheWrapper as BatchDecodeMlaWithPagedKVCacheWrapper
    from pyinfer.mla import BatchMLAPagedAttentionWrapper as BatchMLAPagedAttentionWrapper
    from pyinfer.norm import fused_add_rmsnorm as fused_add_rmsnorm
    from pyinfer.norm import fused_add_rmsnorm_dynamic_quant as fused_add_rmsnorm_dynamic_quant
    from pyinfer.norm import fused_add_rmsnorm_quant as fused_add_rmsnorm_quant
    from pyinfer.norm import fused_qk_rmsnorm_rope as fused_qk_rmsnorm_rope
    from pyinfer.norm import fused_rmsnorm_silu as fused_rmsnorm_silu
    from pyinfer.norm import gemma_fused_add_rmsnorm as gemma_fused_add_rmsnorm
    from pyinfer.norm import gemma_rmsnorm as gemma_rmsnorm
    from pyinfer.norm import layernorm as layernorm
    from pyinfer.norm import rmsnorm as rmsnorm
    from pyinfer.norm import rmsnorm_dynamic_quant as rmsnorm_dynamic_quant
    from pyinfer.norm import rmsnorm_quant as rmsnorm_quant
    from pyinfer.page import append_paged_kv_cache as append_paged_kv_cache
    from pyinfer.page import append_paged_mla_kv_cache as append_paged_mla_kv_cache
    from pyinfer.page import (
        block_sparse_indices_to_vector_sparse_offsets as block_sparse_indices_to_vector_sparse_offsets,
    )
    from pyinfer.page import copy_pages as copy_pages
    from pyinfer.page import gather_paged_kv_cache as gather_paged_kv_cache
    from pyinfer.page import gather_paged_mla_kv_cache as gather_paged_mla_kv_cache
    from pyinfer.page import get_batch_indices_positions as get_batch_indices_positions
    from pyinfer.page import get_seq_lens as get_seq_lens
    from pyinfer.pod import BatchPODWithPagedKVCacheWrapper as BatchPODWithPagedKVCacheWrapper
    from pyinfer.pod import PODWithPagedKVCacheWrapper as PODWithPagedKVCacheWrapper
    from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper as BatchPrefillWithPagedKVCacheWrapper
    from pyinfer.prefill import BatchPrefillWithRaggedKVCacheWrapper as BatchPrefillWithRaggedKVCacheWrapper
    from pyinfer.prefill import single_prefill_with_kv_cache as single_prefill_with_kv_cache
    from pyinfer.prefill import single_prefill_with_kv_cache_return_lse as single_prefill_with_kv_cache_return_lse
    from pyinfer.quantization import packbits as packbits
    from pyinfer.quantization import segment_packbits as segment_packbits
    from pyinfer.rope import apply_llama31_rope as apply_llama31_rope
    from pyinfer.rope import apply_llama31_rope_inplace as apply_llama31_rope_inplace
    from pyinfer.rope import apply_llama31_rope_pos_ids as apply_llama31_rope_pos_ids
    from pyinfer.rope import apply_llama31_rope_pos_ids_inplace as apply_llama31_rope_pos_ids_inplace
    from pyinfer.rope import apply_rope as apply_rope
    from pyinfer.rope import apply_rope_inplace as apply_rope_inplace
    from pyinfer.rope import apply_rope_pos_ids as apply_rope_pos_ids
    from pyinfer.rope import apply_rope_pos_ids_inplace as apply_rope_pos_ids_inplace
    from pyinfer.rope import apply_rope_with_cos_sin_cache as apply_rope_with_cos_sin_cache
    from pyinfer.rope import apply_rope_with_cos_sin_cache_inplace as apply_rope_with_cos_sin_cache_inplace
    from pyinfer.rope import mla_rope_quantize_fp8 as mla_rope_quantize_fp8
    from pyinfer.rope import rope_append_paged_kv_cache as rope_append_paged_kv_cache
    from pyinfer.rope import rope_quantize_fp8 as rope_quantize_fp8
    from pyinfer.rope import rope_quantize_fp8_append_paged_kv_cache as rope_quantize_fp8_append_paged_kv_cache
    from pyinfer.sampling import chain_speculative_sampling as chain_speculative_sampling
    from pyinfer.sampling import min_p_sampling_from_probs as min_p_sampling_from_probs
    from pyinfer.sampling import sampling_from_logits as sampling_from_logits
    from pyinfer.sampling import sampling_from_probs as sampling_from_probs
    from pyinfer.sampling import softmax as softmax
    from pyinfer.sampling import top_k_mask_logits as top_k_mask_logits
    from pyinfer.sampling import top_k_renorm_prob as top_k_renorm_prob
    from pyinfer.sampling import top_k_renorm_probs as top_k_renorm_probs
    from pyinfer.sampling import top_k_sampling_from_probs as top_k_sampling_from_probs
    from pyinfer.sampling import top_k_top_p_sampling_from_logits as top_k_top_p_sampling_from_logits
    from pyinfer.sampling import top_k_top_p_sampling_from_probs as top_k_top_p_sampling_from_probs
    from pyinfer.sampling import top_p_renorm_prob as top_p_renorm_prob
    from pyinfer.sampling import top_p_renorm_probs as top_p_renorm_probs
    from pyinfer.sampling import top_p_sampling_from_probs as top_p_sampling_from_probs
    from pyinfer.sparse import BlockSparseAttentionWrapper as BlockSparseAttentionWrapper
    from pyinfer.sparse import VariableBlockSparseAttentionWrapper as VariableBlockSparseAttentionWrapper
    from pyinfer.sparse import convert_bsr_mask_layout as convert_bsr_mask_layout
    from pyinfer.topk import TopKTieBreak as TopKTieBreak
    from pyinfer.topk import top_k as top_k
    from pyinfer.topk import top_k_page_table_transform as top_k_page_table_transform
    from pyinfer.topk import top_k_ragged_transform as top_k_ragged_transform
    from pyinfer.topk import top_k_varlen as top_k_varlen
    from pyinfer.variants import AttentionVariant as AttentionVariant


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULE_OF:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
