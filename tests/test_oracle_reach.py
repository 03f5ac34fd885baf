"""What the oracle grid does not reach cannot be selected: every value that an operator takes, and every argument that it has, is in the grid or listed here."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import pyinfer
from pyinfer import _support
from tests import oracle_grid
from tests.oracle_grid import DIMS, GROUPS, NAMES, OPS

pytestmark = pytest.mark.cpu

OTHER_NAMES = {
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper": "decode, with buffers: tests/test_graph_replay.py",
    "single_prefill_with_kv_cache_return_lse": "single_prefill",
}
MLA = ("mla", "mla_decode")
TYPE = {
    "mla_decode": "data_type",
    "prefix_decode": "data_type",
}  # the argument that names the dtype, where it is not q_data_type
DTYPES = ("float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "bool")
ON = pytest.mark.parametrize("device", ["cpu", "cuda"])
EVERY = pytest.mark.parametrize("op", NAMES)


def takes(op: str, device: str, **config: Any) -> bool:
    if op == "cascade_one":
        config["num_levels"] = 1
    if op == "mla_decode" and "data_type" in config:
        config.setdefault("q_data_type", None)
    return bool(pyinfer.support(NAMES[op], device=device, **config))


def taken(op: str, device: str, argument: str, values: Any, **config: Any) -> set[Any]:
    return {v for v in values if takes(op, device, **config, **{argument: v})}


def in_grid(op: str, device: str, factor: str) -> set[Any]:
    return set(OPS[op][factor]) & set(oracle_grid.on_device(device)[factor])


@ON
@EVERY
def test_dtypes(op, device):
    argument = TYPE.get(op, "q_data_type")
    # Queries of 8 bits, on Hopper, have options, a reference and cases of their own: tests/test_prefill_fp8.py.
    assert taken(op, device, argument, DTYPES) - {"float8_e4m3fn"} == in_grid(op, device, "dtype")
    if argument == "data_type" or op == "prefix_prefill":
        return  # one dtype for all
    for dtype in sorted(in_grid(op, device, "dtype")):
        kv = taken(op, device, "kv_data_type", DTYPES, q_data_type=dtype)
        assert kv == {dtype if v == "same" else v for v in in_grid(op, device, "kv")}
        if len(OPS[op]["out"]) > 1:
            out = taken(op, device, "o_data_type", DTYPES, q_data_type=dtype)
            assert out == in_grid(op, device, "out") - {"same"}


@ON
@EVERY
def test_head_dimensions(op, device):
    if op in MLA:
        name = "head_dim_ckv" if op == "mla" else "head_dim_compressed_kv"
        assert taken(op, "cuda", name, range(0, 1100, 4)) == {512}
        if op == "mla":
            assert taken(op, "cuda", "head_dim_kpe", range(0, 300, 4)) == {64}
        return
    got = taken(op, device, "head_dim", [*range(-1, 270), 320, 512, 576])
    reached = {d[0] for name in OPS[op]["dims"] for d in DIMS[name] if d[0] == d[1]}
    if device == "cuda":
        assert got == reached - {d[0] for d in DIMS["odd"]}
    else:  # a number like any other there: test_every_head_dimension
        assert got == set(range(1, 257)) >= reached


@pytest.mark.parametrize("op", [op for op in OPS if "uneven" in OPS[op]["dims"]])
def test_unequal_head_dimensions(op):
    """Any two that have a kernel: the grid has classes of them."""
    for qk, vo in ((8, 256), (256, 8), (192, 128), (72, 40)):
        assert takes(op, "cuda", head_dim_qk=qk, head_dim_vo=vo)
    for qk, vo in ((64, 12), (12, 64), (264, 64), (64, 264)):
        assert not takes(op, "cuda", head_dim_qk=qk, head_dim_vo=vo)


@ON
@EVERY
def test_groups(op, device):
    assert {n for members in GROUPS.values() for n in members} <= set(range(1, 129))
    if op in MLA:
        return  # heads are rows of a tile: test_many_mla_heads
    groups = taken(op, device, "num_qo_heads", [*range(-1, 140), 192, 256, 1000])
    assert groups == set(range(1, 129))  # test_every_group_size has them all
    assert not takes(op, device, num_qo_heads=6, num_kv_heads=4)


@ON
@EVERY
def test_named_options(op, device):
    function = getattr(pyinfer, NAMES[op])
    names = set(inspect.signature(function).parameters)
    if inspect.isclass(function):
        plan = getattr(function, "plan", None) or function.begin_forward
        names |= set(inspect.signature(plan).parameters)
    if "pos_encoding_mode" in names:
        modes = ("NONE", "ROPE_LLAMA", "ALIBI", "rope", "none", "")
        assert taken(op, device, "pos_encoding_mode", modes) == in_grid(op, device, "pos")
    if "kv_layout" in names:
        assert taken(op, device, "kv_layout", ("NHD", "HND", "DHN", "")) == {"NHD", "HND"}
    if "window_left" in names:
        windows = taken(op, device, "window_left", (-2, -1, 0, 1, 5000))
        assert windows == ({-1} if len(OPS[op]["window"]) == 1 else {-1, 0, 1, 5000})
    if "logits_soft_cap" in names:
        assert taken(op, device, "logits_soft_cap", (-1.0, 0.0, 30.0, float("inf"))) == {0.0, 30.0}
    if "page_size" in names:
        assert taken(op, device, "page_size", (-1, 0, 1, 2, 256, 1024)) == {1, 2, 256, 1024}
    if "backend" in names:
        known = (*_support.BACKENDS, "cudnn", "trtllm-gen", "cutlass", "xqa", "")
        assert taken(op, device, "backend", known) == in_grid(op, device, "backend") <= set(_support.BACKENDS)


# ---- arguments -------------------------------------------------------------------------------------------------------------------
FACTOR = {  # of the grid, by the names that arguments have
    "layout": "kv_layout kv_layout_p",
    "causal": "causal causal_p",
    "mask": "custom_mask packed_custom_mask custom_mask_p packed_custom_mask_p mask packed_mask "
            "prefix_len_ptr token_pos_in_items_ptr token_pos_in_items_len",
    "window": "window_left window_left_p",
    "cap": "logits_soft_cap",
    "scale": "sm_scale sm_scale_p",
    "pos": "pos_encoding_mode rope_scale rope_theta pos_encoding_mode_p rope_scale_p rope_theta_p",
    "sinks": "sinks",
    "scales": "q_scale k_scale v_scale scale_q scale_k scale_v",
    "split": "fixed_split_size disable_split_kv",
    "results": "out lse return_lse return_lse_p return_lse_d",
    "workspace": "float_workspace_buffer",
    "backend": "backend",
    "out": "o_dtype o_data_type",
    "kv": "kv_data_type",
    "dtype": "q_data_type data_type",
    "dims": "head_dim head_dim_qk head_dim_vo head_dim_ckv head_dim_kpe head_dim_compressed_kv",
    "group": "num_qo_heads num_kv_heads num_heads",
    "page": "page_size C",
    "index": "qo_indptr_p kv_indptr_p kv_indices_p last_page_len_p qo_indptr_d kv_indptr_d kv_indices_d last_page_len_d "
             "indptr indices last_page_len qo_indptr kv_indptr paged_kv_indptr paged_kv_indices paged_kv_last_page_len kv_indices kv_len_arr "
             "qo_indptr_arr paged_kv_indptr_arr paged_kv_indices_arr block_mask_map block_row_sz block_col_sz "
             "unique_kv_indptr unique_kv_indices unique_kv_last_page_len",
    "form": "q k v paged_kv_cache kv_cache q_p k_p v_p q_d paged_kv_cache_p paged_kv_cache_d q_nope q_pe ckv_cache kpe_cache paged_ckv_cache paged_kpe_cache "
            "k_shared v_shared unique_kv_cache",
    "shape": "M N R num_levels",
}  # fmt: skip
ELSEWHERE = {  # arguments that change no number, or that only one value is taken for
    "self args kwargs options": "",
    "use_cuda_graph max_batch_size max_num_tokens max_num_pages paged_kv_indptr_buffer "
    "paged_kv_indices_buffer paged_kv_last_page_len_buffer qo_indptr_buf paged_kv_indptr_buf kv_indptr_buf "
    "paged_kv_indices_buf paged_kv_last_page_len_buf custom_mask_buf mask_indptr_buf qo_indptr_buf_arr paged_kv_indptr_buf_arr paged_kv_indices_buf_arr "
    "paged_kv_last_page_len_buf_arr": "test_graph_replay, test_options: the same kernels, plans of fixed size",
    "use_tensor_cores use_fp16_qk_reduction allow_fp16_qk_reduction non_blocking max_item_len_ptr device": "accepted, changes nothing",
    "enable_pdl": "test_decode, test_prefill: the launch alone",
    "strict": "test_plan_contract: what plan() may copy",
    "seq_lens block_tables profiler_buffer kv_len page_table use_profiler": "refused but for their defaults",
    "custom_mask_d packed_custom_mask_d rope_scale_d rope_theta_d kv_layout_d pos_encoding_mode_d window_left_d sm_scale_d causal_d": "test_pod: "
    "refused, or the plan's once more",
    "return_lse_base_on_e ckv_scale kpe_scale": "test_mla",
    "jit_args jit_kwargs variant variant_args": "test_variants",
}  # fmt: skip
KNOWN = {name for names in FACTOR.values() for name in names.split()} | {
    n for names in ELSEWHERE for n in names.split()
}


def arguments(op: str) -> dict[str, str]:
    """Every argument of an operator, or of a wrapper's constructor, plan and run; and where it is."""
    function = getattr(pyinfer, NAMES[op])
    parts = {"": function}
    if inspect.isclass(function):
        methods = [m for m in ("plan", "begin_forward", "run", "forward") if hasattr(function, m)]
        if "plan" in methods:
            methods = ["plan", "run"]  # the others are older names of these
        parts = {"__init__": function} | {m: getattr(function, m) for m in methods}
    return {name: where for where, part in parts.items() for name in inspect.signature(part).parameters}


