"""What is refused because of where a tensor lies, and of how it lies there. The tensors of cuda:0 are imagined: checks look at no memory."""

# ruff: noqa: E501 - the tables below hold one case a line
from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest

import pyinfer
from pyinfer.core.dtypes import FLOAT16
from pyinfer.core.imagined import Imagined
from pyinfer.core.tensor import view
from pyinfer.schedulers.decode import decode_plan

pytestmark = pytest.mark.cpu
F, H = "float32", "float16"
TABLE: dict[str, Any] = {"indptr": [0, 2, 3], "indices": [4, 0, 5], "last_page_len": [3, 16]}
HEADS = (4, 2, 64, 16)
HERE = "got cuda:0, wanted cpu"


def there(*shape: int, dtype: str = F, strides: Any = None, device: int = 0) -> Any:
    return Imagined(shape, dtype, device, strides=strides)


def here(*shape: int, dtype: str = F) -> Any:
    return np.zeros(shape, dtype)


def cache(make: Any = here, dtype: str = F) -> Any:
    return make(6, 16, 2, 64, dtype=dtype), make(6, 16, 2, 64, dtype=dtype)


def decode(workspace: Any = None, **changes: Any) -> Any:
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    wrapper.plan(**{**TABLE, **changes}, num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, q_data_type=F)
    return wrapper


def prefill(**changes: Any) -> Any:
    wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
    table = {f"paged_kv_{k}": v for k, v in TABLE.items()}
    args = {
        "qo_indptr": [0, 1, 2],
        **table,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "page_size": 16,
        "q_data_type": F,
    }
    wrapper.plan(**{**args, **changes})
    return wrapper


def items(**changes: Any) -> Any:
    args = {"prefix_len_ptr": there(2, dtype="uint32"), "token_pos_in_items_ptr": there(2, dtype="uint16")}
    return prefill(token_pos_in_items_len=1, **{**args, **changes})


def graph(**changes: Any) -> Any:
    buffers = {
        f"paged_kv_{k}_buffer": np.zeros(n, np.int32) for k, n in (("indptr", 3), ("indices", 8), ("last_page_len", 2))
    }
    return pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD", True, **{**buffers, **changes})


def ragged() -> Any:
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
    wrapper.plan([0, 1, 2], [0, 4, 9], 4, 2, 64, q_data_type=F)
    return wrapper


def mixed(fused: bool = False, **changes: Any) -> Any:
    """BatchAttention; fused: as on a GPU, where it checks the tensors itself."""
    wrapper = pyinfer.BatchAttention()
    table = {"qo_indptr": [0, 1, 2], "kv_indptr": [0, 2, 3], "kv_indices": [4, 0, 5], "kv_len_arr": [19, 16]}
    dtype = "bfloat16" if fused else F
    args = {
        **table,
        "num_qo_heads": 4,
        "num_kv_heads": 2,
        "head_dim_qk": 64,
        "head_dim_vo": 64,
        "page_size": 16,
        "q_data_type": dtype,
        "kv_data_type": dtype,
    }
    wrapper.plan(**{**args, **changes})
    if fused:
        wrapper._home, wrapper._ready = view(there(1)), object()
    return wrapper


def bf(*shape: int, **options: Any) -> Any:
    return there(*shape, dtype="bfloat16", **options)


def mla(**changes: Any) -> Any:
    wrapper = pyinfer.BatchMLAPagedAttentionWrapper()
    args = ([0, 1, 2], [0, 2, 3], [4, 0, 5], [19, 16], 4, 512, 64, 16, False, 0.1, F, F)
    wrapper.plan(*args, **changes)
    return wrapper


def latent(make: Any = here) -> Any:
    return make(6, 16, 512), make(6, 16, 64)


def sparse() -> Any:
    wrapper = pyinfer.BlockSparseAttentionWrapper()
    wrapper.plan([0, 1], [0], 16, 16, 16, 16, 4, 2, 64, q_data_type=F)
    return wrapper


def plan_of(**changes: Any) -> Any:
    args = dict(num_qo_heads=4, num_kv_heads=2, head_dim_qk=64, page_size=16, tile_q=16, tile_kv=64, num_sms=4)
    return decode_plan(*(np.array(x, np.int32) for x in TABLE.values()), **{**args, **changes})


