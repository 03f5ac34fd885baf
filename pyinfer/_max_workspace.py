"""How large a workspace plans within given bounds may need: what `max_workspace` of the batch wrappers answers, without a tensor or a GPU's memory."""

from __future__ import annotations

from typing import Any

from pyinfer import _attention as common
from pyinfer.schedulers.plan import PlanShape, partial_bytes


def _bytes(shape: PlanShape) -> int:
    bound = shape.capacity
    assert bound is not None
    return sum(partial_bytes(bound.max_partials, shape.num_kv_heads, shape.tile_q, shape.head_dim_vo))


def _check_bounds(op: str, **bounds: int) -> None:
    from pyinfer.core.errors import fail

    for arg, value in bounds.items():
        if not isinstance(value, int) or value < 1:
            fail(op, arg, "is no size", value, "1 or more")


def _upto(most: int) -> list[int]:
    """1 to most: every number to 33 (tiles of the CPU follow those), then powers of two and their successors, and `most` itself."""
    sizes = {*range(1, 34), most}
    power = 64
    while power < most:
        sizes |= {power, power + 1}
        power *= 2
    return sorted(n for n in sizes if n <= most)


def decode_bytes(op: str, batch: int, pages: int, key: Any, device: Any) -> int:
    """The most that a decode plan of at most `batch` requests on `pages` pages needs."""
    from pyinfer._support import _device_index
    from pyinfer.decode import _shape

    _check_bounds(op, max_batch_size=batch, max_num_pages=pages)
    index = _device_index(device)
    common.check_kernel(op, index, key.q_data_type, key.head_dim_qk, key.head_dim_vo)
    return max(_bytes(_shape(op, index, key, n, pages)) for n in _upto(batch))


def prefill_bytes(op: str, batch: int, tokens: int, kv: int, key: Any, device: Any) -> int:
    """The most that a prefill plan of at most `batch` requests, `tokens` query tokens and `kv` pages (ragged: kv tokens) needs."""
    from pyinfer._batch_prefill import _shape
    from pyinfer._support import _device_index

    _check_bounds(
        op, max_batch_size=batch, max_num_tokens=tokens, **{"max_num_pages" if key.page_size else "max_kv_tokens": kv}
    )
    index = _device_index(device)
    common.check_kernel(op, index, key.q_data_type, key.head_dim_qk, key.head_dim_vo, fp8_queries=True)
    group = key.num_qo_heads // key.num_kv_heads
    if key.disable_split_kv or key.fixed_split_size is not None:  # as _schedule: one tile, whatever the batch
        sizes = [(1 << 24, 1 << 30)] if index < 0 else [(common.MANY_ROWS, 0)]
    elif index < 0:
        sizes = [(n * group, total * group) for n in _upto(tokens) for total in (n, tokens)]
    else:
        sizes = [(min(n * group, common.MANY_ROWS), 0) for n in _upto(tokens)]
    return max(_bytes(_shape(op, index, key, *size, (batch, tokens, kv))) for size in dict.fromkeys(sizes))
