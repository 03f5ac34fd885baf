"""Decode attention: one query token a request against its KV cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._attention import host_metadata
from pyinfer._attention_options import PlanKey, options_of
from pyinfer._batch_attention import BatchAttention
from pyinfer._batch_run import run_call
from pyinfer._fast_decode_plan import fast_decode_plan
from pyinfer._single_calls import calls as single_calls
from pyinfer._single_calls import single_call
from pyinfer._support import out_dtype, plan_dtypes
from pyinfer.core.calls import MISS
from pyinfer.core.dtypes import FLOAT32
from pyinfer.core.errors import fail
from pyinfer.core.tensor import TensorView, empty, view
from pyinfer.schedulers.decode import EXTRA_SLOTS, decode_capacity, one_token_each
from pyinfer.schedulers.plan import AttentionPlan, PlanShape, plan_batch, plan_shape
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.variants import AttentionVariant

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan",
    "single_decode_with_kv_cache",
]


def _three_axes(v: TensorView) -> TensorView:
    """[heads, dim] seen as [1, heads, dim]."""
    return TensorView(v.obj, v.ptr, (1, *v.shape), (0, *v.strides), v.dtype, v.device, v.framework)


def single_decode_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
    *,
    variant: AttentionVariant | None = None,
    variant_args: Sequence[Any] | None = None,
) -> Any:
    """Decode attention of one request: out = softmax(q k^T * sm_scale) v, with grouped query heads.

    Parameters
    ----------
    q
        [num_qo_heads, head_dim]; float16 or bfloat16, on the CPU float32 as well.
    k, v
        [kv_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, kv_len, head_dim] (HND), of q's dtype, float8_e4m3fn or float8_e5m2, on q's device; any
        strides but a last one of 1. Query head h reads kv head h // (num_qo_heads / num_kv_heads).
    pos_encoding_mode
        "NONE"; "ROPE_LLAMA": the query is rotated by position kv_len - 1, key j by j, in halves over the whole head_dim; "ALIBI": slope * j is added to
        the score of key j, with the slopes of Press et al.
    use_tensor_cores
        Accepted; the kernel is chosen from the shape.
    q_scale, k_scale, v_scale
        Numbers or tensors of one element (one on the GPU is read, which waits for it): q_scale and k_scale multiply sm_scale, v_scale the output.
    window_left
        Only the last window_left + 1 keys are seen; -1 all.
    logits_soft_cap
        Scores become cap * tanh(score * sm_scale / cap); None or 0 off.
    sm_scale
        1 / sqrt(head_dim) by default.
    rope_scale, rope_theta
        Pair i turns by position * rope_theta^(-2 i / head_dim) / rope_scale; 1 and 10,000 by default.
    return_lse
        Also return the base-2 log-sum-exp of the scaled scores.
    variant, variant_args
        A `pyinfer.AttentionVariant`, and the values of its parameters.

    Returns
    -------
    out
        [num_qo_heads, head_dim] in q's dtype and framework. No key: zeros.
    lse
        With return_lse: float32 [num_qo_heads]. No key: -inf.

    Raises
    ------
    ValueError, TypeError
        Before any launch, naming the argument.
    """
    op = "single_decode_with_kv_cache"
    call = single_call(
        q, k, v, (op, kv_layout, pos_encoding_mode, q_scale, k_scale, v_scale, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta, return_lse)
    )  # fmt: skip
    if call is not None and variant is None and not variant_args:
        done = single_calls.run(*call)
        if done is not MISS:
            return done
    common.check_layout(op, kv_layout)
    options = options_of(*common.check_pos_encoding(op, pos_encoding_mode, rope_scale, rope_theta))
    qv = common.q_view(op, q, 2)
    kv, vv = common.dense_views(op, qv, k, v, kv_layout, options.rope is not None)
    scale = common.softmax_scale(op, sm_scale, qv.shape[1])
    if q_scale is not None:
        scale *= common.scale(op, "q_scale", q_scale)
    if k_scale is not None:
        scale *= common.scale(op, "k_scale", k_scale)
    out = empty(qv, (qv.shape[0], vv.shape[2]))
    lse = empty(qv, (qv.shape[0],), FLOAT32) if return_lse else None
    common.run_single(
        op, _three_axes(qv), kv, vv, kv_layout, _three_axes(view(out)), None if lse is None else _three_axes(view(lse)), causal=False,
        window_left=common.check_window(op, window_left), sm_scale=scale, logits_soft_cap=common.check_soft_cap(op, logits_soft_cap),
        v_scale=common.scale(op, "v_scale", v_scale), options=options, variant=variant, variant_args=variant_args, call=call,
    )  # fmt: skip
    return (out, lse) if return_lse else out


@common.remembered
def _plan_key(
    op: str,
    dtypes: tuple[Any, Any, Any, Any],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    pos_encoding_mode: str,
    rope_scale: float | None,
    rope_theta: float | None,
    fixed_split_size: int | None,
    disable_split_kv: bool,
) -> PlanKey:
    """The checked options of plan(). dtypes: q, kv, the older name of both, o."""
    encoding = common.check_pos_encoding(op, pos_encoding_mode, rope_scale, rope_theta)
    common.check_head_counts(op, num_qo_heads, num_kv_heads)
    dtype, kv_dtype = plan_dtypes(op, *dtypes[:3])
    common.check_page_size(op, page_size)
    common.check_split_size(op, fixed_split_size)
    return PlanKey(
        num_qo_heads, num_kv_heads, head_dim, head_dim, page_size, dtype, kv_dtype, out_dtype(op, dtype, dtypes[3]), fixed_split_size, disable_split_kv,
        False, common.check_window(op, window_left), common.check_soft_cap(op, logits_soft_cap), common.softmax_scale(op, sm_scale, head_dim), *encoding,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _shape(op: str, device: int, key: PlanKey, batch: int, max_pages: int | None = None) -> PlanShape:
    """All of a plan but the batch's lengths; max_pages: the most that the batch ever has, in CUDA graph mode."""
    group = key.num_qo_heads // key.num_kv_heads
    tile_q, tile_kv, num_sms, ctas_per_sm = common.batch_tiles(
        device, key.q_data_type, key.head_dim_qk, key.head_dim_vo, group, batch * group, key.num_kv_heads, key.kv_data_type, key.options
    )  # fmt: skip
    capacity = None
    if max_pages is not None:
        bound = decode_capacity(
            batch, max_pages, num_qo_heads=key.num_qo_heads, num_kv_heads=key.num_kv_heads, page_size=key.page_size, tile_q=tile_q, num_sms=num_sms,
            ctas_per_sm=ctas_per_sm, fixed_split_size=key.fixed_split_size, disable_split_kv=key.disable_split_kv,
        )  # fmt: skip
        capacity = bound._replace(max_indices=max_pages if device < 0 else 0, max_pages=max_pages)
    return plan_shape(
        op, key.num_qo_heads, key.num_kv_heads, key.head_dim_qk, key.head_dim_vo, key.page_size, tile_q, tile_kv, num_sms, ctas_per_sm, EXTRA_SLOTS,
        False, key.window_left, key.fixed_split_size, key.disable_split_kv, capacity,
    )  # fmt: skip


