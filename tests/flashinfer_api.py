"""FlashInfer's public names and arguments (facts of shared/API.md: v0.2.9, behind `|` what came later), and what of them pyinfer lacks.

`python -m tests.flashinfer_api` rewrites the lists in docs/flashinfer_compat.md; tests/test_flashinfer_compat.py fails when they are out of date.
"""

# ruff: noqa: E501 - one signature a line
from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "flashinfer_compat.md"
BEGIN, END = "<!-- generated: python -m tests.flashinfer_api -->", "<!-- end -->"

_SAMPLE = "indices deterministic generator check_nan | seed offset return_valid"
_ROPE = "rotary_dim interleave rope_scale rope_theta"
_LLAMA = f"{_ROPE} low_freq_factor high_freq_factor old_context_len"
_ROPE_ARGS = "rope_scale rope_theta"
_TABLE = "kv_indices kv_indptr kv_last_page_len"

# Arguments in order. A class is its constructor; methods follow as Class.method.
SIGNATURES: dict[str, dict[str, str]] = {
    "decode": {
        "single_decode_with_kv_cache": f"q k v kv_layout pos_encoding_mode use_tensor_cores q_scale k_scale v_scale window_left logits_soft_cap sm_scale {_ROPE_ARGS} return_lse",
        "BatchDecodeWithPagedKVCacheWrapper": "float_workspace_buffer kv_layout use_cuda_graph use_tensor_cores paged_kv_indptr_buffer paged_kv_indices_buffer paged_kv_last_page_len_buffer backend jit_args",
        "BatchDecodeWithPagedKVCacheWrapper.plan": f"indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type data_type sm_scale {_ROPE_ARGS} non_blocking block_tables seq_lens | o_data_type fixed_split_size disable_split_kv",
        "BatchDecodeWithPagedKVCacheWrapper.run": "q paged_kv_cache | q_scale k_scale v_scale out lse return_lse enable_pdl window_left sinks q_len_per_req kv_cache_sf",
        "BatchDecodeWithPagedKVCacheWrapper.forward": f"q paged_kv_cache pos_encoding_mode q_scale k_scale v_scale window_left logits_soft_cap sm_scale {_ROPE_ARGS}",
        "BatchDecodeWithPagedKVCacheWrapper.run_return_lse": "q paged_kv_cache",
        "BatchDecodeWithPagedKVCacheWrapper.begin_forward": "",
        "BatchDecodeWithPagedKVCacheWrapper.forward_return_lse": "q paged_kv_cache",
        "BatchDecodeWithPagedKVCacheWrapper.end_forward": "",
        "BatchDecodeWithPagedKVCacheWrapper.reset_workspace_buffer": "float_workspace_buffer int_workspace_buffer",
        "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "workspace_buffer indptr_buffer indices_buffer last_page_len_buffer kv_layout use_tensor_cores",
        "BatchDecodeMlaWithPagedKVCacheWrapper": "float_workspace_buffer use_cuda_graph use_tensor_cores paged_kv_indptr_buffer paged_kv_indices_buffer paged_kv_last_page_len_buffer",
        "BatchDecodeMlaWithPagedKVCacheWrapper.plan": f"indptr indices last_page_len num_qo_heads head_dim_compressed_kv page_size sm_scale window_left logits_soft_cap data_type q_data_type {_ROPE_ARGS}",
        "BatchDecodeMlaWithPagedKVCacheWrapper.run": "q_nope q_pe paged_ckv_cache paged_kpe_cache q_scale k_scale v_scale out lse return_lse enable_pdl",
        "fast_decode_plan": f"self indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode window_left logits_soft_cap q_data_type kv_data_type data_type sm_scale {_ROPE_ARGS} non_blocking fixed_split_size disable_split_kv global_override_indptr_cpu",
        "single_decode_with_kv_cache_with_jit_module": "",
        "cudnn_batch_decode_with_kv_cache": "",
        "trtllm_batch_decode_with_kv_cache": "",
        "trtllm_batch_decode_with_kv_cache_mla": "",
        "TrtllmGenDecodeModule": "",
        "xqa": "",
        "get_seq_lens": "",
    },
    "prefill": {
        "single_prefill_with_kv_cache": f"q k v scale_q scale_k scale_v o_dtype custom_mask packed_custom_mask causal kv_layout pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap {_ROPE_ARGS} backend return_lse | k_scale v_scale kv_cache_sf",
        "single_prefill_with_kv_cache_return_lse": "q k v",
        "BatchPrefillWithPagedKVCacheWrapper": "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend jit_args | jit_kwargs",
        "BatchPrefillWithPagedKVCacheWrapper.plan": f"qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap {_ROPE_ARGS} q_data_type kv_data_type non_blocking prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr seq_lens block_tables | o_data_type fixed_split_size disable_split_kv seq_lens_q max_token_per_sequence max_sequence_kv",
        "BatchPrefillWithPagedKVCacheWrapper.run": "q paged_kv_cache | q_scale k_scale v_scale out lse return_lse enable_pdl window_left sinks",
        "BatchPrefillWithPagedKVCacheWrapper.forward": f"q paged_kv_cache causal pos_encoding_mode use_fp16_qk_reduction k_scale v_scale window_left logits_soft_cap sm_scale {_ROPE_ARGS}",
        "BatchPrefillWithRaggedKVCacheWrapper": "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf kv_indptr_buf custom_mask_buf mask_indptr_buf backend jit_args",
        "BatchPrefillWithRaggedKVCacheWrapper.plan": f"qo_indptr kv_indptr num_qo_heads num_kv_heads head_dim_qk head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode use_fp16_qk_reduction window_left logits_soft_cap sm_scale {_ROPE_ARGS} q_data_type kv_data_type non_blocking prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len max_item_len_ptr | o_data_type fixed_split_size disable_split_kv",
        "BatchPrefillWithRaggedKVCacheWrapper.run": "q k v | out lse return_lse enable_pdl q_scale k_scale v_scale o_scale v_indptr o_indptr",
        "BatchPrefillWithRaggedKVCacheWrapper.forward": f"q k v causal pos_encoding_mode use_fp16_qk_reduction window_left logits_soft_cap sm_scale {_ROPE_ARGS}",
        "single_prefill_with_kv_cache_with_jit_module": "",
        "cudnn_batch_prefill_with_kv_cache": "",
        "trtllm_batch_context_with_kv_cache": "",
        "fmha_varlen": "",
        "fmha_varlen_plan": "",
        "get_seq_lens": "",
    },
    "attention": {
        "BatchAttention": "kv_layout device",
        "BatchAttention.plan": "qo_indptr kv_indptr kv_indices kv_len_arr num_qo_heads num_kv_heads head_dim_qk head_dim_vo page_size causal sm_scale logits_soft_cap q_data_type kv_data_type use_profiler",
        "BatchAttention.run": "q kv_cache out lse logits_soft_cap profiler_buffer | k_scale v_scale kv_cache_sf",
        "BatchAttentionWithAttentionSinkWrapper": "float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf paged_kv_indptr_buf paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf backend pos_encoding_mode use_fp16_qk_reduction q_data_type kv_data_type o_data_type head_dim_qk head_dim_vo window_left",
        "BatchAttentionWithAttentionSinkWrapper.plan": f"qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim_qk page_size head_dim_vo custom_mask packed_custom_mask causal pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap {_ROPE_ARGS} q_data_type kv_data_type non_blocking",
        "BatchAttentionWithAttentionSinkWrapper.forward": f"q paged_kv_cache causal pos_encoding_mode use_fp16_qk_reduction k_scale v_scale window_left logits_soft_cap sm_scale {_ROPE_ARGS} sinks",
    },
    "mla": {
        "BatchMLAPagedAttentionWrapper": "float_workspace_buffer use_cuda_graph qo_indptr kv_indptr kv_indices kv_len_arr backend",
        "BatchMLAPagedAttentionWrapper.plan": "qo_indptr kv_indptr kv_indices kv_len_arr num_heads head_dim_ckv head_dim_kpe page_size causal sm_scale q_data_type kv_data_type use_profiler",
        "BatchMLAPagedAttentionWrapper.run": "q_nope q_pe ckv_cache kpe_cache out lse return_lse profiler_buffer kv_len page_table | return_lse_base_on_e ckv_scale kpe_scale o_scale",
    },
    "cascade": {
        "merge_state": "v_a s_a v_b s_b",
        "merge_state_in_place": "v s v_other s_other mask",
        "merge_states": "v s",
        "MultiLevelCascadeAttentionWrapper": "num_levels float_workspace_buffer kv_layout use_cuda_graph qo_indptr_buf_arr paged_kv_indptr_buf_arr paged_kv_indices_buf_arr paged_kv_last_page_len_buf_arr",
        "MultiLevelCascadeAttentionWrapper.plan": f"qo_indptr_arr paged_kv_indptr_arr paged_kv_indices_arr paged_kv_last_page_len num_qo_heads num_kv_heads head_dim page_size causal pos_encoding_mode use_fp16_qk_reduction sm_scale window_left logits_soft_cap {_ROPE_ARGS} q_data_type kv_data_type",
        "MultiLevelCascadeAttentionWrapper.run": "q paged_kv_cache",
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper": "float_workspace_buffer kv_layout",
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper.begin_forward": "unique_kv_indptr unique_kv_indices unique_kv_last_page_len num_qo_heads num_kv_heads head_dim page_size data_type",
        "BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward": f"q k_shared v_shared unique_kv_cache allow_fp16_qk_reduction sm_scale {_ROPE_ARGS}",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper": "float_workspace_buffer kv_layout",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper.begin_forward": "qo_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len num_qo_heads num_kv_heads head_dim page_size",
        "BatchPrefillWithSharedPrefixPagedKVCacheWrapper.forward": f"q k_shared v_shared unique_kv_cache causal use_fp16_qk_reduction sm_scale {_ROPE_ARGS}",
    },
    "sparse": {
        "BlockSparseAttentionWrapper": "float_workspace_buffer backend",
        "BlockSparseAttentionWrapper.plan": f"indptr indices M N R C num_qo_heads num_kv_heads head_dim mask packed_mask causal pos_encoding_mode use_fp16_qk_reduction logits_soft_cap sm_scale {_ROPE_ARGS} q_data_type kv_data_type o_data_type non_blocking",
        "BlockSparseAttentionWrapper.run": "q k v scale_q scale_k scale_v out lse return_lse enable_pdl",
        "convert_bsr_mask_layout": "mask indptr",
        "VariableBlockSparseAttentionWrapper": "float_workspace_buffer backend",
        "VariableBlockSparseAttentionWrapper.plan": f"block_mask_map block_row_sz block_col_sz num_qo_heads num_kv_heads head_dim causal pos_encoding_mode use_fp16_qk_reduction logits_soft_cap sm_scale {_ROPE_ARGS} non_blocking q_data_type kv_data_type",
        "VariableBlockSparseAttentionWrapper.run": "q k v out lse return_lse enable_pdl",
    },
    "pod": {
        "PODWithPagedKVCacheWrapper": "float_workspace_buffer kv_layout use_cuda_graph paged_kv_indptr_buffer paged_kv_indices_buffer paged_kv_last_page_len_buffer jit_args",
        "PODWithPagedKVCacheWrapper.plan": f"indptr indices last_page_len num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode window_left q_data_type kv_data_type data_type sm_scale {_ROPE_ARGS} non_blocking",
        "PODWithPagedKVCacheWrapper.run": "q_p k_p v_p q_d paged_kv_cache_d custom_mask_p packed_custom_mask_p causal_p kv_layout_p pos_encoding_mode_p sm_scale_p window_left_p rope_scale_p rope_theta_p return_lse_p custom_mask_d packed_custom_mask_d causal_d kv_layout_d pos_encoding_mode_d sm_scale_d window_left_d rope_scale_d rope_theta_d q_scale k_scale v_scale return_lse_d use_fp16_qk_reduction enable_pdl",
        "BatchPODWithPagedKVCacheWrapper": "float_workspace_buffer kv_layout",
        "BatchPODWithPagedKVCacheWrapper.plan": f"qo_indptr_p kv_indptr_p kv_indices_p last_page_len_p qo_indptr_d kv_indptr_d kv_indices_d last_page_len_d num_qo_heads num_kv_heads head_dim page_size pos_encoding_mode window_left q_data_type kv_data_type data_type sm_scale {_ROPE_ARGS} non_blocking",
        "BatchPODWithPagedKVCacheWrapper.run": "q_p paged_kv_cache_p q_d paged_kv_cache_d custom_mask_p packed_custom_mask_p causal_p q_scale k_scale v_scale return_lse use_fp16_qk_reduction enable_pdl",
    },
    "page": {
        "append_paged_kv_cache": f"append_key append_value batch_indices positions paged_kv_cache {_TABLE} kv_layout",
        "append_paged_mla_kv_cache": f"append_ckv append_kpe batch_indices positions ckv_cache kpe_cache {_TABLE}",
        "get_batch_indices_positions": "append_indptr seq_lens nnz",
        "get_seq_lens": "kv_indptr kv_last_page_len page_size",
        "block_sparse_indices_to_vector_sparse_offsets": "indices indptr out_offsets out_indptr kv_lens stride_block stride_n block_size",
    },
    "rope": {
        **{f"apply_rope{s}": f"q k indptr offsets {_ROPE}" for s in ("", "_inplace")},
        **{f"apply_rope_pos_ids{s}": f"q k pos_ids {_ROPE}" for s in ("", "_inplace")},
        **{f"apply_llama31_rope{s}": f"q k indptr offsets {_LLAMA}" for s in ("", "_inplace")},
        **{f"apply_llama31_rope_pos_ids{s}": f"q k pos_ids {_LLAMA}" for s in ("", "_inplace")},
        **{f"apply_rope_with_cos_sin_cache{s}": "positions query key head_size cos_sin_cache is_neox" for s in ("", "_inplace")},
        "mla_rope_quantize_fp8": "",
        "rope_quantize_fp8": "",
        "rope_quantize_fp8_append_paged_kv_cache": "",
    },
    "norm": {
        "rmsnorm": "input weight eps out enable_pdl",
        "gemma_rmsnorm": "input weight eps out enable_pdl",
        "fused_add_rmsnorm": "input residual weight eps enable_pdl",
        "gemma_fused_add_rmsnorm": "input residual weight eps enable_pdl",
        **dict.fromkeys(("layernorm", "rmsnorm_quant", "fused_add_rmsnorm_quant", "fused_rmsnorm_silu"), ""),
        "fused_qk_rmsnorm_rope": "| qkv q_weight k_weight ppf pph ppw num_frame_channels num_height_channels num_width_channels num_heads_q num_heads_k num_heads_v head_dim eps base interleave factor low high attention_factor is_qk_norm output_fp8 output_quant_scale v_quant_scale q_out k_out v_out",
    },
    "activation": {
        **dict.fromkeys(("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul"), "input out enable_pdl"),
        "gen_act_and_mul_module": "act_func_name",
        "act_func_def_str": "",
    },
    "sampling": {
        "softmax": "logits temperature enable_pdl",
        "sampling_from_probs": f"probs {_SAMPLE}",
        "sampling_from_logits": f"logits {_SAMPLE}",
        "top_p_sampling_from_probs": f"probs top_p {_SAMPLE}",
        "top_k_sampling_from_probs": f"probs top_k {_SAMPLE}",
        "min_p_sampling_from_probs": f"probs min_p {_SAMPLE}",
        "top_k_top_p_sampling_from_logits": f"logits top_k top_p indices filter_apply_order {_SAMPLE.partition(' ')[2]}",
        "top_k_top_p_sampling_from_probs": f"probs top_k top_p indices filter_apply_order {_SAMPLE.partition(' ')[2]}",
        **dict.fromkeys(("top_p_renorm_probs", "top_p_renorm_prob"), "probs top_p"),
        **dict.fromkeys(("top_k_renorm_probs", "top_k_renorm_prob"), "probs top_k"),
        "top_k_mask_logits": "logits top_k",
        "chain_speculative_sampling": "draft_probs draft_token_ids target_probs maybe_output_accepted_token_num maybe_output_emitted_draft_token_num deterministic generator",
    },
    "topk": {
        "top_k": "input k sorted deterministic tie_break",
        "top_k_page_table_transform": "input src_page_table lengths k row_to_batch deterministic tie_break",
        "top_k_ragged_transform": "input offsets lengths k deterministic tie_break",
        "top_k_varlen": "logits seq_lens top_k pre_idx compress_ratio next_n return_values out_indices out_values backend load_balance workspace approx_ties",
        "TopKTieBreak": "",
    },
    "quantization": {"packbits": "x bitorder", "segment_packbits": "x indptr bitorder"},
    "logits_processor": dict.fromkeys(
        ("LogitsPipe", "Temperature", "Softmax", "TopK", "TopP", "MinP", "Sample", "Compiler", "compile_pipeline", "CompileError", "FusionRule", "LegalizationError", "legalize_processors", "Op", "ParameterizedOp", "LogitsProcessor", "TaggedTensor", "TensorType"), ""
    ),
    "utils": dict.fromkeys(
        ("get_compute_capability", "is_sm90a_supported", "is_sm100a_supported", "determine_attention_backend", "is_fa3_backend_supported", "determine_gemm_backend", "determine_mla_backend", "device_support_pdl", "get_alibi_slopes", "next_positive_power_of_2", "round_up", "ceil_div", "get_indptr", "canonicalize_torch_dtype", "register_custom_op", "register_fake_op", "FP4Tensor", "set_log_level", "MaskMode", "PosEncodingMode", "TensorLayout"), ""
    ),
    "jit": dict.fromkeys(("JitSpec", "gen_jit_spec", "build_jit_specs", "clear_cache_dir", "env"), ""),
    "triton": dict.fromkeys(("activation", "cascade", "norm", "page", "quantize", "sm_constraint_gemm"), ""),
    "gemm": dict.fromkeys(
        ("SegmentGEMMWrapper", "bmm_fp8", "gemm_fp8_nt_groupwise", "gemm_fp8_nt_blockscaled", "group_gemm_fp8_nt_groupwise", "group_gemm_mxfp4_nt_groupwise", "mm_fp4", "group_deepgemm_fp8_nt_groupwise", "batch_deepgemm_fp8_nt_groupwise", "pad_indptr_to_multiple_of_4", "mm_bf16", "bmm_bf16", "mm_fp8"), ""
    ),
    "fp4_quantization": dict.fromkeys(("fp4_quantize", "nvfp4_quantize", "nvfp4_block_scale_interleave", "e2m1_and_ufp8sf_scale_to_float", "shuffle_matrix_a", "shuffle_matrix_sf_a", "SfLayout"), ""),
    "fused_moe": dict.fromkeys(("cutlass_fused_moe", "RoutingMethodType", "WeightLayout", "reorder_rows_for_gated_act_gemm", "convert_to_block_layout", "trtllm_fp8_per_tensor_scale_moe", "trtllm_fp8_block_scale_moe", "trtllm_fp4_block_scale_moe"), ""),
    "comm": dict.fromkeys(("create_shared_buffer", "free_shared_buffer", "CudaRTLibrary", "Mapping", "vllm_all_reduce", "trtllm_allreduce_fusion", "trtllm_custom_all_reduce", "trtllm_moe_allreduce_fusion", "MnnvlMoe"), ""),
    "green_ctx": dict.fromkeys(("split_device_green_ctx", "split_device_green_ctx_by_sm_count", "get_sm_count_constraint"), ""),
    "profiler": dict.fromkeys(("export_to_perfetto_trace", "decode_tag"), ""),
    "testing": dict.fromkeys(("set_seed", "sleep_after_kernel_run", "attention_flops", "attention_tflops_per_sec", "attention_tb_per_sec", "bench_gpu_time", "bench_gpu_time_with_cudagraph", "utils"), ""),
    "autotuner": dict.fromkeys(("autotune", "AutoTuner", "TuningConfig"), ""),
}  # fmt: skip


