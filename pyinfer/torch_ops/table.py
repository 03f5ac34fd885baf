"""The public operators as torch.compile sees them: arguments (`signature.py`) and results (`results.py`), by family."""

from __future__ import annotations

from typing import NamedTuple

from pyinfer.torch_ops import results as r


class Operator(NamedTuple):
    """A row of the table.

    Attributes
    ----------
    arguments
        All arguments of the public function, in its order, as `signature.parse` reads them.
    rule
        What it returns.
    returns
        How many tensors that is, without those that flags add.
    random
        Whether it draws from a generator.
    waits
        Whether it waits for the GPU (then it cannot be part of a CUDA graph).
    packed
        Where it is neither a tensor nor a tuple of them: the result as an expression of `made`, the tensors, and the arguments.
    """

    arguments: str
    rule: r.Rule = r.nothing
    returns: int = 0
    random: bool = False
    waits: bool = False
    packed: str = ""


_ANGLES = "int? rotary_dim, bool interleave, float rope_scale, float rope_theta"
_ROPE = f"{_ANGLES}, bool? enable_pdl"
_LLAMA = f"{_ANGLES}, float low_freq_factor, float high_freq_factor, int old_context_len, bool? enable_pdl"
_OFFSETS, _POSITIONS = "q, k, indptr, offsets", "q, k, pos_ids"
_OFFSETS_INPLACE, _POSITIONS_INPLACE = "Tensor! q, Tensor! k, indptr, offsets", "Tensor! q, Tensor! k, pos_ids"
_Q_AND_K = r.like("q", "k")
_ACTIVATIONS = ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")
_OWN_SCALES = "out out, out scale, dtype quantize_dtype, bool? enable_pdl"
_PARTS = "q_rope, k_rope, Tensor? q_nope, Tensor? k_nope"
_TO_FP8 = "bool is_neox, dtype quantize_dtype, float quant_scale_q, float quant_scale_kv"
_ROPE_QUANTIZE = Operator(
    f"{_PARTS}, cos_sin_cache, pos_ids, {_TO_FP8}, out q_rope_out, out k_rope_out, out q_nope_out, out k_nope_out, bool? enable_pdl",
    r.rotated("q_rope", "k_rope", "q_nope", "k_nope"),
    4,
)
_DRAW = "Tensor? indices, bool deterministic, none generator, bool check_nan, integer seed, integer offset, flag return_valid"
_JOINT = (
    "integer top_k, number top_p, Tensor? indices, str filter_apply_order, bool deterministic, none generator, bool check_nan, "
    "integer seed, integer offset, flag return_valid"
)
_FROM_PROBS, _FROM_LOGITS = r.ids("probs"), r.ids("logits")

