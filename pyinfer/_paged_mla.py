"""The base of the two MLA wrappers: from a checked page table to a plan, and the checked run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._batch_attention import BatchAttention
from pyinfer._batch_run import remember_run
from pyinfer.core.calls import MISS
from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, DType, canonical_dtype
from pyinfer.core.errors import (
    check_last_dim_contiguous,
    check_ndim,
    check_shape,
    device_name,
    fail,
    fail_type,
)
from pyinfer.core.tensor import TensorView, current_stream, empty, view

if TYPE_CHECKING:
    from pyinfer.schedulers.plan import AttentionPlan

CUDA_DIMS = (512, 64)  # latent and rotary dimension of the CUDA kernel
CUDA_DTYPES = (FLOAT16, BFLOAT16)
CPU_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
CACHE_DTYPES = (FLOAT8_E4M3, FLOAT8_E5M2)  # beside the queries' own
CPU_MAX_DIM = 1024


def one_dtype(op: str, q_data_type: Any, kv_data_type: Any, q_arg: str, kv_arg: str) -> DType:
    """The one element type of queries and caches."""
    q_dtype, kv_dtype = canonical_dtype(q_data_type, op, q_arg), canonical_dtype(kv_data_type, op, kv_arg)
    if q_dtype is not kv_dtype:
        fix = "Queries and caches have one dtype."
        fail_type(op, kv_arg, f"differs from {q_arg}", kv_dtype.name, q_dtype.name, fix)
    return q_dtype


def cache_dtype(op: str, q_dtype: DType, kv_data_type: Any) -> DType:
    """The element type of caches: the queries', or 8-bit floats."""
    kv_dtype = canonical_dtype(kv_data_type, op, "kv_data_type")
    if kv_dtype is not q_dtype and kv_dtype not in CACHE_DTYPES:
        wanted = f"{q_dtype.name}, float8_e4m3fn or float8_e5m2"
        fail_type(op, "kv_data_type", "differs from q_data_type", kv_dtype.name, wanted)
    return kv_dtype


