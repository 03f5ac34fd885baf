"""The planners' inner loops, compiled by Numba.

All of them live in this one module: Numba's disk cache stamps a function's own file only, so a callee in another module could go stale.
Arrays are int32 unless said otherwise. A kernel that checks returns a code (0: fine) with the place and the value, and `plan.py` turns
that into the message: raising from compiled code would cost the message its numbers.
"""

from __future__ import annotations

import numpy as np

if globals().get("INTERPRETED", False):  # `lazy` runs this module twice: without Numba first

    def kernel(**_options):
        """Leave a function as it is."""
        return lambda function: function

else:
    from pyinfer.cpu.compile import kernel  # type: ignore[assignment]  # one name, two ways to run

# What check_page_table returns first.
OK, BAD_START, NOT_MONOTONE, BAD_LAST_PAGE, TOO_FEW_INDICES, NEGATIVE_PAGE, TOO_LONG = range(7)

# Cost model of choose_chunk, in units of "kv tokens one work item reads". An item costs its tokens plus ITEM_COST (launch, query load,
# pipeline ramp, epilogue); a tile cut in s pieces costs its last arriver s * MERGE_COST (reading the partials back).
ITEM_COST = 64
MERGE_COST = 8


@kernel(fastmath=False)
def check_page_table(indptr, last_page_len, indices, page_size, kv_len):
    """Check a CSR page table and write every request's length. Returns (code, where, value, max_page)."""
    batch = len(indptr) - 1
    if indptr[0] != 0:
        return BAD_START, 0, np.int64(indptr[0]), np.int64(-1)
    for b in range(batch):
        pages = np.int64(indptr[b + 1]) - np.int64(indptr[b])
        last = np.int64(last_page_len[b])
        if pages < 0:
            return NOT_MONOTONE, b + 1, np.int64(indptr[b + 1]), np.int64(-1)
        if last > page_size or last < 0 or (pages > 0 and last == 0):
            return BAD_LAST_PAGE, b, last, np.int64(-1)
        length = (pages - 1) * page_size + last if pages > 0 else np.int64(0)
        if length > 2147483647:
            return TOO_LONG, b, length, np.int64(-1)
        kv_len[b] = length
    if len(indices) < indptr[batch]:
        return TOO_FEW_INDICES, batch, np.int64(indptr[batch]), np.int64(-1)
    lowest = np.int32(0)
    highest = np.int32(-1)
    for j in range(indptr[batch]):
        lowest = min(lowest, indices[j])
        highest = max(highest, indices[j])
    if lowest < 0:
        for j in range(indptr[batch]):
            if indices[j] < 0:
                return NEGATIVE_PAGE, j, np.int64(indices[j]), np.int64(-1)
    return OK, 0, np.int64(0), np.int64(highest)


@kernel(fastmath=False)
def check_indptr(indptr, lengths):
    """Check a CSR row pointer and write its differences. Returns (code, where, value)."""
    if indptr[0] != 0:
        return BAD_START, 0, np.int64(indptr[0])
    for b in range(len(indptr) - 1):
        n = np.int64(indptr[b + 1]) - np.int64(indptr[b])
        if n < 0:
            return NOT_MONOTONE, b + 1, np.int64(indptr[b + 1])
        lengths[b] = n
    return OK, 0, np.int64(0)


@kernel(fastmath=False)
def visible_range(token_begin, token_end, qo_len, kv_len, causal, window_left):
    """[begin, end) of the kv tokens that some query token of [token_begin, token_end) sees; (0, 0) if none.

    Query token i stands at kv position kv_len - qo_len + i, whether or not the mask is causal.
    """
    begin = np.int64(0)
    end = np.int64(kv_len)
    if causal:
        end = min(end, np.int64(kv_len) - qo_len + token_end)
    if window_left >= 0:
        begin = max(begin, np.int64(kv_len) - qo_len + token_begin - window_left)
    if begin >= end:
        return np.int64(0), np.int64(0)
    return begin, end


