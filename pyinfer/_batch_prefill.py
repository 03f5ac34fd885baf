"""The base of the two batch prefill wrappers: from checked options to a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import _attention as common
from pyinfer._batch_attention import BatchAttention
from pyinfer.core.dtypes import DType
from pyinfer.core.errors import fail

if TYPE_CHECKING:
    from pyinfer.schedulers.plan import AttentionPlan


class BatchPrefill(BatchAttention):
    """What the paged and the ragged wrapper share."""

    _indices_arg = "paged_kv_indices_buf"

    def _check_plan_options(self, op: str, pos_encoding_mode: str, **absent: Any) -> None:
        if absent.pop("token_pos_in_items_len", 0):
            fail(op, "token_pos_in_items_len", "is not supported yet", "multi-item scoring", 0, common.SUPPORTED)
        common.check_options(op, pos_encoding_mode=pos_encoding_mode, **absent)

    def _plan_batch(
        self,
        host: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        page_indices: Any,
        key: tuple[Any, ...],
        dtype: DType,
        causal: bool,
        window_left: int,
        logits_soft_cap: float | None,
        sm_scale: float | None,
    ) -> None:
        op = self._op
        qo_indptr, kv_indptr, last_page_len = host
        common.check_head_counts(op, key[0], key[1])
        window = common.check_window(op, window_left)
        soft_cap = common.check_soft_cap(op, logits_soft_cap)
        scale = common.softmax_scale(op, sm_scale, key[2])
        if key[6] is not None and key[6] < 1:
            fail(op, "fixed_split_size", "is no number of pages", key[6], "1 or more")
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
        self._dims = (key[2], key[3])
        metadata = (qo_indptr, kv_indptr, host_indices, last_page_len)
        self._set_plan(metadata, key, dtype, window, bool(causal), soft_cap, scale, page_indices, buffers)

    def _schedule(
        self,
        qo_indptr: np.ndarray,
        kv_indptr: np.ndarray,
        indices: Any,
        last: Any,
        key: tuple[Any, ...],
        device: int,
        window_left: int,
        causal: bool,
    ) -> AttentionPlan:
        from pyinfer.schedulers.prefill import prefill_capacity, prefill_plan

        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, dtype, fixed_split_size, disable_split_kv = key
        group = num_qo_heads // num_kv_heads
        batch = len(qo_indptr) - 1
        total = int(qo_indptr[-1]) if batch >= 0 else 0
        longest = int((qo_indptr[1:] - qo_indptr[:-1]).max()) if batch > 0 else 0

        # A result that must not depend on the batch needs a tile that does not: the largest.
        invariant = disable_split_kv or fixed_split_size is not None
        longest_rows, total_rows = (1 << 24, 1 << 30) if invariant else (max(longest, 1) * group, max(total, 1) * group)
        chosen = common.batch_tiles(device, dtype, head_dim_qk, head_dim_vo, longest_rows, total_rows, num_kv_heads)
        capacity = None
        if self._use_cuda_graph:
            max_kv = self._buffers[self._indices_arg].shape[0] if self._paged else int(kv_indptr[-1])

            def choose() -> tuple[Any, ...]:
                bound = prefill_capacity(
                    batch, total, max_kv, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, page_size=page_size, tile_q=chosen[0], num_sms=chosen[2],
                    ctas_per_sm=chosen[3], fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv,
                )  # fmt: skip
                return chosen, bound._replace(max_indices=max_kv if self._paged and device < 0 else 0), total

            chosen, capacity, most = self._fixed(device, key, choose)
            if total > most:
                fail(
                    self._op, "qo_indptr", "has more query rows than the first plan", total, f"at most {most}",
                    "In CUDA graph mode the first plan fixes the most; plan the largest batch first.",
                )  # fmt: skip
        return prefill_plan(
            qo_indptr, kv_indptr, indices, last, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo,
            page_size=page_size, tile_q=chosen[0], tile_kv=chosen[1], num_sms=chosen[2], ctas_per_sm=chosen[3], causal=causal, window_left=window_left,
            fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv, capacity=capacity, op=self._op,
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