def module_of(name: str) -> Any:
    """pyinfer's module of that name, None without one."""
    try:
        return importlib.import_module(f"pyinfer.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("pyinfer"):
            return importlib.import_module(f"pyinfer.{name}")  # it lacks a dependency: not the question here
        return None


def find(module: str, name: str) -> Any:
    """What pyinfer has by a name of FlashInfer's; None if nothing."""
    from pyinfer._flashinfer import _ELSEWHERE

    value = module_of(_ELSEWHERE.get(module, {}).get(name, module))
    for part in name.split("."):
        if value is None:
            return None
        found = getattr(value, part, None)
        if found is None and inspect.ismodule(value):
            found = module_of(f"{value.__name__.removeprefix('pyinfer.')}.{part}")
        value = found
    return value


def arguments(text: str) -> tuple[list[str], list[str]]:
    """The arguments in order, and those that came later."""
    first, _, later = text.partition("|")
    return first.split(), later.split()


def missing() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Names that pyinfer lacks, by module; and arguments, by function."""
    names: dict[str, list[str]] = {}
    args: dict[str, list[str]] = {}
    for module, entries in SIGNATURES.items():
        for name, text in entries.items():
            found = find(module, name)
            if found is None:
                names.setdefault(module, []).append(name)
                continue
            wanted = [a for part in arguments(text) for a in part]
            if wanted:
                have = inspect.signature(found).parameters
                lacks = [a for a in wanted if a not in have]
                if lacks:
                    args[f"{module}.{name}"] = lacks
    return names, args


def lists() -> str:
    """The generated part of the page."""
    names, args = missing()
    lines = [BEGIN, "", "### Arguments", "", "| function | lacks |", "|---|---|"]
    lines += [f"| `{name}` | {', '.join(f'`{a}`' for a in lacks)} |" for name, lacks in sorted(args.items())]
    lines += ["", "### Names", "", "| module | lacks |", "|---|---|"]
    for module, lacks in sorted(names.items()):
        whole = " (the whole module)" if module_of(module) is None else ""
        lines.append(f"| `{module}`{whole} | {', '.join(f'`{n}`' for n in lacks)} |")
    return "\n".join([*lines, "", END])


def main() -> None:
    """Rewrite the lists."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(before + lists() + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
