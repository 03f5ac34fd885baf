"""The mixed plan: decode and prefill requests of one batch, cut for two kinds of block that run side by side in one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.schedulers.decode import EXTRA_SLOTS as DECODE_EXTRA
from pyinfer.schedulers.decode import decode_capacity
from pyinfer.schedulers.plan import AttentionPlan, PlanCapacity, build_plan
from pyinfer.schedulers.prefill import EXTRA_SLOTS as PREFILL_EXTRA
from pyinfer.schedulers.prefill import prefill_capacity

if TYPE_CHECKING:
    import numpy as np

RATE_ONE = 1 << 16
ITEM_COST = 64  # kv tokens that starting an item costs, as in _kernels.ITEM_COST


class MixedPlan(NamedTuple):
    """Two plans over the same requests: all of them are in both, but each cuts only its own into tiles.

    Attributes
    ----------
    prefill, decode
        The plans. Only `prefill` holds the page indices in its buffer.
    prefill_rate
        Share of prefill in the work, of 65536: the order in which blocks of the two kinds are handed out (`prefill_before`).
    """

    prefill: AttentionPlan
    decode: AttentionPlan
    prefill_rate: int


def rate(prefill_load: float, decode_load: float) -> int:
    """Share of prefill in the work, of 65536; never 0 or all if both have some."""
    if prefill_load <= 0 or decode_load <= 0:
        return RATE_ONE if prefill_load > 0 else 0
    return min(max(round(RATE_ONE * prefill_load / (prefill_load + decode_load)), 1), RATE_ONE - 1)


def prefill_before(block: int, prefill_blocks: int, decode_blocks: int, prefill_rate: int) -> int:
    """Prefill items among the first `block` blocks of the grid, as the kernel counts them: block b takes prefill item prefill_before(b) if the count grows
    there, else decode item b - prefill_before(b).
    """
    wanted = (block * prefill_rate + RATE_ONE - 1) >> 16
    return max(min(wanted, prefill_blocks), block - decode_blocks, 0)


def load(plan: AttentionPlan) -> float:
    """Work of a plan in kv tokens: a multiprocessor's slot takes about as long for a token of a prefill item, which the tensor cores bound, as for one of a
    decode item, which the memory does (docs/internals.md).
    """
    work = plan.work
    return float((work[:, 4] - work[:, 3]).sum(dtype="int64") + ITEM_COST * len(work)) * plan.num_kv_heads


def shares(
    qo_len: np.ndarray, kv_len: np.ndarray, decode: np.ndarray, group: int, tile_q: int, causal: bool
) -> tuple[float, float]:
    """Kv tokens that (prefill, decode) items will read, estimated before anything is cut."""
    import numpy as np

    tiles = np.where(decode, (qo_len > 0).astype(np.int64), -(-qo_len.astype(np.int64) * group // tile_q))
    seen = kv_len - (np.where(decode, 0, np.minimum(qo_len, kv_len)) // 2 if causal else 0)
    tokens = tiles * (seen + ITEM_COST)
    decode_load = float(tokens[decode].sum())
    return float(tokens.sum()) - decode_load, decode_load


def mixed_capacity(
    batch: int,
    total_rows: int,
    max_pages: int,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    page_size: int,
    prefill_tile: tuple[int, int],
    decode_tile: tuple[int, int],
    num_sms: int,
    ctas_per_sm: int = 1,
    keep_indices: bool = True,
) -> tuple[PlanCapacity, PlanCapacity]:
    """The bounds of both plans of every batch of at most `batch` requests, `total_rows` query tokens and `max_pages` pages.

    `keep_indices`: the page indices travel with the prefill plan. Whatever share of the device a plan gives to either kind, it is not more than all of it.
    """
    shape: dict[str, Any] = dict(
        num_qo_heads=num_qo_heads,
        num_kv_heads=num_kv_heads,
        page_size=page_size,
        num_sms=num_sms,
        ctas_per_sm=ctas_per_sm,
    )
    prefill = prefill_capacity(batch, total_rows, max_pages, tile_q=prefill_tile[0], **shape)
    decode = decode_capacity(batch, max_pages, tile_q=decode_tile[0], **shape)
    return prefill._replace(max_indices=max_pages if keep_indices else 0), decode


def mixed_plan(
    qo_indptr: np.ndarray,
    kv_indptr: np.ndarray,
    kv_indices: np.ndarray | None,
    kv_len: np.ndarray,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    page_size: int,
    prefill_tile: tuple[int, int],
    decode_tile: tuple[int, int],
    num_sms: int,
    ctas_per_sm: int = 1,
    causal: bool = False,
    max_page: int = -1,
    capacity: tuple[PlanCapacity, PlanCapacity] | None = None,
    op: str = "mixed_plan",
) -> MixedPlan:
    """Plan a batch of which each request goes to the kind of block that suits its rows: decode up to one decode tile, prefill beyond.

    Parameters
    ----------
    qo_indptr, kv_indptr, kv_indices, kv_len
        int32 host arrays, checked: query tokens and pages of the requests, page ids (None: on the device), lengths in tokens.
    prefill_tile, decode_tile
        (tile_q, tile_kv) of the two kinds.
    num_sms, ctas_per_sm
        num_sms * ctas_per_sm blocks of either kind run at a time. Each kind is cut for its share of them, so that both end together.
    max_page
        Largest page id, -1 if unknown.
    capacity
        From `mixed_capacity`: sections, grid and order of the blocks are then those of the capacity, whatever the batch.

    Other parameters as `decode.decode_plan`.
    """
    import numpy as np

    group = num_qo_heads // num_kv_heads
    qo_len = np.diff(qo_indptr)
    decode = qo_len.astype(np.int64) * group <= decode_tile[0]
    prefill_load, decode_load = shares(qo_len, kv_len, decode, group, prefill_tile[0], causal)
    part = prefill_load / max(prefill_load + decode_load, 1.0)

    def plan(
        own: np.ndarray, tile: tuple[int, int], share: float, extra: int, indices: Any, bound: PlanCapacity | None
    ) -> AttentionPlan:
        lengths = np.ascontiguousarray(np.where(own, qo_len, 0), dtype=np.int32)
        return build_plan(
            op, qo_indptr, lengths, kv_indptr, kv_len, indices,
            num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk, head_dim_vo=head_dim_vo, page_size=page_size, tile_q=tile[0],
            tile_kv=tile[1], num_sms=max(round(num_sms * share), 1), ctas_per_sm=ctas_per_sm, causal=causal, window_left=-1, fixed_split_size=None,
            disable_split_kv=False, extra_slots=extra, capacity=bound, max_page=max_page,
        )  # fmt: skip

    bounds = (None, None) if capacity is None else capacity
    prefill_plan = plan(~decode, prefill_tile, part, PREFILL_EXTRA, kv_indices, bounds[0])
    decode_plan = plan(decode, decode_tile, 1.0 - part, DECODE_EXTRA, None, bounds[1])
    if capacity is not None:
        return MixedPlan(prefill_plan, decode_plan, rate(capacity[0].max_work, capacity[1].max_work))
    return MixedPlan(prefill_plan, decode_plan, rate(load(prefill_plan), load(decode_plan)))