class BatchDecodeWithPagedKVCacheWrapper(BatchAttention):
    """Decode attention of a batch over a paged KV cache: plan() once per step, run() once per layer.

    Parameters
    ----------
    float_workspace_buffer
        A tensor of any dtype for split-KV partial results; plan() refuses one smaller than `plan_info.workspace_bytes`. None: the library allocates what it
        needs.
        With a workspace the wrapper belongs to its device, otherwise to that of the tensors it is given.
    kv_layout
        "NHD": pages [page_size, num_kv_heads, head_dim]; "HND": [num_kv_heads, page_size, head_dim].
    use_cuda_graph
        Keep every buffer and the grid fixed, so that run() may be captured and later plans are seen by replays. Needs the three buffers.
    use_tensor_cores
        Accepted; the kernel is chosen from the shape.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        int32 [batch + 1], [most pages ever], [batch]: plan() copies the page table there. They fix the batch size.
    backend
        "auto" or "fa2".
    variant
        A `pyinfer.AttentionVariant`; the values of its parameters are then run()'s further positional arguments.
    jit_args, jit_kwargs
        The same in FlashInfer's words: the arguments of `jit.gen_customize_batch_decode_module`, for CUDA sources (see `jit.customize`).
    """

    _op = "BatchDecodeWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend, None, buffers)
        self._set_variant(variant, jit_args, jit_kwargs)
        self._use_tensor_cores = bool(use_tensor_cores)
        if self._use_cuda_graph:
            batch = self._buffers["paged_kv_last_page_len_buffer"].shape[0]
            rows = self._buffers["paged_kv_indptr_buffer"].shape[0]
            if rows != batch + 1:
                fail(
                    self._op,
                    "paged_kv_indptr_buffer",
                    "has the wrong length",
                    rows,
                    f"{batch + 1} (paged_kv_last_page_len_buffer has {batch})",
                )

    @property
    def use_tensor_cores(self) -> bool:
        """As given to the constructor."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Any = None,
        seq_lens: Any = None,
        *,
        o_data_type: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        strict: bool = False,
    ) -> None:
        """Schedule a batch.

        Parameters
        ----------
        indptr, indices, last_page_len
            The page table: int32 or int64 [batch + 1], [at least indptr[-1]], [batch]. Lists, NumPy arrays and CPU tensors never synchronise and are
            checked; those on a GPU cost one copy, but for indices, which are used where they are, unchecked. A request without pages gives zeros.
        num_qo_heads, num_kv_heads, head_dim, page_size
            Shapes; num_qo_heads is a multiple of num_kv_heads.
        pos_encoding_mode, rope_scale, rope_theta
            As in `single_decode_with_kv_cache`.
        window_left
            Only the last window_left + 1 keys are seen; -1 all.
        logits_soft_cap, sm_scale
            As in `single_decode_with_kv_cache`.
        q_data_type, kv_data_type, o_data_type
            Of q, of the cache (q's by default; float8_e4m3fn and float8_e5m2 as well) and of the output (q's by default). `data_type` is the older name of
            the first two.
        non_blocking
            Accepted; copies never block.
        fixed_split_size
            Split every request's keys into pieces of this many pages, so that its result does not depend on the rest of the batch, to the bit.
        disable_split_kv
            Never split (the same guarantee).
        strict
            Refuse metadata whose reading would wait for the GPU: everything on a GPU but the page indices.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what it got and what is wanted.
        """
        op = self._op
        if block_tables is not None or seq_lens is not None:
            common.check_options(op, block_tables=block_tables, seq_lens=seq_lens)
        key = _plan_key(
            op, (q_data_type, kv_data_type, data_type, o_data_type), num_qo_heads, num_kv_heads, head_dim, page_size, window_left, logits_soft_cap,
            sm_scale, pos_encoding_mode, rope_scale, rope_theta, fixed_split_size, disable_split_kv,
        )  # fmt: skip
        key = self._with_variant(key, sm_scale)
        host_indptr, host_last = host_metadata(op, strict=strict, indptr=indptr, last_page_len=last_page_len)
        page_indices = self._page_indices(op, indices, host_indptr)
        if self._plan_again(key, None, host_indptr, page_indices, host_last):
            return
        buffers = {}
        if self._use_cuda_graph:
            self._check_buffer("paged_kv_indptr_buffer", len(host_indptr))
            self._check_buffer("paged_kv_last_page_len_buffer", len(host_last))
            self._check_buffer("paged_kv_indices_buffer", max(int(host_indptr[-1]), 0), exact=False)
            buffers = {
                "paged_kv_indptr_buffer": host_indptr,
                "paged_kv_indices_buffer": page_indices[: max(int(host_indptr[-1]), 0)]
                if isinstance(page_indices, np.ndarray)
                else page_indices,
                "paged_kv_last_page_len_buffer": host_last,
            }
        host_indices = page_indices if isinstance(page_indices, np.ndarray) else None
        self._dims = (head_dim, head_dim)
        metadata = (None, host_indptr, host_indices, host_last)
        self._set_plan(
            metadata, key, key.q_data_type, key.window_left, False, key.logits_soft_cap, key.sm_scale, page_indices, buffers,
            key.kv_data_type, key.o_data_type, key.options,
        )  # fmt: skip

    @classmethod
    def max_workspace(
        cls,
        max_batch_size: int,
        max_num_pages: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        device: Any = None,
    ) -> int:
        """Bytes of workspace that no plan of at most so many requests and pages needs more of, in CUDA graph mode or not; it allocates nothing.

        In CUDA graph mode, whose buffers fix the batch size, every plan of `max_batch_size` requests and a page buffer of `max_num_pages` needs at most this.
        `device` as in `pyinfer.support`; other parameters as in plan(), whose errors it raises.
        """
        from pyinfer._max_workspace import decode_bytes

        op = f"{cls._op}.max_workspace"
        dtypes = (q_data_type, kv_data_type, None, None)
        key = _plan_key(
            op, dtypes, num_qo_heads, num_kv_heads, head_dim, page_size, -1, None, None, "NONE", None, None, fixed_split_size, disable_split_kv
        )  # fmt: skip
        return decode_bytes(op, max_batch_size, max_num_pages, key, device)

    def begin_forward(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated: `plan`."""
        common.deprecated(f"{self._op}.begin_forward", "plan")
        self.plan(*args, **kwargs)

    def replan(self, kv_len: Any = None) -> None:
        """Schedule the batch that the wrapper's buffers describe now, where they are: in CUDA graph mode, and inside a captured graph.

        plan() once fixes shapes, options and capacity. Then a graph that holds replan() and run() follows its requests without the host: change the
        buffers (and kv_len) on the device, replay. One small kernel reads them and writes the plan that plan() would have made, so results have the
        same bits; call it once a step, before the first layer, and once before capturing, which compiles it.

        Parameters
        ----------
        kv_len
            int32 [batch] where the buffers are: the requests' lengths in tokens. paged_kv_indptr_buffer then only says where each request's pages begin;
            there may be more of them than kv_len needs, which are not looked at. None: lengths come from paged_kv_indptr_buffer and
            paged_kv_last_page_len_buffer.

        Raises
        ------
        ValueError, TypeError
            Without use_cuda_graph, before the first plan(), for a capacity beyond 2048 work items, or for a kv_len of another shape, dtype or device.
            On the CPU also for malformed contents; on a GPU these are not looked at: lengths are cut down to what the buffers hold.

        Notes
        -----
        On a GPU, `plan_info` keeps telling of the last plan().
        """
        from pyinfer._replan import replan

        replan(self, kv_len)

    def _schedule(
        self,
        qo_indptr: Any,  # one token a request: not needed
        indptr: np.ndarray,
        indices: np.ndarray | None,
        last: np.ndarray,
        key: Any,
        device: int,
        window_left: int,
        causal: bool,
    ) -> AttentionPlan:
        batch = max(len(indptr) - 1, 0)
        if window_left != key.window_left:
            key = key._replace(window_left=window_left)
        shape = _shape(self._op, device, key, batch)
        if self._use_cuda_graph:
            max_pages = self._buffers["paged_kv_indices_buffer"].shape[0]
            (shape,) = self._fixed(device, key, lambda: (_shape(self._op, device, key, batch, max_pages),))
        return plan_batch(self._op, shape, one_token_each(batch), indptr, indices, last)

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        q
            [batch, num_qo_heads, head_dim] in the planned dtype; any strides but a last one of 1.
        paged_kv_cache
            A tuple of two caches [pages, page_size, num_kv_heads, head_dim] (NHD) or [pages, num_kv_heads, page_size, head_dim] (HND), or one tensor with
            K and V in an axis of size 2 after the pages. Any strides but a last one of 1. With page_size 1 the page axis may be missing.
        q_scale, k_scale, v_scale
            As in `single_decode_with_kv_cache`.
        out, lse
            Where to write, instead of new tensors: q's shape, o_data_type; float32 [batch, num_qo_heads].
        return_lse
            Also return the base-2 log-sum-exp.
        enable_pdl
            Programmatic dependent launch; None wherever it works (compute capability 9.0 or newer).
        window_left
            If given, must repeat the plan's.
        sinks
            float32 [num_qo_heads]: a logit for each query head that joins the denominator of the softmax (and the LSE) and brings no value.

        Returns
        -------
        out, or (out, lse)
            A request without keys: zeros and -inf.
        """
        options = (q_scale, k_scale, v_scale, return_lse, enable_pdl, window_left)
        call = run_call(q, paged_kv_cache, out, lse, args, sinks, options)
        done = self._calls.run(*call)
        if done is not MISS:
            return done
        qv = self._check_run(q, window_left, args)
        k, v = self._paged_kv(qv, paged_kv_cache)
        return self._run(qv, k, v, out, lse, sinks, call, args=args)

    def run_return_lse(self, q: Any, paged_kv_cache: Any, *args: Any, **kwargs: Any) -> Any:
        """`run` with return_lse=True."""
        return self.run(q, paged_kv_cache, *args, return_lse=True, **kwargs)

    def forward(
        self,
        q: Any,
        paged_kv_cache: Any,
        pos_encoding_mode: str = "NONE",
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        return_lse: bool = False,
    ) -> Any:
        """Deprecated: `run`, with the plan's window, soft cap and scale replaced by those given here."""
        common.deprecated(f"{self._op}.forward", "run")
        self._override(pos_encoding_mode, window_left, logits_soft_cap, sm_scale, False, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    def forward_return_lse(self, q: Any, paged_kv_cache: Any, *args: Any, **kwargs: Any) -> Any:
        """Deprecated: `run_return_lse`, with `forward`'s arguments."""
        return self.forward(q, paged_kv_cache, *args, return_lse=True, **kwargs)

    def end_forward(self) -> None:
        """Deprecated: does nothing."""
        common.deprecated(f"{self._op}.end_forward", "nothing: it does nothing")


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` with use_cuda_graph=True."""

    _op = "CUDAGraphBatchDecodeWithPagedKVCacheWrapper"

    def __init__(
        self,
        workspace_buffer: Any,
        indptr_buffer: Any,
        indices_buffer: Any,
        last_page_len_buffer: Any,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


def __getattr__(name: str) -> Any:
    if name == "BatchDecodeMlaWithPagedKVCacheWrapper":  # where FlashInfer has it
        from pyinfer.mla import BatchDecodeMlaWithPagedKVCacheWrapper

        return BatchDecodeMlaWithPagedKVCacheWrapper
    if name == "single_decode_with_kv_cache_with_jit_module":
        from pyinfer._jit_module import single_decode_with_kv_cache_with_jit_module

        return single_decode_with_kv_cache_with_jit_module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


attach(__name__)  # what torch.compile traces in the place of these functions
