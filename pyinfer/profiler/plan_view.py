"""A picture of an attention plan: which multiprocessor works on which tile, and for how long.

The plan lists work items, longest first; the GPU hands blocks to multiprocessors in that order, each going to whichever has
room first. `simulate` replays this with a simple cost model, `draw_plan` draws it. Nothing here runs a kernel.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.schedulers.plan import AttentionPlan

__all__ = ["Timeline", "draw_plan", "simulate"]

_REQUEST, _ROW_BEGIN, _KV_BEGIN, _KV_END = 0, 1, 3, 4  # columns of AttentionPlan.work (docs/internals.md)


class Timeline(NamedTuple):
    """When each block runs, and where.

    Attributes
    ----------
    sm
        int32 [blocks]: the multiprocessor.
    lane
        int32 [blocks]: which of its resident blocks, 0..ctas_per_sm-1.
    start, stop
        int64 [blocks]: in kv tokens.
    item, kv_head
        int32 [blocks]: the row of `plan.work`, and the kv head.
    """

    sm: np.ndarray
    lane: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    item: np.ndarray
    kv_head: np.ndarray

    @property
    def length(self) -> int:
        """When the last block ends."""
        return int(self.stop.max(initial=0))

    def efficiency(self, num_sms: int, ctas_per_sm: int = 1) -> float:
        """Busy time over available time: 1 means that every multiprocessor works until the end."""
        available = self.length * num_sms * ctas_per_sm
        return float((self.stop - self.start).sum() / available) if available else 1.0


def simulate(plan: AttentionPlan, num_sms: int, ctas_per_sm: int = 1, overhead: int = 32) -> Timeline:
    """Replay a plan on a device.

    Parameters
    ----------
    plan
        From `pyinfer.schedulers` or a wrapper's `plan`.
    num_sms
        Multiprocessors (on the CPU backend: threads).
    ctas_per_sm
        Blocks resident on one multiprocessor.
    overhead
        What a block costs besides its keys (prologue, epilogue, merge), in kv tokens.

    Returns
    -------
    Timeline
        Blocks in launch order: block b works on item b // num_kv_heads, kv head b % num_kv_heads. The model: a block takes
        `overhead` plus its number of kv tokens, whatever else runs.

    Raises
    ------
    ValueError
        If num_sms or ctas_per_sm is smaller than 1, or overhead negative.
    """
    import numpy as np

    from pyinfer.core.errors import fail

    for name, value, least in (("num_sms", num_sms, 1), ("ctas_per_sm", ctas_per_sm, 1), ("overhead", overhead, 0)):
        if value < least:
            fail("simulate", name, "is too small", value, f"{least} or more")
    work = plan.work
    heads = plan.num_kv_heads
    n = len(work) * heads
    item = np.repeat(np.arange(len(work), dtype=np.int32), heads)
    kv_head = np.tile(np.arange(heads, dtype=np.int32), len(work))
    cost = overhead + (work[:, _KV_END].astype(np.int64) - work[:, _KV_BEGIN])
    sm, lane = np.empty(n, np.int32), np.empty(n, np.int32)
    start = np.empty(n, np.int64)
    # (free from, lane, sm): the first round fills every multiprocessor once before any gets its second block.
    free = [(0, a, s) for a in range(ctas_per_sm) for s in range(num_sms)]
    for b in range(n):
        start[b], lane[b], sm[b] = free[0]
        heapq.heapreplace(free, (int(start[b] + cost[item[b]]), int(lane[b]), int(sm[b])))
    return Timeline(sm, lane, start, start + cost[item], item, kv_head)


def draw_plan(
    plan: AttentionPlan,
    num_sms: int,
    ctas_per_sm: int = 1,
    *,
    overhead: int = 32,
    ax: Any = None,
    title: str | None = None,
) -> Any:
    """Draw a plan with Matplotlib: a row for each block slot, a bar for each block, coloured by request.

    Parameters
    ----------
    plan, num_sms, ctas_per_sm, overhead
        As in `simulate`.
    ax
        Axes to draw on; made if missing.
    title
        Default: the numbers of requests, tiles and blocks, and the efficiency.

    Returns
    -------
    matplotlib.axes.Axes
    """
    import matplotlib.pyplot as plt
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    timeline = simulate(plan, num_sms, ctas_per_sm, overhead)
    if ax is None:
        rows = num_sms * ctas_per_sm
        _, ax = plt.subplots(figsize=(9, min(max(1.2 + 0.16 * rows, 2.4), 7)), layout="constrained")
    colormap: Any = plt.get_cmap("tab20")  # a listed one
    palette = colormap.colors
    request = plan.work[:, _REQUEST] if len(plan.work) else plan.work.reshape(-1)
    y = timeline.sm * ctas_per_sm + timeline.lane
    crowded = num_sms * ctas_per_sm > 48  # a row is then a pixel or two: no gaps, no outlines
    half = 0.5 if crowded else 0.42
    bars, colours = [], []
    for row, begin, end, item in zip(y, timeline.start, timeline.stop, timeline.item, strict=True):
        bars.append(((begin, row - half), (end, row - half), (end, row + half), (begin, row + half)))
        colours.append(palette[int(request[item]) % len(palette)])
    ax.add_collection(PolyCollection(bars, facecolors=colours, edgecolors="white", linewidths=0.0 if crowded else 0.4))
    ax.set_xlim(0, max(timeline.length, 1))
    ax.set_ylim(num_sms * ctas_per_sm - 0.5, -0.5)
    ax.set_xlabel(f"time (kv tokens read by a block; {overhead} for a block's own cost)")
    ax.set_ylabel("SM" if ctas_per_sm == 1 else f"SM × {ctas_per_sm} resident blocks")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if title is None:
        tiles = len({(int(w[_REQUEST]), int(w[_ROW_BEGIN])) for w in plan.work})
        title = (
            f"{plan.batch_size} requests, {tiles} tiles, {len(timeline.item)} blocks: "
            f"{timeline.efficiency(num_sms, ctas_per_sm):.0%} busy"
        )
    ax.set_title(title, loc="left", fontsize=10)
    shown = sorted({int(r) for r in request})
    if 0 < len(shown) <= 12:
        handles = [
            Patch(color=palette[r % len(palette)], label=f"request {r}: {int(plan.kv_len[r])} keys") for r in shown
        ]
        ax.legend(handles=handles, fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax
