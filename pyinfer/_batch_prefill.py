"""The base of the two batch prefill wrappers: from checked options to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._attention_options import PlanKey, items_of, mask_view
from pyinfer._batch_attention import BatchAttention
from pyinfer._support import out_dtype, plan_dtypes
from pyinfer.core.errors import fail

if TYPE_CHECKING:
    from pyinfer.schedulers.plan import AttentionPlan


class BatchPrefill(BatchAttention):
    """What the paged and the ragged wrapper share."""

    _indices_arg = "paged_kv_indices_buf"

    def _key(
        self,
        heads: tuple[int, int, int, int | None, int],
        dtypes: tuple[Any, Any, Any],
        scores: tuple[bool, int, float | None, float | None],
        encoding: tuple[str, float | None, float | None],
        splits: tuple[int | None, bool],
    ) -> PlanKey:
        """The checked options of plan(): (qo heads, kv heads, qk, vo, page size), (q, kv, o), (causal, window, cap, scale), (mode, scale, theta), splits."""
        op = self._op
        qo, kv, qk, vo, page_size = heads
        causal, window_left, soft_cap, sm_scale = scores
        q_dtype, kv_dtype = plan_dtypes(op, *dtypes[:2])
        o_dtype = out_dtype(op, q_dtype, dtypes[2])
        window, cap, scale = (
            common.check_window(op, window_left),
            common.check_soft_cap(op, soft_cap),
            common.softmax_scale(op, sm_scale, qk),
        )
        mode, rope_scale, rope_theta = common.check_pos_encoding(op, *encoding)
        return PlanKey(
            qo, kv, qk, vo or qk, page_size, q_dtype, kv_dtype, o_dtype, *splits, bool(causal), window, cap, scale, mode, rope_scale, rope_theta,
        )  # fmt: skip

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
        common.check_head_counts(op, key.num_qo_heads, key.num_kv_heads)
        if key.fixed_split_size is not None and key.fixed_split_size < 1:
            fail(op, "fixed_split_size", "is no number of pages", key.fixed_split_size, "1 or more")
        mask = mask_view(op, custom_mask, packed_custom_mask)
        found = items_of(op, *items, max(len(qo_indptr) - 1, 0))
        if found is not None:
            if mask is not None:
                fail(op, "custom_mask", "excludes multi-item scoring", "both", "a custom mask or prefix_len_ptr")
            key = key._replace(causal=True, token_pos_in_items_len=found.token_pos_len)  # the mask it is part of
        if mask is not None:
            key = key._replace(custom_mask=True, causal=False)
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
        from pyinfer.schedulers.prefill import prefill_capacity, prefill_plan

        heads = dict(num_qo_heads=key.num_qo_heads, num_kv_heads=key.num_kv_heads, page_size=key.page_size)
        splits = dict(fixed_split_size=key.fixed_split_size, disable_split_kv=key.disable_split_kv)
        group = key.num_qo_heads // key.num_kv_heads
        batch = len(qo_indptr) - 1
        total = int(qo_indptr[-1]) if batch >= 0 else 0
        longest = int((qo_indptr[1:] - qo_indptr[:-1]).max()) if batch > 0 else 0

        # A result that must not depend on the batch needs a tile that does not: the largest.
        invariant = key.disable_split_kv or key.fixed_split_size is not None
        longest_rows, total_rows = (1 << 24, 1 << 30) if invariant else (max(longest, 1) * group, max(total, 1) * group)
        chosen = common.batch_tiles(
            device, key.q_data_type, key.head_dim_qk, key.head_dim_vo, longest_rows, total_rows, key.num_kv_heads, key.kv_data_type, key.options
        )  # fmt: skip
        capacity = None
        if self._use_cuda_graph:
            max_kv = self._buffers[self._indices_arg].shape[0] if self._paged else int(kv_indptr[-1])

            def choose() -> tuple[Any, ...]:
                bound = prefill_capacity(
                    batch, total, max_kv, tile_q=chosen[0], num_sms=chosen[2], ctas_per_sm=chosen[3], **heads, **splits
                )
                return chosen, bound._replace(max_indices=max_kv if self._paged and device < 0 else 0), total

            fixed_key = key._replace(window_left=window_left, causal=causal)
            chosen, capacity, most = self._fixed(device, fixed_key, choose)
            if total > most:
                fail(
                    self._op, "qo_indptr", "has more query rows than the first plan", total, f"at most {most}",
                    "In CUDA graph mode the first plan fixes the most; plan the largest batch first.",
                )  # fmt: skip
        return prefill_plan(
            qo_indptr, kv_indptr, indices, last, head_dim_qk=key.head_dim_qk, head_dim_vo=key.head_dim_vo, tile_q=chosen[0], tile_kv=chosen[1],
            num_sms=chosen[2], ctas_per_sm=chosen[3], causal=causal, window_left=window_left, capacity=capacity, op=self._op, **heads, **splits,
        )  # fmt: skip

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