class PagedMla(BatchAttention):
    """What the two wrappers share: from a checked page table to a plan, and the run."""

    _heads_arg = "num_heads"
    _backend = "auto"
    _config: Any = None  # of the plan, on a GPU: mla.MlaConfig or mla_sm90.MlaSm90Config
    _next_config: Any = None  # of the plan in the making
    _ckv_arg, _kpe_arg, _dim_arg = "ckv_cache", "kpe_cache", "head_dim_ckv"

    def _check_kernel(self, device: int, dtype: DType, head_dim_qk: int, head_dim_vo: int) -> None:
        where = "CUDA" if device >= 0 else "CPU"
        allowed = CUDA_DTYPES if device >= 0 else CPU_DTYPES
        if dtype not in allowed:
            names = " or ".join(d.name for d in allowed)
            fail_type(
                self._op, "q_data_type", f"has no {where} kernel", dtype.name, names, f"Convert to {allowed[0].name}."
            )
        latent, rotary = head_dim_vo, head_dim_qk - head_dim_vo
        got = f"{latent} (ckv), {rotary} (kpe)"
        if device >= 0 and (latent, rotary) != CUDA_DIMS:
            fail(self._op, self._dim_arg, "has no CUDA kernel", got, f"{CUDA_DIMS[0]} and {CUDA_DIMS[1]}")
        if not (1 <= latent <= CPU_MAX_DIM and 1 <= rotary <= CPU_MAX_DIM):
            fail(self._op, self._dim_arg, "has no CPU kernel", got, f"1..{CPU_MAX_DIM} each")

    def _plan_mla(
        self,
        host: tuple[np.ndarray, np.ndarray, np.ndarray],
        kv_indices: Any,
        num_heads: int,
        dims: tuple[int, int],
        page_size: int,
        causal: bool,
        window_left: int,
        soft_cap: float,
        sm_scale: Any,
        dtype: DType,
        kv_dtype: DType,
        buffers: dict[str, Any],
    ) -> None:
        """Plan checked arguments. `host`: qo_indptr, kv_indptr, kv_len. `buffers`: values of the caller's buffers but for the indices'."""
        op = self._op
        if num_heads < 1:
            fail(op, self._heads_arg, "is no head count", num_heads, "1 or more")
        if page_size < 1:
            fail(op, "page_size", "is no page size", page_size, "1 or more")
        if sm_scale is None:
            fix = "DeepSeek's models: (128 + 64) ** -0.5, the head dimension before absorption."
            fail_type(op, "sm_scale", "is missing", None, "a float", fix)
        qo_indptr, kv_indptr, kv_len = host
        page_indices = self._page_indices(op, kv_indices, kv_indptr)
        host_indices = page_indices if isinstance(page_indices, np.ndarray) else None
        self._dims = (dims[0] + dims[1], dims[0])
        key = (num_heads, 1, *self._dims, page_size, dtype, kv_dtype, False)
        if self._use_cuda_graph:
            pages = max(int(kv_indptr[-1]), 0) if len(kv_indptr) else 0
            for arg, values in buffers.items():
                self._check_buffer(arg, len(values))
            self._check_buffer(self._indices_arg, pages, exact=False)
            buffers = {**buffers, self._indices_arg: page_indices if host_indices is None else host_indices[:pages]}
            self._check_graph_key(key)
        else:
            buffers = {}
        self._check_table(qo_indptr, kv_indptr, kv_len, host_indices, page_size)
        # The base keeps page tables by their last page's length; `_schedule` turns it back.
        metadata = (qo_indptr, kv_indptr, host_indices, kv_len - _before_last_page(kv_indptr, page_size))
        scale = common.scale(op, "sm_scale", sm_scale)
        self._set_plan(
            metadata, key, dtype, window_left, bool(causal), soft_cap, scale, page_indices, buffers, kv_dtype
        )

    def _check_graph_key(self, key: tuple[Any, ...]) -> None:
        state = self._graph_state
        if state is None:
            return
        names = (
            self._heads_arg,
            "",
            "head_dim_ckv + head_dim_kpe",
            self._dim_arg,
            "page_size",
            "q_data_type",
            "kv_data_type",
        )
        for name, had, got in zip(names, state["key"], key, strict=False):
            if had != got:
                fix = "In CUDA graph mode the first plan fixes it; make a new wrapper."
                fail(self._op, name, "differs from the first plan", got, had, fix)

    def _check_table(
        self,
        qo_indptr: np.ndarray,
        kv_indptr: np.ndarray,
        kv_len: np.ndarray,
        indices: np.ndarray | None,
        page_size: int,
    ) -> None:
        if _largest_page(qo_indptr, kv_indptr, kv_len, indices, page_size) >= -1:
            return
        from pyinfer.schedulers.checks import lengths

        op = self._op
        lengths(op, "qo_indptr", qo_indptr)
        pages = lengths(op, "kv_indptr", kv_indptr)
        batch = len(pages)
        if len(qo_indptr) != batch + 1:
            fail(op, "qo_indptr", "has the wrong length", len(qo_indptr), f"{batch + 1} (as kv_indptr)")
        if len(kv_len) != batch:
            fail(op, "kv_len_arr", "has the wrong length", len(kv_len), f"{batch} (kv_indptr has {batch + 1} entries)")
        room = pages.astype(np.int64) * page_size
        bad = (kv_len < 0) | (kv_len > room)
        if bad.any():
            b = int(bad.argmax())
            got = f"{int(kv_len[b])} for request {b} ({int(pages[b])} pages)"
            fail(op, "kv_len_arr", "is out of range", got, f"0..{int(room[b])} (page_size {page_size})")
        if indices is None:
            return
        if len(indices) < kv_indptr[-1]:
            fail(op, "kv_indices", "is too short", len(indices), f"at least {int(kv_indptr[-1])} (kv_indptr[-1])")
        used = _used_pages(indices, kv_indptr, kv_len, page_size)
        if len(used) and used.min() < 0:
            fail(op, "kv_indices", "holds a negative page", int(used.min()), "0 or more")

    def _schedule(
        self,
        qo_indptr: Any,
        kv_indptr: np.ndarray,
        indices: np.ndarray | None,
        last_page_len: Any,
        key: tuple[Any, ...],
        device: int,
        window_left: int,
        causal: bool,
    ) -> AttentionPlan:
        from pyinfer.schedulers.plan import build_plan
        from pyinfer.schedulers.prefill import EXTRA_SLOTS, prefill_capacity

        num_heads, _, dim_qk, dim_vo, page_size, _, kv_dtype, *_ = key
        kv_len = (last_page_len + _before_last_page(kv_indptr, page_size)).astype(np.int32)
        qo_len = np.ascontiguousarray(qo_indptr[1:] - qo_indptr[:-1])
        batch, total = len(qo_len), int(qo_indptr[-1])
        rows = (int(qo_len.max()) if batch else 1) * num_heads
        max_page = _largest_page(qo_indptr, kv_indptr, kv_len, indices, page_size)
        tiles = _tiles(device, max(rows, num_heads), page_size, self._backend, kv_dtype.itemsize)
        capacity = None
        if self._use_cuda_graph:
            max_pages = self._buffers[self._indices_arg].shape[0]

            def choose() -> tuple[Any, ...]:
                bound = prefill_capacity(
                    batch, total, max_pages, num_qo_heads=num_heads, num_kv_heads=1, page_size=page_size, tile_q=tiles[0], num_sms=tiles[2],
                    ctas_per_sm=tiles[3],
                )  # fmt: skip
                return tiles, bound._replace(max_indices=max_pages if device < 0 else 0), total

            tiles, capacity, most = self._fixed(device, key, choose)
            if total > most:
                fix = "In CUDA graph mode the first plan fixes the most; plan the largest batch first."
                fail(self._op, "qo_indptr", "has more query rows than the first plan", total, f"at most {most}", fix)
        tile_q, tile_kv, num_sms, ctas_per_sm, self._next_config = tiles
        return build_plan(
            self._op, qo_indptr, qo_len, kv_indptr, kv_len, indices, num_qo_heads=num_heads, num_kv_heads=1, head_dim_qk=dim_qk, head_dim_vo=dim_vo,
            page_size=page_size, tile_q=tile_q, tile_kv=tile_kv, num_sms=num_sms, ctas_per_sm=ctas_per_sm, causal=causal, window_left=window_left,
            fixed_split_size=None, disable_split_kv=False, extra_slots=EXTRA_SLOTS, capacity=capacity, max_page=max_page,
        )  # fmt: skip

    def _prepare(self, plan: AttentionPlan, device: int) -> None:
        from pyinfer.jit.mla import prepare_mla

        self._config = self._next_config
        kv_dtype = self._kv_dtype if self._kv_dtype is not self._dtype else None
        prepare_mla(device, plan, self._plan_ptr, self._dtype, self._soft_cap > 0.0, self._config, kv_dtype)

    def _leave_sm90(self, arg: str, cache: TensorView) -> AttentionPlan:
        """The plan anew, for the sm80 family: TMA cannot read this cache."""
        plan = self._plan
        assert plan is not None
        if self._backend == "fa3" or self._use_cuda_graph:
            got = f"shape {tuple(cache.shape)}, strides {tuple(cache.strides)}"
            wanted = "pages, and strides above 0 and below 2^40 bytes"
            fail(self._op, arg, "is not covered by backend 'fa3'", got, wanted, "Make the wrapper with backend='fa2'.")
        self._backend = "fa2"
        self._adopt(self._replan(cache.device, plan.window_left, plan.causal), cache.device)
        assert self._plan is not None
        return self._plan

    # ---- run
    def _tensor(self, arg: str, x: Any, like: TensorView | None) -> TensorView:
        v = view(x, self._op, arg)
        check_ndim(self._op, arg, v, 3)
        cached = arg in (self._ckv_arg, self._kpe_arg)
        planned = self._kv_dtype if cached else self._dtype
        if v.dtype is not planned:
            fix = f"Pass {'kv_data_type' if cached else 'q_data_type'} to plan()."
            fail_type(self._op, arg, "differs from the planned dtype", v.dtype.name, planned.name, fix)
        if like is not None and v.device != like.device:
            wanted = f"{device_name(like.device)} (where q_nope is)"
            fail(self._op, arg, "is on another device", device_name(v.device), wanted)
        check_last_dim_contiguous(self._op, arg, v)
        return v

    def _run_mla(
        self, q_nope: Any, q_pe: Any, ckv: Any, kpe: Any, out: Any, lse: Any, return_lse: bool, base_e: bool, sm_scale: float, enable_pdl: bool | None,
        cache_scales: tuple[float, float] = (1.0, 1.0),
    ) -> Any:  # fmt: skip
        options = (return_lse, base_e, sm_scale, enable_pdl, cache_scales)
        tensors = (q_nope, q_pe, ckv, kpe, *[x for x in (out, lse) if x is not None])
        call = (options, out is None, lse is None), tensors
        done = self._calls.run(*call)
        if done is not MISS:
            return done
        op, plan = self._op, self._plan
        if plan is None:
            fail(op, "plan()", "was not called", "run() first", "plan() before run()")
        rows, heads, latent = plan.total_rows, plan.num_qo_heads, plan.head_dim_vo
        rotary = plan.head_dim_qk - latent
        q = self._tensor("q_nope", q_nope, None)
        # A captured graph's queries may have room for more rows than the plan has.
        wanted = q.shape[0] if self._use_cuda_graph and q.shape[0] >= rows else rows
        check_shape(op, "q_nope", q, (wanted, heads, latent))
        if q.device != self._planned_device:
            self._move_plan(q)
            plan = self._plan
            assert plan is not None
        pe = self._tensor("q_pe", q_pe, q)
        check_shape(op, "q_pe", pe, (wanted, heads, rotary))
        c, k = self._tensor(self._ckv_arg, ckv, q), self._tensor(self._kpe_arg, kpe, q)
        check_shape(op, self._ckv_arg, c, (None, plan.page_size, latent))
        check_shape(op, self._kpe_arg, k, (c.shape[0], plan.page_size, rotary))
        if c.shape[0] <= plan.max_page:
            there = f"0..{c.shape[0] - 1} ({self._ckv_arg} has {c.shape[0]} pages)"
            fail(op, "kv_indices", "names a page outside the cache", plan.max_page, there)
        given_out, given_lse = out is not None, lse is not None
        if out is None:
            out = empty(q, (wanted, heads, latent))
            out_view = view(out)
        else:
            out_view = common.check_out(op, "out", out, q, (wanted, heads, latent), q.dtype)
        lse_view = None
        if return_lse:
            if lse is None:
                lse = empty(q, (wanted, heads), FLOAT32)
                lse_view = view(lse)
            else:
                lse_view = common.check_out(op, "lse", lse, q, (wanted, heads), FLOAT32)
                if not lse_view.is_contiguous():
                    fail(op, "lse", "is not contiguous", f"strides {tuple(lse_view.strides)}", "a contiguous tensor")
        numbers: dict[str, Any] = {
            "sm_scale": sm_scale, "logits_soft_cap": self._soft_cap, "lse_base_e": base_e, "ckv_scale": cache_scales[0], "kpe_scale": cache_scales[1],
        }  # fmt: skip
        if q.device >= 0:
            from pyinfer.jit.mla import covers, launch_mla

            for arg, cache in ((self._ckv_arg, c), (self._kpe_arg, k)):
                if not covers(self._config, cache):
                    plan = self._leave_sm90(arg, cache)
            pdl = self._pdl_default if enable_pdl is None else common.use_pdl(q.device, enable_pdl)
            bound = launch_mla(
                q.device, current_stream(q), self._plan_ptr, plan, q, pe, c, k, self._indices_ptr, out_view, lse_view, self._workspace_ptr,
                pdl=pdl, config=self._config, bind=True, **numbers,
            )  # fmt: skip
            assert bound is not None
            self._start(
                bound,
                pdl,
                current_stream(q),
                q.ptr,
                pe.ptr,
                c.ptr,
                k.ptr,
                out_view.ptr,
                0 if lse_view is None else lse_view.ptr,
            )
            if return_lse or not given_lse:
                inputs = ((0, 0), (1, 0), (2, 0), (3, 0))
                shape = (wanted, heads, latent)
                remember_run(self._calls, call, q, inputs, 4, shape, q.dtype, bound, given_out, return_lse, given_lse)
        else:
            from pyinfer.cpu.mla import run_mla

            run_mla(plan, q, pe, c, k, out_view, lse_view, **numbers)
        return (out, lse) if return_lse else out