@EVERY
def test_every_argument_is_accounted_for(op):
    unknown = {name: where for name, where in arguments(op).items() if name not in KNOWN}
    assert not unknown, f"neither in the grid nor listed as tested elsewhere: {unknown}"
    for factor, names in FACTOR.items():
        if factor in OPS[op] and len(OPS[op][factor]) == 1 and factor not in ("form", "shape", "dims", "index"):
            there = set(names.split()) & set(arguments(op))
            assert there <= FIXED.get(op, set()), f"{op} has {there}, but the grid keeps {factor} at {OPS[op][factor]}"


FIXED = {  # arguments that an operator has and the grid leaves alone, for one value is all it takes
    "sinks": {"sinks"},  # it has no run() without them
    "cascade": {"pos_encoding_mode", "rope_scale", "rope_theta", "window_left"},
    "mla": {"q_data_type", "sm_scale"},
    "mla_decode": {"sm_scale", "rope_scale", "rope_theta", "v_scale"},
    "prefix_decode": {"rope_scale", "rope_theta"},
    "prefix_prefill": {"rope_scale", "rope_theta"},
}


def test_every_operator_is_in_the_grid():
    """Every public name that attends to keys."""
    public = {
        name
        for name in dir(pyinfer)
        if name.startswith(("single_", "Batch", "CUDAGraphBatch", "MultiLevel", "POD", "BlockSparse", "VariableBlock"))
    }
    assert public == set(NAMES.values()) | set(OTHER_NAMES)
    assert set(NAMES) == set(OPS) == set(oracle_grid.FACTORS["op"])
