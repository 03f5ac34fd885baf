"""The base of the two batch prefill wrappers: from checked options to a plan."""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._attention_options import PlanKey, items_of, mask_view
from pyinfer._batch_attention import BatchAttention
from pyinfer._support import BACKENDS, plan_dtypes, prefill_out_dtype
from pyinfer.core.errors import fail
from pyinfer.schedulers.plan import AttentionPlan, PlanShape, plan_batch, plan_shape
from pyinfer.schedulers.prefill import EXTRA_SLOTS, prefill_capacity


@common.remembered
def prefill_key(
    op: str,
    dtypes: tuple[Any, Any, Any],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None,
    page_size: int | None,
    causal: bool,
    window_left: int,
    logits_soft_cap: float | None,
    sm_scale: float | None,
    pos_encoding_mode: str,
    rope_scale: float | None,
    rope_theta: float | None,
    fixed_split_size: int | None,
    disable_split_kv: bool,
    family: str = "",
) -> PlanKey:
    """The checked options of plan(). dtypes: q, kv, o; page_size None: ragged keys; family: of kernels, if `backend` names one."""
    q_dtype, kv_dtype = plan_dtypes(op, *dtypes[:2])
    o_dtype = prefill_out_dtype(op, q_dtype, dtypes[2])
    window, cap = common.check_window(op, window_left), common.check_soft_cap(op, logits_soft_cap)
    scale = common.softmax_scale(op, sm_scale, head_dim_qk)
    encoding = common.check_pos_encoding(op, pos_encoding_mode, rope_scale, rope_theta)
    common.check_head_counts(op, num_qo_heads, num_kv_heads)
    if page_size is not None:
        common.check_page_size(op, page_size)
    common.check_split_size(op, fixed_split_size)
    return PlanKey(
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, page_size or 0, q_dtype, kv_dtype, o_dtype, fixed_split_size,
        disable_split_kv, bool(causal), window, cap, scale, *encoding, family=family,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _shape(
    op: str, device: int, key: PlanKey, rows: int, total_rows: int, room: tuple[int, int, int] | None = None, extra_slots: int = EXTRA_SLOTS
) -> PlanShape:  # fmt: skip
    """All of a plan but the batch.

    rows and total_rows are the packed rows of the longest request and of all (which the CPU's tiles depend on); room: batch, query rows and pages (ragged:
    tokens) of the largest plan, in CUDA graph mode.
    """
    tile_q, tile_kv, num_sms, ctas_per_sm = common.batch_tiles(
        device, key.q_data_type, key.head_dim_qk, key.head_dim_vo, rows, total_rows, key.num_kv_heads, key.kv_data_type, key.options,
        key.page_size,
    )  # fmt: skip
    capacity = None
    if room is not None:
        bound = prefill_capacity(
            *room, num_qo_heads=key.num_qo_heads, num_kv_heads=key.num_kv_heads, page_size=key.page_size, tile_q=tile_q, num_sms=num_sms,
            ctas_per_sm=ctas_per_sm, fixed_split_size=key.fixed_split_size, disable_split_kv=key.disable_split_kv,
        )  # fmt: skip
        capacity = bound._replace(max_indices=room[2] if key.page_size and device < 0 else 0)
    return plan_shape(
        op, key.num_qo_heads, key.num_kv_heads, key.head_dim_qk, key.head_dim_vo, key.page_size, tile_q, tile_kv, num_sms, ctas_per_sm, extra_slots,
        key.causal, key.window_left, key.fixed_split_size, key.disable_split_kv, capacity,
    )  # fmt: skip


def _longest(indptr: np.ndarray) -> int:
    """The longest row of a CSR row pointer (of a few entries, NumPy's calls would cost more than the loop)."""
    if len(indptr) > 32:
        return int((indptr[1:] - indptr[:-1]).max())
    ends = indptr.tolist()
    return max(map(operator.sub, ends[1:], ends), default=0)


NO_ITEMS: tuple[Any, Any, int, Any] = (None, None, 0, None)


def given_items(prefix_len: Any, token_pos: Any, token_pos_len: int, max_item_len: Any) -> tuple[Any, Any, int, Any]:
    """The arguments of multi-item scoring; NO_ITEMS itself if there are none."""
    if prefix_len is None and token_pos is None and not token_pos_len and max_item_len is None:
        return NO_ITEMS
    return prefix_len, token_pos, token_pos_len, max_item_len


class BatchPrefill(BatchAttention):
    """What the paged and the ragged wrapper share."""

    _indices_arg = "paged_kv_indices_buf"
    _backends = BACKENDS
    _extra_slots = EXTRA_SLOTS  # of plans for a GPU outside of CUDA graph mode
    _fp8_queries = True

    def _plan_batch(
        self,
        host: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        page_indices: Any,
        key: PlanKey,
        custom_mask: Any,
        packed_custom_mask: Any,
        items: tuple[Any, Any, int, Any],
    ) -> None:
        """Plan a batch. `key` needs no more checks but of the heads, `items` are the four arguments of multi-item scoring."""
        op = self._op
        qo_indptr, kv_indptr, last_page_len = host
        plain = custom_mask is None and packed_custom_mask is None and items is NO_ITEMS
        if plain and self._plan_again(key, qo_indptr, kv_indptr, page_indices, last_page_len):
            return
        mask = found = None
        if custom_mask is not None or packed_custom_mask is not None:
            mask = mask_view(op, custom_mask, packed_custom_mask)
            key = key._replace(custom_mask=True, causal=False)
        if items is not NO_ITEMS:
            found = items_of(op, *items, max(len(qo_indptr) - 1, 0))
        if found is not None:
            if mask is not None:
                fail(op, "custom_mask", "excludes multi-item scoring", "both", "a custom mask or prefix_len_ptr")
            key = key._replace(causal=True, token_pos_in_items_len=found.token_pos_len)  # the mask it is part of
        buffers: dict[str, Any] = {}
        if self._use_cuda_graph:
            buffers = {"qo_indptr_buf": qo_indptr, "paged_kv_indptr_buf" if self._paged else "kv_indptr_buf": kv_indptr}
            if self._paged:
                buffers["paged_kv_last_page_len_buf"] = last_page_len
            for arg, values in buffers.items():
                self._check_buffer(arg, len(values))
            if self._paged:
                pages = max(int(kv_indptr[-1]), 0)
                self._check_buffer(self._indices_arg, pages, exact=False)
                buffers[self._indices_arg] = (
                    page_indices[:pages] if isinstance(page_indices, np.ndarray) else page_indices
                )
        host_indices = page_indices if isinstance(page_indices, np.ndarray) else None
        self._dims = (key.head_dim_qk, key.head_dim_vo)
        metadata = (qo_indptr, kv_indptr, host_indices, last_page_len)
        self._set_plan(
            metadata, key, key.q_data_type, key.window_left, key.causal, key.logits_soft_cap, key.sm_scale, page_indices, buffers,
            key.kv_data_type, key.o_data_type, key.options, None if mask is None else (mask, packed_custom_mask is not None), found,
        )  # fmt: skip

    def _schedule(
        self,
        qo_indptr: np.ndarray,
        kv_indptr: np.ndarray,
        indices: Any,
        last: Any,
        key: Any,
        device: int,
        window_left: int,
        causal: bool,
    ) -> AttentionPlan:
        op = self._op
        if window_left != key.window_left or causal != key.causal:
            key = key._replace(window_left=window_left, causal=causal)
        group = key.num_qo_heads // key.num_kv_heads
        # A result that must not depend on the batch needs a tile that does not: the largest.
        alone = key.disable_split_kv or key.fixed_split_size is not None
        rows = 1 << 24 if alone else max(_longest(qo_indptr), 1) * group
        batch = max(len(qo_indptr) - 1, 0)
        total = int(qo_indptr[-1]) if batch else 0
        tiles = (rows, 1 << 30 if alone else max(total, 1) * group) if device < 0 else (min(rows, common.MANY_ROWS), 0)
        if not self._use_cuda_graph:
            shape = _shape(op, device, key, *tiles, None, EXTRA_SLOTS if device < 0 else self._extra_slots)
            return plan_batch(op, shape, qo_indptr, kv_indptr, indices, last)
        max_kv = self._buffers[self._indices_arg].shape[0] if self._paged else int(kv_indptr[-1])
        shape, most = self._fixed(device, key, lambda: (_shape(op, device, key, *tiles, (batch, total, max_kv)), total))
        if total > most:
            fail(
                op, "qo_indptr", "has more query rows than the first plan", total, f"at most {most}",
                "In CUDA graph mode the first plan fixes the most; plan the largest batch first.",
            )  # fmt: skip
        return plan_batch(op, shape, qo_indptr, kv_indptr, indices, last)

    @classmethod
    def _max_bytes(
        cls, bounds: tuple[int, int, int], heads: tuple[int, int, int, int | None, int | None], dtypes: tuple[Any, Any], splits: tuple[int | None, bool],
        device: Any,
    ) -> int:  # fmt: skip
        from pyinfer._max_workspace import prefill_bytes

        op = f"{cls._op}.max_workspace"
        key = prefill_key(op, (*dtypes, "float16"), *heads, False, -1, None, None, "NONE", None, None, *splits)
        return prefill_bytes(op, *bounds, key, device)

    def begin_forward(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated: `plan`."""
        common.deprecated(f"{self._op}.begin_forward", "plan")
        self.plan(*args, **kwargs)  # type: ignore[attr-defined]

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """`run` with return_lse=True."""
        return self.run(*args, return_lse=True, **kwargs)  # type: ignore[attr-defined]

    def forward_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """Deprecated: `run_return_lse`, with `forward`'s arguments."""
        return self.forward(*args, return_lse=True, **kwargs)  # type: ignore[attr-defined]

    def end_forward(self) -> None:
        """Deprecated: does nothing."""
        common.deprecated(f"{self._op}.end_forward", "nothing: it does nothing")
