"""Multi-head latent attention (MLA) with absorbed projections: every head attends to one latent row a token, which is key and value at once."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._attention import host_metadata
from pyinfer._paged_mla import CUDA_DIMS, PagedMla, cache_dtype, one_dtype
from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.jit.mla import BACKENDS
from pyinfer.torch_ops import attach

__all__ = ["BatchDecodeMlaWithPagedKVCacheWrapper", "BatchMLAPagedAttentionWrapper"]


class BatchMLAPagedAttentionWrapper(PagedMla):
    """Attention over a paged cache of latent rows, for decode, append and prefill alike: plan() once per step, run() once per layer.

    Per head: out = softmax((q_nope · ckv + q_pe · kpe) * sm_scale) ckv.

    Parameters
    ----------
    float_workspace_buffer
        A tensor of any dtype for split-KV partial results; plan() refuses one smaller than `plan_info.workspace_bytes`. None: the library allocates what it
        needs.
    use_cuda_graph
        Keep every buffer and the grid fixed, so that run() may be captured and later plans are seen by replays. Needs the four buffers.
    qo_indptr, kv_indptr, kv_indices, kv_len_arr
        int32 [batch + 1], [batch + 1], [most pages ever], [batch]: plan() copies its arguments there. They fix the batch size.
    backend
        "auto", or the family of CUDA kernels: "fa2" runs on every GPU, "fa3" on Hopper, with pages of a multiple of 8 tokens, where "auto" takes it. On the CPU
        there is one family.
    """

    _op = "BatchMLAPagedAttentionWrapper"
    _indices_arg = _page_arg = "kv_indices"

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        use_cuda_graph: bool = False,
        qo_indptr: Any = None,
        kv_indptr: Any = None,
        kv_indices: Any = None,
        kv_len_arr: Any = None,
        backend: str = "auto",
    ) -> None:
        buffers = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr}
        if backend not in BACKENDS:
            fail(self._op, "backend", "is not available", repr(backend), "'auto', 'fa2' or 'fa3'")
        super().__init__(float_workspace_buffer, "NHD", use_cuda_graph, "auto", None, buffers)
        self._backend = backend

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Any,
        kv_data_type: Any,
        use_profiler: bool = False,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule a batch.

        Parameters
        ----------
        qo_indptr, kv_indptr, kv_indices, kv_len_arr
            int32 (or int64) [batch + 1] query tokens, [batch + 1] pages, [at least kv_indptr[-1]] page numbers, [batch] tokens in the cache, at most the
            request's pages hold; pages behind kv_len are not looked at. Lists, NumPy arrays and CPU tensors never synchronise and are checked; those on a GPU
            cost one copy, but for kv_indices, which are used where they are, unchecked. A request without keys gives zeros.
        num_heads
            Query heads, any number.
        head_dim_ckv, head_dim_kpe
            512 and 64; on the CPU any from 1 to 1024.
        page_size
            Tokens a page, any number.
        causal
            Query i sees key j iff j <= kv_len - qo_len + i.
        sm_scale
            Scale of the scores: 1 / sqrt(128 + 64) in DeepSeek's models, the head dimension before absorption. There is no default.
        q_data_type
            float16 or bfloat16, on the CPU float32 as well.
        kv_data_type
            The queries' dtype, float8_e4m3fn or float8_e5m2. A cache of 8-bit floats is read by the "fa2" family.
        use_profiler
            Not supported: False.
        strict
            Refuse metadata (but for kv_indices) on a GPU: plan() then never synchronises.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what it got and what is wanted.
        """
        op = self._op
        if use_profiler:
            fail(op, "use_profiler", "is not supported", True, False)
        dtype = canonical_dtype(q_data_type, op, "q_data_type")
        kv_dtype = cache_dtype(op, dtype, kv_data_type)
        arrays = host_metadata(op, strict=strict, qo_indptr=qo_indptr, kv_indptr=kv_indptr, kv_len_arr=kv_len_arr)
        buffers = dict(zip(("qo_indptr", "kv_indptr", "kv_len_arr"), arrays, strict=True))
        host, dims = (arrays[0], arrays[1], arrays[2]), (head_dim_ckv, head_dim_kpe)
        self._plan_mla(
            host, kv_indices, num_heads, dims, page_size, causal, -1, 0.0, sm_scale, dtype, kv_dtype, buffers
        )

    def run(
        self,
        q_nope: Any,
        q_pe: Any,
        ckv_cache: Any,
        kpe_cache: Any,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        profiler_buffer: Any = None,
        kv_len: Any = None,
        page_table: Any = None,
        return_lse_base_on_e: bool = False,
        ckv_scale: float | None = None,
        kpe_scale: float | None = None,
        *,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        q_nope, q_pe
            [tokens, num_heads, 512] (multiplied by the key's up-projection) and [tokens, num_heads, 64] (rotated), in the planned dtype.
        ckv_cache, kpe_cache
            [pages, page_size, 512] and [pages, page_size, 64]; halves of one tensor will do: any strides but a last one of 1 (on a GPU in multiples of 16
            bytes), in the planned dtype. What lies behind a request's kv_len is never used, NaN included.
        out, lse
            Where to write, instead of new tensors: q_nope's shape and dtype; float32 [tokens, num_heads].
        return_lse
            Also return the log-sum-exp of the scaled scores: base 2, or natural with `return_lse_base_on_e`.
        profiler_buffer, kv_len, page_table
            Of other backends: None.
        ckv_scale, kpe_scale
            What a stored value of a cache of 8-bit floats is worth (`append_paged_mla_kv_cache` stores value / scale): positive numbers, None for 1. They need
            such a cache.
        enable_pdl
            Programmatic dependent launch; None wherever it works (compute capability 9.0 or newer).

        Returns
        -------
        out, or (out, lse)
            A row that sees no key: zeros and -inf.

        Raises
        ------
        ValueError, TypeError
            Before any launch, naming the argument.
        """
        for arg, value in (("profiler_buffer", profiler_buffer), ("kv_len", kv_len), ("page_table", page_table)):
            if value is not None:
                fix = "Lengths and pages are arguments of plan()." if arg != "profiler_buffer" else ""
                fail(self._op, arg, "belongs to another backend", type(value).__name__, "None", fix)
        base_e = bool(return_lse_base_on_e)
        scales = 1.0, 1.0
        if ckv_scale is not None or kpe_scale is not None:
            scales = self._cache_scale("ckv_scale", ckv_scale), self._cache_scale("kpe_scale", kpe_scale)
        return self._run_mla(
            q_nope, q_pe, ckv_cache, kpe_cache, out, lse, return_lse, base_e, self._sm_scale, enable_pdl, scales
        )

    def _cache_scale(self, arg: str, value: Any) -> float:
        """A positive scale of the planned cache of 8-bit floats; 1 for None."""
        scale = common.scale(self._op, arg, value)
        if not 0.0 < scale < math.inf:
            fail(self._op, arg, "is no scale", value, "a positive, finite number")
        if value is not None and self._plan is not None and self._kv_dtype.itemsize != 1:
            fail(self._op, arg, "needs a cache of 8-bit floats", self._kv_dtype.name, "float8_e4m3fn or float8_e5m2")
        return scale


class BatchDecodeMlaWithPagedKVCacheWrapper(PagedMla):
    """Decode by the older interface. Deprecated: use `BatchMLAPagedAttentionWrapper`.

    Parameters
    ----------
    float_workspace_buffer, use_cuda_graph
        As in `BatchMLAPagedAttentionWrapper`.
    use_tensor_cores
        True: q_pe and kpe are rotated already. FlashInfer's kernel for False rotates them itself; that is not supported.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        int32 [batch + 1], [most pages ever], [batch], for use_cuda_graph.
    """

    _op = "BatchDecodeMlaWithPagedKVCacheWrapper"
    _heads_arg, _dim_arg = "num_qo_heads", "head_dim_compressed_kv"
    _ckv_arg, _kpe_arg = "paged_ckv_cache", "paged_kpe_cache"

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
    ) -> None:
        common.deprecated(self._op, "BatchMLAPagedAttentionWrapper")
        if not use_tensor_cores:
            fix = "Rotate q_pe and kpe (apply_rope_pos_ids, interleave=True) and pass use_tensor_cores=True."
            fail(self._op, "use_tensor_cores", "asks for a kernel that rotates q_pe and kpe itself", False, True, fix)
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, "NHD", use_cuda_graph, "auto", None, buffers)

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        head_dim_compressed_kv: int,
        page_size: int,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        data_type: Any = "float16",
        q_data_type: Any = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule a batch of one query token a request.

        Parameters
        ----------
        indptr, indices, last_page_len
            The page table, as in `BatchDecodeWithPagedKVCacheWrapper.plan`.
        num_qo_heads, head_dim_compressed_kv, page_size, sm_scale
            As `BatchMLAPagedAttentionWrapper.plan`'s num_heads, head_dim_ckv, page_size, sm_scale; the rotary part has 64 dimensions.
        window_left, logits_soft_cap
            As in `BatchDecodeWithPagedKVCacheWrapper.plan`.
        data_type, q_data_type
            Of caches and queries: one dtype.
        rope_scale, rope_theta
            Accepted: what is rotated already was rotated with them (callers of FlashInfer's tensor-core path pass them).
        strict
            Refuse indptr and last_page_len on a GPU.
        """
        from pyinfer.schedulers.checks import page_table

        op = self._op
        window, cap = common.check_window(op, window_left), common.check_soft_cap(op, logits_soft_cap)
        dtype = one_dtype(op, data_type if q_data_type is None else q_data_type, data_type, "q_data_type", "data_type")
        table, last = host_metadata(op, strict=strict, indptr=indptr, last_page_len=last_page_len)
        kv_len, _ = page_table(op, table, last, None, page_size)
        host = (np.arange(len(last) + 1, dtype=np.int32), table, kv_len)
        buffers = {"paged_kv_indptr_buffer": table, "paged_kv_last_page_len_buffer": last}
        dims = (head_dim_compressed_kv, CUDA_DIMS[1])
        self._plan_mla(
            host, indices, num_qo_heads, dims, page_size, False, window, cap, sm_scale, dtype, dtype, buffers
        )

    def run(
        self,
        q_nope: Any,
        q_pe: Any,
        paged_ckv_cache: Any,
        paged_kpe_cache: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention of the planned batch; arguments and results as those of `BatchMLAPagedAttentionWrapper.run`.

        q_scale and k_scale multiply sm_scale; v_scale is None or 1.
        """
        if v_scale is not None and common.scale(self._op, "v_scale", v_scale) != 1.0:
            fail(self._op, "v_scale", "is not supported", v_scale, "None or 1", "Multiply the output.")
        scale = self._sm_scale
        for arg, value in (("q_scale", q_scale), ("k_scale", k_scale)):
            scale *= common.scale(self._op, arg, value)
        return self._run_mla(
            q_nope, q_pe, paged_ckv_cache, paged_kpe_cache, out, lse, return_lse, False, scale, enable_pdl
        )


attach(__name__)  # what torch.compile traces in the place of these functions