FUNCTIONS: dict[str, dict[str, Operator]] = {
    "activation": {name: Operator("input, out out, bool? enable_pdl", r.gated, 1) for name in _ACTIVATIONS}
    | {f"{name}_quant": Operator("Tensor! out, input, number scale, bool? enable_pdl") for name in _ACTIVATIONS}
    | {f"{name}_dynamic_quant": Operator(f"input, {_OWN_SCALES}", r.quantized(gate=True), 2) for name in _ACTIVATIONS},
    "cascade": {
        "merge_state": Operator("v_a, s_a, v_b, s_b", r.state("v_a", "s_a"), 2),
        "merge_state_in_place": Operator("Tensor! v, Tensor! s, v_other, s_other, Tensor? mask"),
        "merge_states": Operator("v, s", r.merged, 2),
    },
    "decode": {
        "single_decode_with_kv_cache": Operator(
            "q, k, v, str kv_layout, str pos_encoding_mode, bool use_tensor_cores, number q_scale, number k_scale, number v_scale, int window_left, "
            "float? logits_soft_cap, float? sm_scale, float? rope_scale, float? rope_theta, flag return_lse, "
            "none variant, none variant_args",
            r.decode,
            1,
        ),
    },
    "gemm": {"tinygemm_bf16": Operator("input, weight, Tensor! out, Tensor? bias, bool use_pdl")},
    "norm": {
        "rmsnorm": Operator("input, weight, float eps, out out, bool? enable_pdl", r.like("input"), 1),
        "gemma_rmsnorm": Operator("input, weight, float eps, out out, bool? enable_pdl", r.like("input"), 1),
        "fused_add_rmsnorm": Operator("Tensor! input, Tensor! residual, weight, float eps, bool? enable_pdl"),
        "gemma_fused_add_rmsnorm": Operator("Tensor! input, Tensor! residual, weight, float eps, bool? enable_pdl"),
        "rmsnorm_quant": Operator("Tensor! out, input, weight, number scale, float eps, bool? enable_pdl"),
        "fused_add_rmsnorm_quant": Operator(
            "Tensor! out, input, Tensor! residual, weight, number scale, float eps, bool? enable_pdl"
        ),
        "rmsnorm_dynamic_quant": Operator(f"input, weight, float eps, {_OWN_SCALES}", r.quantized(), 2),
        "fused_add_rmsnorm_dynamic_quant": Operator(
            f"input, Tensor! residual, weight, float eps, {_OWN_SCALES}", r.quantized(), 2
        ),
        "fused_rmsnorm_silu": Operator(
            "input, weight, float eps, out out, none block_scale, bool? enable_pdl", r.like("input"), 1
        ),
        "fused_qk_rmsnorm_rope": Operator(
            "qkv, q_weight, k_weight, int ppf, int pph, int ppw, int num_frame_channels, int num_height_channels, int num_width_channels, int num_heads_q, "
            "int num_heads_k, int num_heads_v, int head_dim, float eps, float base, bool interleave, float factor, float low, float high, "
            "float attention_factor, bool is_qk_norm, bool output_fp8, float output_quant_scale, float v_quant_scale, out q_out, out k_out, out v_out",
            r.split_heads,
            3,
        ),
        "layernorm": Operator("input, gemma, beta, float eps, out out, bool? enable_pdl", r.like("input"), 1),
    },
    "page": {
        "append_paged_kv_cache": Operator(
            "append_key, append_value, batch_indices, positions, cache! paged_kv_cache, kv_indices, kv_indptr, kv_last_page_len, str kv_layout, "
            "number k_scale, number v_scale, bool? enable_pdl"
        ),
        "append_paged_mla_kv_cache": Operator(
            "append_ckv, append_kpe, batch_indices, positions, Tensor! ckv_cache, Tensor! kpe_cache, kv_indices, kv_indptr, kv_last_page_len, "
            "number ckv_scale, number kpe_scale, bool? enable_pdl"
        ),
        "gather_paged_kv_cache": Operator(
            "batch_indices, positions, cache paged_kv_cache, kv_indices, kv_indptr, str kv_layout, out k_out, out v_out, "
            "number k_scale, number v_scale, dtype dtype",
            r.gathered("paged_kv_cache", "paged_kv_cache"),
            2,
        ),
        "gather_paged_mla_kv_cache": Operator(
            "batch_indices, positions, ckv_cache, kpe_cache, kv_indices, kv_indptr, out ckv_out, out kpe_out, number ckv_scale, number kpe_scale, dtype dtype",
            r.gathered("ckv_cache", "kpe_cache"),
            2,
        ),
        "get_batch_indices_positions": Operator(
            "append_indptr, seq_lens, int nnz, out batch_indices, out positions", r.rows_of_tokens, 2
        ),
        "get_seq_lens": Operator("kv_indptr, kv_last_page_len, int page_size", r.lengths, 1),
    },
    "prefill": {
        "single_prefill_with_kv_cache": Operator(
            "q, k, v, number scale_q, number scale_k, number scale_v, dtype o_dtype, Tensor? custom_mask, Tensor? packed_custom_mask, bool causal, "
            "str kv_layout, str pos_encoding_mode, bool use_fp16_qk_reduction, float? sm_scale, int window_left, float? logits_soft_cap, "
            "float? rope_scale, float? rope_theta, str backend, flag return_lse, number k_scale, number v_scale, none variant, none variant_args",
            r.prefill,
            1,
        ),
    },
    "quantization": {
        "packbits": Operator("x, str bitorder", r.bits, 1),
        "segment_packbits": Operator("x, ints indptr, str bitorder", r.segment_bits, 2, waits=True),
    },
    "rope": {
        "apply_rope": Operator(f"{_OFFSETS}, {_ROPE}", _Q_AND_K, 2),
        "apply_rope_inplace": Operator(f"{_OFFSETS_INPLACE}, {_ROPE}"),
        "apply_rope_pos_ids": Operator(f"{_POSITIONS}, {_ROPE}", _Q_AND_K, 2),
        "apply_rope_pos_ids_inplace": Operator(f"{_POSITIONS_INPLACE}, {_ROPE}"),
        "apply_llama31_rope": Operator(f"{_OFFSETS}, {_LLAMA}", _Q_AND_K, 2),
        "apply_llama31_rope_inplace": Operator(f"{_OFFSETS_INPLACE}, {_LLAMA}"),
        "apply_llama31_rope_pos_ids": Operator(f"{_POSITIONS}, {_LLAMA}", _Q_AND_K, 2),
        "apply_llama31_rope_pos_ids_inplace": Operator(f"{_POSITIONS_INPLACE}, {_LLAMA}"),
        "apply_rope_with_cos_sin_cache": Operator(
            "positions, query, key, int head_size, cos_sin_cache, bool is_neox, bool? enable_pdl",
            r.like("query", "key"),
            2,
        ),
        "apply_rope_with_cos_sin_cache_inplace": Operator(
            "positions, Tensor! query, Tensor! key, int head_size, cos_sin_cache, bool is_neox, bool? enable_pdl"
        ),
        "rope_quantize_fp8": _ROPE_QUANTIZE,
        "mla_rope_quantize_fp8": _ROPE_QUANTIZE,
        "rope_quantize_fp8_append_paged_kv_cache": Operator(
            f"{_PARTS}, Tensor? v, cos_sin_cache, pos_ids, cache! paged_kv_cache, kv_indices, kv_indptr, batch_indices, positions, {_TO_FP8}, "
            "int page_size, str kv_layout, out q_rope_out, out q_nope_out, bool? enable_pdl",
            r.rotated("q_rope", "q_nope"),
            2,
        ),
        "rope_append_paged_kv_cache": Operator(
            "q, k, v, cos_sin_cache, pos_ids, cache! paged_kv_cache, kv_indices, kv_indptr, batch_indices, positions, bool is_neox, str kv_layout, "
            "out q_out, bool? enable_pdl",
            r.like("q"),
            1,
        ),
    },
    "sampling": {
        "softmax": Operator("logits, number temperature, bool? enable_pdl", r.float32_like("logits"), 1),
        "sampling_from_probs": Operator(f"probs, {_DRAW}", _FROM_PROBS, 1, random=True),
        "sampling_from_logits": Operator(f"logits, {_DRAW}", _FROM_LOGITS, 1, random=True),
        "top_k_sampling_from_probs": Operator(f"probs, integer top_k, {_DRAW}", _FROM_PROBS, 1, random=True),
        "top_p_sampling_from_probs": Operator(f"probs, number top_p, {_DRAW}", _FROM_PROBS, 1, random=True),
        "min_p_sampling_from_probs": Operator(f"probs, number min_p, {_DRAW}", _FROM_PROBS, 1, random=True),
        "top_k_top_p_sampling_from_probs": Operator(f"probs, {_JOINT}", _FROM_PROBS, 1, random=True),
        "top_k_top_p_sampling_from_logits": Operator(f"logits, {_JOINT}", _FROM_LOGITS, 1, random=True),
        "top_p_renorm_probs": Operator("probs, number top_p", r.float32_like("probs"), 1),
        "top_k_renorm_probs": Operator("probs, integer top_k", r.float32_like("probs"), 1),
        "top_k_mask_logits": Operator("logits, integer top_k", r.float32_like("logits"), 1),
        "chain_speculative_sampling": Operator(
            "draft_probs, draft_token_ids, target_probs, counter maybe_output_accepted_token_num, "
            "counter maybe_output_emitted_draft_token_num, "
            "bool deterministic, none generator, bool check_nan, integer seed, integer offset, flag return_valid",
            r.chain,
            1,
            random=True,
            packed="(made[0], maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num, *made[1:])",
        ),
    },
    "topk": {
        "top_k": Operator("input, int k, bool sorted, bool deterministic, int tie_break", r.largest, 2),
        "top_k_page_table_transform": Operator(
            "input, src_page_table, lengths, int k, Tensor? row_to_batch, bool deterministic, int tie_break",
            r.selected("input", "k"),
            1,
        ),
        "top_k_ragged_transform": Operator(
            "input, offsets, lengths, int k, bool deterministic, int tie_break", r.selected("input", "k"), 1
        ),
    },
    "sparse": {"convert_bsr_mask_layout": Operator("mask, ints indptr", r.flattened, 1, waits=True)},
}