Q, K = (2, 4, 64), (9, 2, 64)

CASES: dict[str, tuple[Any, type, str]] = {
    # attention of one request
    "single: k": (lambda: pyinfer.single_prefill_with_kv_cache(here(*Q), there(*K), here(*K)), ValueError, f"k is on another device: {HERE} (where q is)"),
    "single: v": (lambda: pyinfer.single_decode_with_kv_cache(here(4, 64), here(*K), there(*K)), ValueError, f"v is on another device: {HERE}"),
    "single: mask": (lambda: pyinfer.single_prefill_with_kv_cache(here(*Q), here(*K), here(*K), custom_mask=there(2, 9, dtype="bool")), ValueError, f"custom_mask is on another device: {HERE}"),
    "single: packed mask": (lambda: pyinfer.single_prefill_with_kv_cache(here(*Q), here(*K), here(*K), packed_custom_mask=there(3, dtype="uint8")), ValueError, f"packed_custom_mask is on another device: {HERE}"),
    # batch wrappers: plan
    "workspace": (lambda: pyinfer.BatchDecodeWithPagedKVCacheWrapper(np.zeros((8, 8), np.uint8)[:, :4]), ValueError, "float_workspace_buffer is not contiguous: got strides (8, 1), wanted a contiguous tensor"),
    "second workspace": (lambda: decode(np.zeros(1 << 20, np.uint8)).reset_workspace_buffer(there(1 << 20, dtype="uint8")), ValueError, f"float_workspace_buffer is on another device: {HERE}"),
    "buffer": (lambda: pyinfer.BatchDecodeWithPagedKVCacheWrapper(here(8), "NHD", True, paged_kv_indptr_buffer=there(3, dtype="int32")), ValueError, f"paged_kv_indptr_buffer is on another device: {HERE} (where the workspace is)"),
    "buffer axes": (lambda: graph(paged_kv_indices_buffer=np.zeros((2, 4), np.int32)), ValueError, "paged_kv_indices_buffer has the wrong number of axes: got 2 (shape (2, 4)), wanted 1"),
    "buffer stride": (lambda: graph(paged_kv_indices_buffer=np.zeros(16, np.int32)[::2]), ValueError, "paged_kv_indices_buffer is not contiguous in its last axis: got strides (2,)"),
    "indices": (lambda: decode(np.zeros(1 << 20, np.uint8), indices=there(3, dtype="int32")), ValueError, f"paged_kv_indices is on another device: {HERE}"),
    "indices axes": (lambda: decode(indices=there(3, 1, dtype="int32")), ValueError, "paged_kv_indices has the wrong number of axes: got 2"),
    "indices dtype": (lambda: decode(indices=there(3)), TypeError, "paged_kv_indices has the wrong dtype: got float32, wanted int32 or int64"),
    "indices stride": (lambda: decode(indices=there(3, dtype="int32", strides=(2,))), ValueError, "paged_kv_indices is not contiguous in its last axis: got strides (2,)"),
    "indices short": (lambda: decode(indices=there(2, dtype="int32")), ValueError, "paged_kv_indices is too short: got 2, wanted at least 3 (paged_kv_indptr[-1])"),
    "mask elsewhere": (lambda: prefill(paged_kv_indices=there(3, dtype="int32"), packed_custom_mask=there(9, dtype="uint8", device=1)), ValueError, "packed_custom_mask is on another device: got cuda:1, wanted cuda:0"),
    "mask too large": (
        lambda: prefill(
            qo_indptr=[0, 1 << 17],
            paged_kv_indptr=[0, 1 << 13],
            paged_kv_indices=np.zeros(1 << 13, np.int32),
            paged_kv_last_page_len=[16],
            custom_mask=np.zeros(1, bool),
        ),
        ValueError,
        f"custom_mask is too large: got {1 << 31} bytes packed, wanted at most 2147483647",
    ),
    "packed mask stride": (lambda: pyinfer.single_prefill_with_kv_cache(there(*Q, dtype=H), there(*K, dtype=H), there(*K, dtype=H), packed_custom_mask=there(9, dtype="uint8", strides=(2,))), ValueError, "packed_custom_mask is not contiguous: got strides (2,)"),
    "items apart": (lambda: items(prefix_len_ptr=[1, 1]), ValueError, "token_pos_in_items_ptr is on another device: got one on the host, one on a GPU, wanted prefix_len_ptr and token_pos_in_items_ptr on one device"),
    "prefix dtype": (lambda: items(prefix_len_ptr=there(2, dtype="int64")), TypeError, "prefix_len_ptr has the wrong dtype: got int64, wanted uint32 or int32"),
    "places dtype": (lambda: items(token_pos_in_items_ptr=there(2, dtype="int32")), TypeError, "token_pos_in_items_ptr has the wrong dtype: got int32, wanted uint16 or int16"),
    "prefix stride": (lambda: items(prefix_len_ptr=there(2, dtype="uint32", strides=(2,))), ValueError, "prefix_len_ptr is not contiguous: got strides (2,)"),
    "prefix short": (lambda: items(prefix_len_ptr=there(1, dtype="uint32")), ValueError, "prefix_len_ptr is too short: got 1 entries, wanted at least 2"),
    # batch wrappers: run
    "q": (lambda: decode(np.zeros(1 << 20, np.uint8)).run(there(*Q), cache()), ValueError, f"q is on another device: {HERE} (where the wrapper's buffers are)"),
    "cache": (lambda: decode().run(here(*Q), cache(there)), ValueError, f"paged_kv_cache (K) is on another device: {HERE} (where q is)"),
    "cache v": (lambda: decode().run(here(*Q), (cache()[0], cache(there)[0])), ValueError, f"paged_kv_cache (V) is on another device: {HERE}"),
    "cache axes": (lambda: decode().run(here(*Q), (here(6, 16, 64), here(6, 16, 64))), ValueError, "paged_kv_cache[0] has the wrong number of axes: got 3 (shape (6, 16, 64)), wanted 4"),
    "cache v axes": (lambda: decode().run(here(*Q), (cache()[0], here(6, 16, 64))), ValueError, "paged_kv_cache[1] has the wrong number of axes: got 3"),
    "ragged k": (lambda: ragged().run(here(*Q), there(*K), here(*K)), ValueError, f"k is on another device: {HERE}"),
    "out": (lambda: decode().run(here(*Q), cache(), out=there(*Q)), ValueError, f"out is on another device: {HERE} (where q is)"),
    "sinks": (lambda: decode().run(here(*Q), cache(), sinks=there(4)), ValueError, f"sinks is on another device: {HERE} (where q is)"),
    # BatchAttention
    "mixed: indices axes": (lambda: mixed(kv_indices=there(3, 1, dtype="int32")), ValueError, "BatchAttention: kv_indices has the wrong number of axes: got 2"),
    "mixed: indices dtype": (lambda: mixed(kv_indices=there(3, dtype="int64")), TypeError, "kv_indices has the wrong dtype: got int64, wanted int32"),
    "mixed: indices stride": (lambda: mixed(kv_indices=there(3, dtype="int32", strides=(2,))), ValueError, "kv_indices is not contiguous in its last axis"),
    "mixed: indices short": (lambda: mixed(kv_indices=there(2, dtype="int32")), ValueError, "kv_indices is too short: got 2, wanted at least 3 (kv_indptr[-1])"),
    "mixed: q dtype": (lambda: mixed(True).run(there(*Q), cache()), TypeError, "BatchAttention: q differs from the planned dtype: got float32, wanted bfloat16. Pass q_data_type to plan()."),
    "mixed: q shape": (lambda: mixed(True).run(bf(3, 4, 64), (bf(6, 16, 2, 64),) * 2), ValueError, "BatchAttention: q has the wrong shape: got (3, 4, 64), wanted (2, 4, 64)"),
    "mixed: cache dtype": (lambda: mixed(True).run(bf(*Q), cache(there, "float16")), TypeError, "kv_cache (K) differs from the planned dtype: got float16, wanted bfloat16. Pass kv_data_type to plan()."),
    "mixed: cache device": (lambda: mixed(True).run(bf(*Q), (bf(6, 16, 2, 64), bf(6, 16, 2, 64, device=1))), ValueError, "kv_cache (V) is on another device: got cuda:1, wanted cuda:0 (where q is)"),
    "mixed: cache shape": (lambda: mixed(True).run(bf(*Q), (bf(6, 16, 3, 64),) * 2), ValueError, "kv_cache (K) has the wrong shape: got (6, 16, 3, 64), wanted (any, 16, 2, 64)"),
    "mixed: cache stride": (lambda: mixed(True).run(bf(*Q), (bf(6, 16, 2, 64, strides=(4096, 256, 128, 2)),) * 2), ValueError, "kv_cache (K) is not contiguous in its last axis"),
    "mixed: cache pages": (lambda: mixed(True).run(bf(*Q), (bf(5, 16, 2, 64),) * 2), ValueError, "kv_indices names a page outside the cache: got 5, wanted 0..4 (kv_cache (K) has 5 pages)"),
    "mixed: lse": (lambda: mixed(True).run(bf(*Q), (bf(6, 16, 2, 64),) * 2, out=bf(*Q), lse=there(2, 4, strides=(8, 1))), ValueError, "BatchAttention: lse is not contiguous: got strides (8, 1)"),
    "mixed: few rows": (lambda: mixed_graph().run(here(1, 4, 64), cache()), ValueError, "BatchAttention: q has the wrong shape: got (1, 4, 64), wanted (2, any, any)"),
    "replan: kv_len": (lambda: graph_planned().replan(there(2, dtype="int32")), ValueError, f"BatchDecodeWithPagedKVCacheWrapper.replan: kv_len is on another device: {HERE}"),
    # MLA
    "MLA: q_pe": (lambda: mla().run(here(2, 4, 512), there(2, 4, 64), *latent()), ValueError, f"q_pe is on another device: {HERE} (where q_nope is)"),
    "MLA: ckv": (lambda: mla().run(here(2, 4, 512), here(2, 4, 64), *latent(there)), ValueError, f"ckv_cache is on another device: {HERE}"),
    "MLA: stride": (lambda: mla().run(np.zeros((2, 4, 1024), F)[:, :, ::2], here(2, 4, 64), *latent()), ValueError, "q_nope is not contiguous in its last axis: got strides (4096, 1024, 2)"),
    "MLA: lse": (lambda: mla().run(here(2, 4, 512), here(2, 4, 64), *latent(), lse=np.zeros((2, 8), F)[:, :4], return_lse=True), ValueError, "lse is not contiguous: got strides (8, 1)"),
    "MLA: profiler": (lambda: mla(use_profiler=True), ValueError, "use_profiler is not supported: got True, wanted False"),
    "old MLA: dtypes": (lambda: old_mla().plan([0, 1], [0], [1], 4, 512, 16, 0.1, data_type="bfloat16", q_data_type="float16"), TypeError, "data_type differs from q_data_type: got bfloat16, wanted float16. Queries and caches have one dtype."),
    "old MLA: page": (lambda: old_mla().plan([0, 1], [0], [1], 4, 512, 0, 0.1), ValueError, "page_size is no page size: got 0, wanted 1 or more"),
    "old MLA: lengths": (lambda: old_mla().plan([0, 1], [0], [1, 2], 4, 512, 16, 0.1), ValueError, "paged_kv_last_page_len has the wrong length: got 2, wanted 1 (paged_kv_indptr has 2 entries)"),
    # sparse
    "sparse: v": (lambda: sparse().run(here(16, 4, 64), here(16, 2, 64), here(15, 2, 64)), ValueError, "BlockSparseAttentionWrapper: v has the wrong shape: got (15, 2, 64), wanted (16, 2, 64)"),
    "sparse: huge": (lambda: variable(1 << 30), ValueError, f"block_row_sz makes the matrix too large: got 2 heads of {1 << 30} x 16, wanted at most 2147483647 rows in all"),
    # merging
    "merge: s": (lambda: pyinfer.merge_states(here(2, 3, 4, 64), there(2, 3, 4)), ValueError, f"merge_states: s is on another device: {HERE} (where v is)"),
    "merge: other": (lambda: pyinfer.merge_state(here(2, 4, 64), here(2, 4), there(2, 4, 64), there(2, 4)), ValueError, f"merge_state: v_b is on another device: {HERE} (where v_a is)"),
    "merge: mask": (lambda: pyinfer.merge_state_in_place(here(2, 4, 64), here(2, 4), here(2, 4, 64), here(2, 4), there(2, dtype="bool")), ValueError, f"mask is on another device: {HERE} (where v is)"),
    "merge: mask stride": (lambda: pyinfer.merge_state_in_place(here(2, 4, 64), here(2, 4), here(2, 4, 64), here(2, 4), np.zeros(4, bool)[::2]), ValueError, "mask is not contiguous in its last axis: got strides (2,)"),
    # masks
    "packbits: huge": (lambda: pyinfer.segment_packbits(np.broadcast_to(np.True_, (1 << 35,)), [0, 1 << 35]), ValueError, f"segment_packbits: indptr makes more bytes than an int32 counts: got {1 << 32}, wanted at most 2147483647. Pack in parts."),
    # schedulers
    "plan: heads": (lambda: plan_of(num_kv_heads=0), ValueError, "num_kv_heads is no head count: got 0, wanted 1 or more"),
    "plan: no query heads": (lambda: plan_of(num_qo_heads=0), ValueError, "num_qo_heads is no head count: got 0"),
    "plan: group": (lambda: plan_of(num_qo_heads=5), ValueError, "got 5"),
    "plan: page": (lambda: plan_of(page_size=-1), ValueError, "page_size is no page size: got -1, wanted 1 or more"),
    "plan: copy": (lambda: plan_of().copy_into(np.zeros((2, 2), np.int32)), ValueError, "AttentionPlan.copy_into: buffer has the wrong number of axes: got 2"),
    "plan: long": (lambda: long_request(), ValueError, "makes a request too long: got 3221225472 tokens in request 0, wanted at most 2147483647"),
}  # fmt: skip