@kernel(fastmath=False)
def _pieces(length, chunk, unit):
    """(number of pieces, tokens a piece) for a tile of `length` tokens under a chunk limit: pieces of one size, rounded up to `unit`."""
    if chunk == 0 or length <= chunk:
        return np.int64(1), np.int64(length)
    n = (length + chunk - 1) // chunk
    if (
        unit == 0
    ):  # a fixed split: pieces are exactly `chunk`, whatever the length, so that bits do not depend on the batch
        return n, np.int64(chunk)
    piece = ((length + n - 1) // n + unit - 1) // unit * unit
    return (length + piece - 1) // piece, piece


@kernel(fastmath=False)
def choose_chunk(lengths, unit, slots, max_items):
    """The chunk limit with the least estimated makespan on `slots` workers, among those with at most `max_items` items.

    Estimate: T = max(mean load, rounds of the large pieces, longest piece) + merge of the most-split tile. List scheduling, longest first,
    stays close to that. Candidates are the longest tile over 1, 2, 3, 4, 6, 8, 12, ...: the item count grows along the list, so the first
    that does not fit ends the search, as a binary search over the chunk would; unlike one, this also sees that a smaller chunk can be
    slower, and that one long request among many short ones is worth splitting although the device is full.
    Returns (chunk, items); chunk 0 means unsplit.
    """
    n = len(lengths)
    total = np.int64(0)
    longest = np.int64(0)
    for t in range(n):
        total += lengths[t]
        longest = max(longest, np.int64(lengths[t]))
    best_chunk = np.int64(0)
    best_items = np.int64(n)
    best_cost = np.float64(-1)
    parts = np.int64(1)
    previous = np.int64(0)
    while True:
        chunk = (longest + parts - 1) // parts
        chunk = max((chunk + unit - 1) // unit * unit, unit)
        if chunk != previous:
            previous = chunk
            items = np.int64(0)
            largest = np.int64(0)
            most = np.int64(1)
            large = np.int64(0)
            large_tokens = np.int64(0)
            half = min(chunk, longest) // 2
            for t in range(n):
                pieces, piece = _pieces(lengths[t], chunk, unit)
                items += pieces
                largest = max(largest, piece)
                most = max(most, pieces)
                if piece > half:
                    large += pieces
                    large_tokens += lengths[t]
            if items > max_items and parts > 1:
                break
            cost = (total + items * ITEM_COST) / slots
            if large > 0:
                rounds = (large + slots - 1) // slots
                cost = max(cost, rounds * (large_tokens / large + ITEM_COST))
            cost = max(cost, np.float64(largest + ITEM_COST))
            if most > 1:
                cost += most * MERGE_COST
            if best_cost < 0 or cost < best_cost:
                best_cost = cost
                best_items = items
                best_chunk = chunk if most > 1 else np.int64(0)
            if chunk <= unit or cost <= (total + n * ITEM_COST) / slots:
                break
        # 1, 2, 3, 4, 6, 8, 12, 16, ...
        if parts < 4:
            parts += 1
        elif parts & (parts - 1) == 0:
            parts += parts // 2
        else:
            parts += parts // 3
    return best_chunk, best_items


@kernel(fastmath=False)
def measure(qo_len, kv_len, group, tile_q, unit, slots, extra, causal, window_left, chunk):
    """First pass: cut the batch into tiles and pick the chunk. Returns (chunk, unit, items, partials, tiles int32 [n, 5]).

    A tile's row: request, first packed row, packed rows, kv begin, kv end. `chunk`: < 0 choose, 0 never split, > 0 exactly that many tokens.
    """
    batch = len(qo_len)
    n = np.int64(0)
    for b in range(batch):
        n += (np.int64(qo_len[b]) * group + tile_q - 1) // tile_q
    tiles = np.empty((n, 5), np.int32)
    lengths = np.empty(n, np.int64)
    t = 0
    for b in range(batch):
        rows = np.int64(qo_len[b]) * group
        for row in range(0, rows, tile_q):
            count = min(tile_q, rows - row)
            begin, end = visible_range(
                row // group, (row + count - 1) // group + 1, qo_len[b], kv_len[b], causal, window_left
            )
            tiles[t, 0] = b
            tiles[t, 1] = row
            tiles[t, 2] = count
            tiles[t, 3] = begin
            tiles[t, 4] = end
            lengths[t] = end - begin
            t += 1
    if chunk < 0:
        chunk, _ = choose_chunk(lengths, unit, slots, n + extra)
    else:
        unit = 0
    items = np.int64(0)
    partials = np.int64(0)
    for t in range(n):
        pieces, _ = _pieces(lengths[t], chunk, unit)
        items += pieces
        if pieces > 1:
            partials += pieces
    return chunk, unit, items, partials, tiles


@kernel(fastmath=False)
def assemble(buffer, at, n_work, num_partials, tiles, chunk, unit, qo_indptr, kv_indptr, kv_len, kv_indices):
    """Write the whole packed plan. `at`: the sections' begins and the end, as in PlanOffsets (int64 [7]); kv_indices empty: not in the buffer.

    What a section has no values for is zeroed, semaphores too.
    """
    for i in range(at[0]):
        buffer[i] = 0
    buffer[0] = n_work
    buffer[1] = num_partials
    buffer[2] = len(kv_len)
    end = at[0] + 8 * n_work
    emit(tiles, chunk, unit, buffer[at[0] : end].reshape(n_work, 8))
    for i in range(end, at[1]):
        buffer[i] = 0
    _put(buffer, at[1], at[2], qo_indptr, len(qo_indptr))
    _put(buffer, at[2], at[3], kv_indptr, len(kv_indptr))
    _put(buffer, at[3], at[4], kv_len, len(kv_len))
    _put(buffer, at[4], at[5], kv_indices, min(len(kv_indices), kv_indptr[-1]))
    for i in range(at[5], at[6]):
        buffer[i] = 0


@kernel(fastmath=False)
def _put(buffer, begin, end, values, count):
    """Copy values[:count] to buffer[begin:] and zero the rest up to `end`."""
    for i in range(count):
        buffer[begin + i] = values[i]
    for i in range(begin + count, end):
        buffer[i] = 0


@kernel(fastmath=False)
def emit(tiles, chunk, unit, work):
    """Second pass: write the work items, longest first. Among items of one length the order is that of the batch (a stable radix sort)."""
    n = len(work)
    tile_of = np.empty(n, np.int32)
    split_of = np.empty(n, np.int32)
    length_of = np.empty(n, np.int64)
    slot_of = np.empty(len(tiles), np.int32)
    i = 0
    slot = 0
    longest = np.int64(0)
    for t in range(len(tiles)):
        length = np.int64(tiles[t, 4]) - tiles[t, 3]
        pieces, piece = _pieces(length, chunk, unit)
        slot_of[t] = slot if pieces > 1 else 0
        for s in range(pieces):
            tile_of[i] = t
            split_of[i] = s
            length_of[i] = min(piece, length - s * piece)
            longest = max(longest, length_of[i])
            i += 1
        if pieces > 1:
            slot += pieces
    order = np.arange(n).astype(np.int32)
    other = np.empty(n, np.int32)
    count = np.empty(2049, np.int64)
    shift = 0
    while (longest >> shift) > 0:
        count[:] = 0
        for i in range(n):
            count[2048 - ((length_of[i] >> shift) & 2047)] += 1  # key 2047 - digit, counted one place up: descending
        for d in range(1, 2049):
            count[d] += count[d - 1]
        for i in range(n):
            item = order[i]
            key = 2047 - ((length_of[item] >> shift) & 2047)
            other[count[key]] = item
            count[key] += 1
        order, other = other, order
        shift += 11
    for i in range(n):
        item = order[i]
        t = tile_of[item]
        length = np.int64(tiles[t, 4]) - tiles[t, 3]
        pieces, piece = _pieces(length, chunk, unit)
        begin = tiles[t, 3] + split_of[item] * piece
        work[i, 0] = tiles[t, 0]
        work[i, 1] = tiles[t, 1]
        work[i, 2] = tiles[t, 2]
        work[i, 3] = begin
        work[i, 4] = begin + length_of[item]
        work[i, 5] = split_of[item]
        work[i, 6] = pieces
        work[i, 7] = slot_of[t]
