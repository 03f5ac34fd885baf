"""The split-KV decode plan: one query token a request."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pyinfer.schedulers.plan import AttentionPlan, PlanCapacity, device_slots, plan_batch, plan_shape

if TYPE_CHECKING:
    import numpy as np

OP = "decode_plan"
EXTRA_SLOTS = 2  # splitting may add this many work items for each of the device's slots


@functools.lru_cache(maxsize=16)
def one_token_each(batch: int) -> np.ndarray:
    """qo_indptr of decode, int32 [batch + 1]: shared, not to be written."""
    import numpy as np

    return np.arange(batch + 1, dtype=np.int32)


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
    if page_size < 1:
        from pyinfer.core.errors import fail

        fail(op, "page_size", "is no page size", page_size, "1 or more")
    shape = plan_shape(
        op, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, page_size, tile_q, tile_kv, num_sms, ctas_per_sm, EXTRA_SLOTS,
        False, window_left, fixed_split_size, disable_split_kv, capacity,
    )  # fmt: skip
    return plan_batch(op, shape, one_token_each(max(len(kv_indptr) - 1, 0)), kv_indptr, kv_indices, last_page_len)


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