def mixed_graph() -> Any:
    wrapper = pyinfer.BatchAttention(use_cuda_graph=True, max_batch_size=2, max_num_tokens=8, max_num_pages=8)
    wrapper.plan([0, 1, 2], [0, 2, 3], [4, 0, 5], [19, 16], 4, 2, 64, 64, 16, q_data_type=F, kv_data_type=F)
    return wrapper


def graph_planned() -> Any:
    wrapper = graph()
    wrapper.plan(**TABLE, num_qo_heads=4, num_kv_heads=2, head_dim=64, page_size=16, q_data_type=F)
    return wrapper


def old_mla() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pyinfer.BatchDecodeMlaWithPagedKVCacheWrapper(use_tensor_cores=True)


def variable(rows: int) -> None:
    wrapper = pyinfer.VariableBlockSparseAttentionWrapper()
    wrapper.plan(np.ones((2, 1, 1), bool), np.full((2, 1), rows), np.full((2, 1), 16), 4, 2, 64, q_data_type=F)


def long_request() -> None:
    table = (np.array([0, 3], np.int32), np.array([0, 1, 2], np.int32), np.array([1 << 30], np.int32))
    decode_plan(
        *table, num_qo_heads=4, num_kv_heads=2, head_dim_qk=64, page_size=1 << 30, tile_q=16, tile_kv=64, num_sms=4
    )