_SCALES = "number q_scale, number k_scale, number v_scale"
_OUT = "out out, out lse, flag return_lse, bool? enable_pdl"
_DENSE = r.attention("q", "v")
METHODS: dict[str, dict[str, Operator]] = {
    "attention": {
        "BatchAttention.run": Operator(
            "self self, q, cache kv_cache, out out, out lse, float logits_soft_cap, none profiler_buffer, number k_scale, number v_scale, "
            "bool? enable_pdl, none variant_args",
            r.attention(values="kv_cache"),
            2,
        ),
        "BatchAttentionWithAttentionSinkWrapper.run": Operator(
            f"self self, q, cache paged_kv_cache, Tensor? sinks, number sm_scale, varargs args, {_SCALES}, {_OUT}, int? window_left",
            r.attention(),
            1,
        ),
    },
    "cascade": {
        "MultiLevelCascadeAttentionWrapper.run": Operator(
            f"self self, q, cache paged_kv_cache, {_SCALES}, {_OUT}", r.attention(), 1
        ),
    },
    "decode": {
        "BatchDecodeWithPagedKVCacheWrapper.run": Operator(
            f"self self, q, cache paged_kv_cache, varargs args, {_SCALES}, {_OUT}, int? window_left, Tensor? sinks",
            r.attention(),
            1,
        ),
    },
    "mla": {
        "BatchMLAPagedAttentionWrapper.run": Operator(
            "self self, q_nope, q_pe, ckv_cache, kpe_cache, out out, out lse, flag return_lse, none profiler_buffer, Tensor? kv_len, "
            "Tensor? page_table, bool return_lse_base_on_e, number ckv_scale, number kpe_scale, bool? enable_pdl",
            r.attention("q_nope", "ckv_cache"),
            1,
        ),
        "BatchDecodeMlaWithPagedKVCacheWrapper.run": Operator(
            f"self self, q_nope, q_pe, paged_ckv_cache, paged_kpe_cache, {_SCALES}, {_OUT}",
            r.attention("q_nope", "paged_ckv_cache"),
            1,
        ),
    },
    "pod": {
        "PODWithPagedKVCacheWrapper.run": Operator(
            "self self, q_p, k_p, v_p, q_d, cache paged_kv_cache_d, Tensor? custom_mask_p, Tensor? packed_custom_mask_p, bool causal_p, "
            "str kv_layout_p, str pos_encoding_mode_p, float? sm_scale_p, int window_left_p, float? rope_scale_p, float? rope_theta_p, "
            "flag return_lse_p, none custom_mask_d, none packed_custom_mask_d, bool causal_d, str? kv_layout_d, str? pos_encoding_mode_d, "
            "float? sm_scale_d, int? window_left_d, float? rope_scale_d, float? rope_theta_d, number q_scale, number k_scale, number v_scale, "
            "flag return_lse_d, bool use_fp16_qk_reduction, bool? enable_pdl, varargs args",
            r.pod,
            2,
            packed="((made[0], made[1]) if return_lse_p else made[0], (made[-2], made[-1]) if return_lse_d else made[-1])",
        ),
    },
    "prefill": {
        "BatchPrefillWithPagedKVCacheWrapper.run": Operator(
            f"self self, q, cache paged_kv_cache, varargs args, {_SCALES}, {_OUT}, int? window_left, Tensor? sinks",
            r.attention(),
            1,
        ),
        "BatchPrefillWithRaggedKVCacheWrapper.run": Operator(
            f"self self, q, k, v, varargs args, {_SCALES}, {_OUT}, int? window_left, Tensor? sinks", _DENSE, 1
        ),
    },
    "sparse": {
        "BlockSparseAttentionWrapper.run": Operator(
            "self self, q, k, v, number scale_q, number scale_k, number scale_v, out out, out lse, flag return_lse, bool? enable_pdl",
            _DENSE,
            1,
        ),
        "VariableBlockSparseAttentionWrapper.run": Operator(f"self self, q, k, v, {_OUT}", _DENSE, 1),
    },
}

