"""Decode of few requests of one token each: kernels that need no work list, as every request is cut alike, and whose page ranges travel with the launch.

A plan of `schedulers.decode` may be run by them instead of by its list (`choose`). Where nothing is split the results have the same bits. Where short requests
are split, a cluster of blocks shares each of them and merges its parts several times faster than splits that meet in global memory (docs/design/decode.md).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from pyinfer.jit.attention import EVEN_TABLE
from pyinfer.jit.attention_config import CLUSTER, DECODE_ROWS, cluster_configs, slab_rows

if TYPE_CHECKING:
    from pyinfer.jit.attention_config import AttentionConfig
    from pyinfer.jit.attention_options import AttentionOptions
    from pyinfer.schedulers.plan import AttentionPlan, PlanShape

MOST_REQUESTS = (EVEN_TABLE - 4) // 2
"""That the table has room for."""
# What decides between clusters and the plan's list, measured on an H200 (docs/design/decode.md). A cluster's block reads at a rate of its own, whatever else
# the device could do; for that its splits are merged sooner.
BLOCK_RATE = {4: 33.0, 8: 56.0}
"""Bytes per ns that a block of so many warps reads."""
DEVICE_RATE = 4400.0
"""Bytes per ns that all blocks read at most."""
SLOWER_START = {4: 0.0, 8: 1000.0}
"""What a launch of short requests with such blocks takes longer, ns."""
MOST_READ = 4 << 20
"""Bytes of a request's kv head beyond which reading is all that counts: there no cluster was faster."""
MERGE_GAIN = 3300.0
"""What reading may take longer, ns."""
CAPTURED_SHARE = 4
"""A captured launch stays what it is while its requests grow: it is judged by this part of the keys that its buffers hold."""
_TILE_KV, _SLOTS, _CHUNK = 3, 4, 8  # places in PlanShape.numbers (schedulers/_kernels.py names them)


class Even(NamedTuple):
    """A launch without a work list: blocks for each request and kv head, the configuration, and the parameters that say where the keys are.

    table
        By value: kv_indptr and kv_len; None: they are read from the plan.
    constants
        The place of kv_len in the table; or the addresses of header, kv_indptr and kv_len.
    requests
        To launch for.
    """

    pieces: int
    config: AttentionConfig
    source: str
    table: bytes | None
    constants: tuple[int, ...]
    requests: int


def choose(
    arch: int,
    plan: AttentionPlan,
    plan_buffer_ptr: int,
    config: AttentionConfig,
    kv_itemsize: int,
    options: AttentionOptions,
) -> Even | None:
    """How to run a plan that was made for `config` without its work list; None if it needs that.

    It does where the caller decides about splits, so that bits do not depend on which kernel runs; and where requests differ too much to be cut alike.
    """
    shape = plan.shape
    if options.mask or options.multi_item or options.user is not None:
        return None  # these look at other lists of the plan
    if shape.capacity is not None:
        cluster = captured_config(arch, shape, kv_itemsize, options)
        if cluster is None:
            return None
        at, places = plan.offsets, plan_buffer_ptr
        constants = (places, places + 4 * at.kv_indptr, places + 4 * at.kv_len)
        return Even(CLUSTER, cluster, "even_plan", None, constants, shape.capacity.max_batch)
    if not _may_cut(shape):
        return None
    batch = plan.batch_size
    if not 0 < batch <= MOST_REQUESTS or plan.total_rows != batch or plan.qo_indptr.tolist() != list(range(batch + 1)):
        return None
    pieces = 1
    if plan.num_partials:
        keys = int(plan.kv_len.max()), int(plan.kv_len.sum())
        cluster = _cluster(arch, shape, batch, *keys, kv_itemsize, options)
        if cluster is None:
            return None
        pieces, config = CLUSTER, cluster
    at = plan.offsets
    table = plan.buffer[at.kv_indptr : at.kv_len + batch].tobytes()
    return Even(pieces, config, "even", table, (at.kv_len - at.kv_indptr,), batch)


@functools.lru_cache(maxsize=64)
def captured_config(arch: int, shape: PlanShape, kv_itemsize: int, options: AttentionOptions) -> AttentionConfig | None:
    """In CUDA graph mode, for all plans of a shape or for none: the clusters that read lengths where plan() and replan() write them, and no list."""
    capacity = shape.capacity
    if capacity is None or capacity.max_pages == 0 or not _may_cut(shape) or options.user is not None:
        return None
    keys = capacity.max_pages * max(shape.page_size, 1) // CAPTURED_SHARE
    return _cluster(arch, shape, capacity.max_batch, keys, keys, kv_itemsize, options)


def _may_cut(shape: PlanShape) -> bool:
    """Whether the rows are one tile, and where it is split is ours to say."""
    group = shape.num_qo_heads // shape.num_kv_heads
    return bool(group <= shape.tile_q == DECODE_ROWS and shape.numbers[_CHUNK] < 0)


def _cluster(
    arch: int, shape: PlanShape, batch: int, longest: int, total: int, kv_itemsize: int, options: AttentionOptions,
) -> AttentionConfig | None:  # fmt: skip
    """The configuration of clusters that takes the least time for requests of up to `longest` keys and `total` together; None if they lose to a list.

    A cluster's blocks start together, in one part of the device. Where that is nearly full they would wait: one place in ten is left free.
    """
    dims = shape.head_dim_qk, shape.head_dim_vo
    places = (
        int(shape.numbers[_SLOTS]) * shape.num_kv_heads * int(shape.numbers[_TILE_KV]) // slab_rows(*dims, kv_itemsize)
    )  # of warps
    key = sum(dims) * kv_itemsize
    if shape.window_left >= 0:
        longest = min(longest, shape.window_left + 1)
    shared = min(total, batch * longest) * key * shape.num_kv_heads / DEVICE_RATE
    best = None
    for config in cluster_configs(arch, *dims, kv_itemsize, options):
        warps = config.num_warps
        if 10 * CLUSTER * batch * shape.num_kv_heads * warps > 9 * places or longest * key > MOST_READ:
            continue
        time = longest * key / (CLUSTER * BLOCK_RATE[warps]) + SLOWER_START[warps]
        if time - shared <= MERGE_GAIN and (best is None or time < best[0]):
            best = time, config
    return None if best is None else best[1]
