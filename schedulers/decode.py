"""The split-KV decode plan: one query token a request."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pyinfer.schedulers.plan import AttentionPlan, PlanCapacity, build_plan, check_heads, device_slots, page_table

if TYPE_CHECKING:
    import numpy as np

OP = "decode_plan"
EXTRA_SLOTS = 2  # splitting may add this many work items for each of the device's slots


@functools.lru_cache(maxsize=16)
def _ramp(batch: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    return np.arange(batch + 1, dtype=np.int32), np.ones(batch, np.int32)


def decode_plan(
    kv_indptr: np.ndarray,
    kv_indices: np.ndarray | None,
    last_page_len: np.ndarray,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int | None = None,
    page_size: int,
    tile_q: int,
    tile_kv: int,
    num_sms: int,
    ctas_per_sm: int = 1,
    window_left: int = -1,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    capacity: PlanCapacity | None = None,
    op: str = OP,
) -> AttentionPlan:
    """Plan paged decode.

    Parameters
    ----------
    kv_indptr, kv_indices, last_page_len
        The page table, int32 host arrays [batch + 1], [at least kv_indptr[-1]], [batch]. kv_indices None: they are on the device.
    num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo
        Shapes; head_dim_vo defaults to head_dim_qk.
    page_size
        Tokens a page.
    tile_q, tile_kv
        The kernel's tile: packed rows, kv tokens. Splits are multiples of tile_kv.
    num_sms, ctas_per_sm
        num_sms * ctas_per_sm blocks (or CPU threads) run at a time.
    window_left
        Keys to the left of the query that it sees besides its own; -1 all.
    fixed_split_size
        Split every request into pieces of exactly this many pages, whatever the batch: the bits of a request's result then do not depend on its company.
    disable_split_kv
        Never split (batch-invariant as well, slower for few long requests).
    capacity
        Bounds for CUDA graphs, see `decode_capacity`.

    Returns
    -------
    AttentionPlan

    Raises
    ------
    ValueError
        For a malformed page table, head counts that do not divide, or a plan beyond `capacity`, naming the field.
    """
    check_heads(op, num_qo_heads, num_kv_heads)
    kv_len, max_page = page_table(op, kv_indptr, last_page_len, kv_indices, page_size)
    qo_indptr, qo_len = _ramp(len(kv_len))
    return build_plan(
        op, qo_indptr, qo_len, kv_indptr, kv_len, kv_indices,
        num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo or head_dim_qk,
        page_size=page_size, tile_q=tile_q, tile_kv=tile_kv, num_sms=num_sms, ctas_per_sm=ctas_per_sm, causal=False, window_left=window_left,
        fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv, extra_slots=EXTRA_SLOTS, capacity=capacity, max_page=max_page,
    )  # fmt: skip


def decode_capacity(
    batch: int,
    max_pages: int,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    tile_q: int,
    num_sms: int,
    ctas_per_sm: int = 1,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
) -> PlanCapacity:
    """The bounds of every decode plan of `batch` requests that together hold at most `max_pages` pages. Page indices are kept elsewhere."""
    tiles = batch * -(-(num_qo_heads // num_kv_heads) // tile_q)
    if disable_split_kv:
        return PlanCapacity(tiles, 0, batch)
    if fixed_split_size is not None:  # every chunk holds fixed_split_size pages but each request's last
        pieces = tiles + (tiles // max(batch, 1)) * (max_pages // fixed_split_size)
        return PlanCapacity(pieces, pieces, batch)
    extra = EXTRA_SLOTS * device_slots(num_sms, ctas_per_sm, num_kv_heads)
    # s pieces add s - 1 items and s <= 2 (s - 1) partials
    return PlanCapacity(tiles + extra, min(2 * extra, tiles + extra), batch)
