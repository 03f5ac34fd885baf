"""Decode of few requests of one token each: kernels that need no work list, as every request is cut alike, and whose page ranges travel with the launch.

A plan of `schedulers.decode` may be run by them instead of by its list (`choose`). Where nothing is split the results have the same bits. Where short requests
are split, a cluster of blocks shares each of them and merges its parts several times faster than splits that meet in global memory (docs/design/decode.md).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from pyinfer.jit.attention import EVEN_TABLE
from pyinfer.jit.attention_config import CLUSTER, DECODE_ROWS, even_decode_config

if TYPE_CHECKING:
    from pyinfer.jit.attention_config import AttentionConfig
    from pyinfer.jit.attention_options import AttentionOptions
    from pyinfer.schedulers.plan import AttentionPlan, PlanShape

MOST_REQUESTS = (EVEN_TABLE - 4) // 2
"""That the table has room for."""
MOST_KEYS = 2048
"""Of the longest request that a cluster takes: with more, as many splits as the device has room for win over a fast merge."""
MOST_CAPTURED_KEYS = 16384
"""The same for a captured launch, which stays what it is while its requests grow, and wins at every step before it loses at the last ones."""
_SLOTS, _CHUNK = 4, 8  # places in PlanShape.numbers (schedulers/_kernels.py names them)


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
        cluster = _cluster(arch, shape, batch, kv_itemsize, options)
        if cluster is None or plan.kv_len.max() > MOST_KEYS:
            return None
        pieces, config = CLUSTER, cluster
    at = plan.offsets
    table = plan.buffer[at.kv_indptr : at.kv_len + batch].tobytes()
    return Even(pieces, config, "even", table, (at.kv_len - at.kv_indptr,), batch)


@functools.lru_cache(maxsize=64)
def captured_config(arch: int, shape: PlanShape, kv_itemsize: int, options: AttentionOptions) -> AttentionConfig | None:
    """In CUDA graph mode, for all plans of a shape or for none: the clusters that read lengths where plan() and replan() write them, and no list."""
    capacity = shape.capacity
    if capacity is None or not 0 < capacity.max_pages * max(shape.page_size, 1) <= MOST_CAPTURED_KEYS:
        return None
    return _cluster(arch, shape, capacity.max_batch, kv_itemsize, options) if _may_cut(shape) else None


def _may_cut(shape: PlanShape) -> bool:
    """Whether the rows are one tile, and where it is split is ours to say."""
    group = shape.num_qo_heads // shape.num_kv_heads
    return bool(group <= shape.tile_q == DECODE_ROWS and shape.numbers[_CHUNK] < 0)


def _cluster(
    arch: int, shape: PlanShape, batch: int, kv_itemsize: int, options: AttentionOptions
) -> AttentionConfig | None:
    """The configuration of clusters, unless they would fill the device: a cluster's blocks start together, in one part of it, and would wait for that."""
    if 4 * CLUSTER * batch > 3 * shape.numbers[_SLOTS]:
        return None
    return even_decode_config(arch, shape.head_dim_qk, shape.head_dim_vo, kv_itemsize, options)