def _largest_page(
    qo_indptr: np.ndarray, kv_indptr: np.ndarray, kv_len: np.ndarray, indices: np.ndarray | None, page_size: int
) -> int:
    """The largest page in use, -1 if none is known, -2 if the table is malformed: `_check_table` then says how."""
    from pyinfer.schedulers.lazy import kernels

    given = kv_indptr[:0] if indices is None else indices
    k = kernels(8 * len(kv_len) + len(given))
    return int(k.lengths_fit(qo_indptr, kv_indptr, kv_len, given, indices is not None, page_size))


def _before_last_page(kv_indptr: np.ndarray, page_size: int) -> np.ndarray:
    """Tokens that a request's pages but the last hold."""
    pages = kv_indptr[1:] - kv_indptr[:-1]
    return (pages - (pages > 0)) * page_size


def _used_pages(indices: np.ndarray, kv_indptr: np.ndarray, kv_len: np.ndarray, page_size: int) -> np.ndarray:
    """The page numbers in front of every request's kv_len."""
    pages = kv_indptr[1:] - kv_indptr[:-1]
    needed = -(-kv_len // page_size)
    if (needed == pages).all():
        return indices[: kv_indptr[-1]]
    starts = np.repeat(kv_indptr[:-1], needed)
    return indices[starts + np.arange(len(starts)) - np.repeat(np.cumsum(needed) - needed, needed)]


def _tiles(
    device: int, max_packed_rows: int, page_size: int, backend: str, kv_itemsize: int
) -> tuple[int, int, int, int, Any]:
    """(tile_q, tile_kv, processors, blocks per processor, configuration) for the scheduler."""
    if device < 0:
        from pyinfer.cpu.mla import config

        return (*config(max_packed_rows), 1, None)
    from pyinfer.core.device import arch_number_of, num_sms
    from pyinfer.jit.mla import choose_config

    chosen = choose_config(arch_number_of(device), max_packed_rows, page_size, backend, kv_itemsize)
    return chosen.tile_q, chosen.tile_kv, num_sms(device), chosen.ctas_per_sm, chosen