NOT_TRACED: dict[str, str] = {
    "TopKTieBreak": "an enumeration",
    "top_k_varlen": "takes dictionaries and hints; compiled code takes top_k_ragged_transform",
    "fast_decode_plan": "plans, outside of compiled code",
    "install_as_flashinfer": "changes what an import finds; takes no tensor",
    "block_sparse_indices_to_vector_sparse_offsets": "removed from FlashInfer; returns what it wrote to or a new tensor, by block_size",
    "copy_pages": "takes any number of caches; bookkeeping of a server between steps, no part of a model",
    "support": "answers about a configuration; takes no tensor",
    "warmup": "compiles kernels; takes no tensor",
    "single_prefill_with_kv_cache_return_lse": "a functools.partial of single_prefill_with_kv_cache, which is traced",
    "top_k_renorm_prob": "the same function as top_k_renorm_probs",
    "top_p_renorm_prob": "the same function as top_p_renorm_probs",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "inherits run",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": "deprecated forms of MultiLevelCascadeAttentionWrapper; its forward() plans anew",
    "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": "deprecated forms of MultiLevelCascadeAttentionWrapper; its forward() plans anew",
    "BatchPODWithPagedKVCacheWrapper": "its run() plans anew when causality or mask change",
    "ModelConfig": "a description; takes no tensor",
    "AttentionVariant": "a description; takes no tensor",
}
"""Public names without a row, and why."""