# ---- kernel factories and launches ----------------------------------------------------------------------------------------------
def mla_module(*args: Any, **options: Any) -> Any:
    from pyinfer.jit.mla import gen_batch_mla_module

    return gen_batch_mla_module("auto", *args, **options)


def mla_module_of(backend: str) -> Any:
    from pyinfer.jit.mla import gen_batch_mla_module

    return gen_batch_mla_module(backend, H, H, H)


def spec_of(**options: Any) -> Any:
    from pyinfer.jit.attention import gen_attention
    from pyinfer.jit.attention_config import attention_config

    return gen_attention(attention_config(80, "float16", 64, 64, 4), "float16", "plan", "plain", **options)


JIT_CASES: dict[str, tuple[Any, type, str]] = {
    "MLA: q": (lambda: mla_module("float32", "float32", "float32"), TypeError, "gen_batch_mla_module: dtype_q has no CUDA kernel: got float32, wanted float16 or bfloat16"),
    "MLA: kv": (lambda: mla_module(H, "bfloat16", H), TypeError, "dtype_kv differs from dtype_q: got bfloat16, wanted float16"),
    "MLA: index": (lambda: mla_module(H, H, H, "int64"), TypeError, "dtype_idx has no CUDA kernel: got int64, wanted int32"),
    "MLA: dims": (lambda: mla_module(H, H, H, "int32", 256), ValueError, "head_dim has no CUDA kernel: got 256 (ckv), 64 (kpe), wanted 512 and 64"),
    "MLA: profiler": (lambda: mla_module(H, H, H, use_profiler=True), ValueError, "use_profiler is not supported yet: got True, wanted False"),
    "MLA: backend": (lambda: mla_module_of("trtllm-gen"), ValueError, "gen_batch_mla_module: backend is not available: got 'trtllm-gen', wanted 'auto', 'fa2' or 'fa3'"),
    "output": (lambda: spec_of(out_dtype="int8"), TypeError, "attention: out_dtype has no CUDA kernel: got int8, wanted float16, bfloat16 or float32"),
}  # fmt: skip


