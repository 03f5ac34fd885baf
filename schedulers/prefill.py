"""The prefill tile plan: tiles of packed query rows, with KV splits where there are too few tiles to fill the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pyinfer.schedulers.plan import (
    SINGLE_COUNTER,
    SINGLE_SEMAPHORE_BYTES,
    AttentionPlan,
    PlanCapacity,
    device_slots,
    partial_bytes,
    plan_batch,
    plan_shape,
)

if TYPE_CHECKING:
    import numpy as np

OP = "prefill_plan"
EXTRA_SLOTS = 1  # splitting may add this many work items for each of the device's slots


def prefill_plan(
    qo_indptr: np.ndarray,
    kv_indptr: np.ndarray,
    kv_indices: np.ndarray | None = None,
    last_page_len: np.ndarray | None = None,
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
    causal: bool = False,
    window_left: int = -1,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    capacity: PlanCapacity | None = None,
    op: str = OP,
) -> AttentionPlan:
    """Plan prefill over paged or ragged keys.

    Parameters
    ----------
    qo_indptr
        int32 host array [batch + 1], query tokens.
    kv_indptr
        int32 host array [batch + 1]: pages, or kv tokens if page_size is 0.
    kv_indices, last_page_len
        int32 host arrays [at least kv_indptr[-1]], [batch]; both None for ragged keys, kv_indices None if they are on the device.
    causal
        Query i of a request sees kv j iff j <= kv_len - qo_len + i.
    fixed_split_size
        Split every tile's keys into pieces of exactly this many pages (tokens if ragged), counted from the first key the tile sees.

    Other parameters, returns and errors as `decode.decode_plan`.
    """
    assert not page_size or last_page_len is not None
    shape = plan_shape(
        op, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo or head_dim_qk, page_size, tile_q, tile_kv, num_sms, ctas_per_sm, EXTRA_SLOTS,
        causal, window_left, fixed_split_size, disable_split_kv, capacity,
    )  # fmt: skip
    return plan_batch(op, shape, qo_indptr, kv_indptr, kv_indices, last_page_len if page_size else None)


def prefill_capacity(
    batch: int,
    total_rows: int,
    max_kv: int,
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
    """The bounds of every prefill plan of `batch` requests with at most `total_rows` query tokens and `max_kv` pages (ragged: kv tokens) in all."""
    tiles = batch + total_rows * (num_qo_heads // num_kv_heads) // tile_q
    if disable_split_kv:
        return PlanCapacity(tiles, 0, batch)
    if fixed_split_size is not None:
        pieces = tiles * (1 + max_kv // fixed_split_size)
        return PlanCapacity(pieces, pieces, batch)
    extra = EXTRA_SLOTS * device_slots(num_sms, ctas_per_sm, num_kv_heads)
    return PlanCapacity(tiles + extra, min(2 * extra, tiles + extra), batch)


class SingleSchedule(NamedTuple):
    """How one request is cut up, with no plan to upload (docs/internals.md, "Single-request calls").

    Attributes
    ----------
    num_tiles
        Tiles of packed query rows.
    kv_chunk
        Tokens a split reads at most; 0 if unsplit.
    num_splits
        Splits of every tile.
    workspace_bytes
        Semaphores and partials; 0 if unsplit.
    """

    num_tiles: int
    kv_chunk: int
    num_splits: int
    workspace_bytes: int


def single_schedule(
    qo_len: int,
    kv_len: int,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_vo: int,
    tile_q: int,
    tile_kv: int,
    num_sms: int,
    ctas_per_sm: int = 1,
    causal: bool = False,
    window_left: int = -1,
) -> SingleSchedule:
    """Cut one request: as many splits as leave no slot of the device idle, in chunks of a multiple of tile_kv. A few integer operations.

    Parameters as `prefill_plan`; num_sms * ctas_per_sm blocks run at a time.
    """
    tiles = -(-qo_len * (num_qo_heads // num_kv_heads) // tile_q)
    longest = kv_len
    if (
        window_left >= 0
    ):  # a tile spans at most tile_q tokens; without causality its first token's window opens up to the last key
        longest = min(kv_len, window_left + (min(qo_len, tile_q) if causal else qo_len))
    room = device_slots(num_sms, ctas_per_sm, num_kv_heads) // max(tiles, 1)
    if room < 2 or longest <= 2 * tile_kv or tiles * num_kv_heads > SINGLE_COUNTER:
        return SingleSchedule(tiles, 0, 1, 0)
    # Twice tile_kv at least: shorter splits cost more to merge than they save.
    chunk = max(-(-longest // room), 2 * tile_kv)
    chunk = -(-chunk // tile_kv) * tile_kv
    splits = -(-longest // chunk)
    if splits < 2:
        return SingleSchedule(tiles, 0, 1, 0)
    return SingleSchedule(
        tiles,
        chunk,
        splits,
        SINGLE_SEMAPHORE_BYTES + sum(partial_bytes(tiles * splits, num_kv_heads, tile_q, head_dim_vo)),
    )
