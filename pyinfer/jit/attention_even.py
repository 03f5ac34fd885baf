"""Decode of few requests of one token each: kernels that need no work list, as every request is cut alike, and whose page ranges travel with the launch.

A plan of `schedulers.decode` may be run by them instead of by its list (`choose`). Where nothing is split the results have the same bits. Where short requests
are split, a cluster of blocks shares each of them and merges its parts several times faster than splits that meet in global memory (docs/design/decode.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pyinfer.jit.attention import EVEN_TABLE
from pyinfer.jit.attention_config import CLUSTER, DECODE_ROWS, even_decode_config

if TYPE_CHECKING:
    from pyinfer.jit.attention_config import AttentionConfig
    from pyinfer.jit.attention_options import AttentionOptions
    from pyinfer.schedulers.plan import AttentionPlan

MOST_REQUESTS = (EVEN_TABLE - 4) // 2
"""That the table has room for."""
MOST_KEYS = 2048
"""Of the longest request that a cluster takes: with more, as many splits as the device has room for win over a fast merge."""
_SLOTS, _CHUNK = 4, 8  # places in PlanShape.numbers (schedulers/_kernels.py names them)


class Even(NamedTuple):
    """A launch without a work list: blocks for each request and kv head, the configuration, and the table with the place of kv_len in it."""

    pieces: int
    config: AttentionConfig
    table: bytes
    len_at: int


def choose(
    arch: int, plan: AttentionPlan, config: AttentionConfig, kv_itemsize: int, options: AttentionOptions
) -> Even | None:
    """How to run a plan that was made for `config` without its work list; None if it needs that.

    It does in CUDA graphs, whose plans change under the kernel; where the caller decides about splits, so that bits do not depend on which kernel runs;
    and where requests differ too much to be cut alike.
    """
    shape = plan.shape
    batch = plan.batch_size
    if shape.capacity is not None or not 0 < batch <= MOST_REQUESTS or shape.tile_q != DECODE_ROWS:
        return None
    if plan.total_rows != batch or shape.numbers[_CHUNK] >= 0 or plan.group_size > DECODE_ROWS:
        return None
    if plan.qo_indptr.tolist() != list(range(batch + 1)):
        return None
    pieces = 1
    if plan.num_partials:
        # A cluster's blocks start together, in one part of the device: where that is nearly full they would wait.
        if 4 * CLUSTER * batch > 3 * shape.numbers[_SLOTS] or plan.kv_len.max() > MOST_KEYS:
            return None
        cluster = even_decode_config(arch, shape.head_dim_qk, shape.head_dim_vo, kv_itemsize, options)
        if cluster is None:
            return None
        pieces, config = CLUSTER, cluster
    at = plan.offsets
    table = plan.buffer[at.kv_indptr : at.kv_len + batch]
    return Even(pieces, config, table.tobytes(), at.kv_len - at.kv_indptr)