def test_a_plan_for_another_tile(monkeypatch):
    """A plan's tile is its kernel's: one made for another device, or by hand, is refused before the launch."""
    from pyinfer.jit.attention_config import attention_config
    from pyinfer.jit.attention_launch import prepare_attention
    from pyinfer.jit.mla import mla_config, prepare_mla
    from tests import stub_driver

    stub_driver.install(monkeypatch)
    config = attention_config(90, H, 64, 64, 1000)
    plan = plan_of(tile_q=config.tile_q // 2)
    with pytest.raises(
        ValueError, match=f"plan was made for another tile: got {plan.tile_q}, wanted tile_q {config.tile_q} of "
    ):
        prepare_attention(0, plan, 0, FLOAT16, False, config)
    config = mla_config(90, 1000)
    with pytest.raises(
        ValueError, match=f"mla: plan was made for another tile: got 16, wanted tile_q {config.tile_q} of "
    ):
        prepare_mla(0, plan_of(num_kv_heads=1, head_dim_qk=576), 0, FLOAT16, False, config)


def test_a_shape_without_pages():
    from pyinfer.schedulers.plan import plan_shape

    with pytest.raises(ValueError, match="op: page_size is no page size: got -1, wanted 1 or more"):
        plan_shape("op", 4, 2, 64, 64, -1, 16, 64, 4, 1, 1)


def test_no_pod_configuration_fits(monkeypatch):
    from pyinfer.jit import pod

    monkeypatch.setattr(pod, "smem_limits", lambda arch: (16384, 32768))
    config = getattr(pod.pod_config, "__wrapped__", pod.pod_config)
    with pytest.raises(
        ValueError,
        match="pod: head_dim has no configuration that fits the GPU: got 128 on sm_80, wanted 64, 128 or 256",
    ):
        config(80, H, 128, 128)


def test_alignment_of_latent_rows():
    from pyinfer.jit.attention_launch import _check_alignment

    odd = view(np.zeros(1032, H)[4:].reshape(2, 514)[:, :512])
    odd.ptr = 24
    with pytest.raises(
        ValueError,
        match=r"ckv is not aligned: got an address of 8 modulo 16, wanted a multiple of 16 bytes\. Pass ckv\.clone",
    ):
        _check_alignment(ckv=odd)
    odd.ptr = 32
    with pytest.raises(
        ValueError,
        match=r"ckv has rows that are not aligned: got strides \(514, 1\), wanted strides \(but the last\) in multiples of 8",
    ):
        _check_alignment(ckv=odd)


@pytest.mark.parametrize("name", JIT_CASES)
def test_factory(name):
    call, error, text = JIT_CASES[name]
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, error, text = CASES[name]
    with pytest.raises(error, match=re.escape(text)):
        call()
