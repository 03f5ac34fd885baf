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

# What the kernels that check return first.
OK, BAD_START, NOT_MONOTONE, BAD_LAST_PAGE, TOO_FEW_INDICES, NEGATIVE_PAGE, TOO_LONG, OVER_CAPACITY = range(8)

# The places in `numbers`, an int64 array of what stays from plan to plan (`plan.PlanShape`). CHUNK: < 0 choose, 0 never split, > 0 exactly
# that many tokens; EXTRA: work items that splitting may add; MAX_*: the capacity, -1 all of them without one.
(
    PAGE_SIZE, GROUP, TILE_Q, TILE_KV, SLOTS, EXTRA, CAUSAL, WINDOW_LEFT, CHUNK, KV_HEADS, MAX_WORK, MAX_PARTIALS, MAX_BATCH, MAX_INDICES,
) = range(14)  # fmt: skip
HEADER_INTS = 16  # as in plan.py

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
def lengths_fit(qo_indptr, kv_indptr, kv_len, indices, has_indices, page_size):
    """The largest page that a batch of given lengths uses, -1 if none is known; -2 if its metadata are malformed in any way.

    There may be more pages than a length needs: what stands behind those is not looked at.
    """
    batch = len(kv_len)
    if len(qo_indptr) != batch + 1 or len(kv_indptr) != batch + 1 or qo_indptr[0] != 0 or kv_indptr[0] != 0:
        return np.int64(-2)
    for b in range(batch):
        pages = np.int64(kv_indptr[b + 1]) - np.int64(kv_indptr[b])
        if qo_indptr[b + 1] < qo_indptr[b] or pages < 0 or kv_len[b] < 0 or kv_len[b] > pages * page_size:
            return np.int64(-2)
    highest = np.int64(-1)
    if has_indices:
        if len(indices) < kv_indptr[batch]:
            return np.int64(-2)
        lowest = np.int64(0)
        for b in range(batch):
            begin = np.int64(kv_indptr[b])
            for page in indices[begin : begin + _ceil_div(np.int64(kv_len[b]), page_size)]:
                lowest = min(lowest, np.int64(page))
                highest = max(highest, np.int64(page))
        if lowest < 0:
            return np.int64(-2)
    return highest


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
def _ceil_div(a, b):
    """ceil(a / b) of integers below 2^31, b > 0, by way of doubles: several times faster than a 64-bit integer division, and exact.

    (A quotient that is no integer lies at least 1 / b away from one, 2^-31 of its size, where doubles have 53 bits.)
    """
    return np.int64((a + b - 1) / np.float64(b))


@kernel(fastmath=False)
def _floor_div(a, b):
    """a // b, likewise."""
    return np.int64(a / np.float64(b))


@kernel(fastmath=False)
def _pieces(length, chunk, unit):
    """(number of pieces, tokens a piece) for a tile of `length` tokens under a chunk limit: pieces of one size, rounded up to `unit`."""
    if chunk == 0 or length <= chunk:
        return np.int64(1), np.int64(length)
    n = _ceil_div(length, chunk)
    if unit == 0:  # a fixed split: pieces are exactly `chunk`, so that bits do not depend on the batch
        return n, np.int64(chunk)
    piece = _ceil_div(_ceil_div(length, n), unit) * unit
    return _ceil_div(length, piece), piece


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
            first, last = _floor_div(row, group), _floor_div(row + count - 1, group)
            begin, end = visible_range(first, last + 1, qo_len[b], kv_len[b], causal, window_left)
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
def _round4(n):
    return (n + 3) & -4


@kernel(fastmath=False)
def plan_lengths(qo_indptr, qo_len, kv_indptr, kv_len, indices, has_indices, numbers):
    """Plan checked lengths: cut, choose the split, write the packed plan. qo_len may leave requests out (0) that qo_indptr has.

    Returns
    -------
    code
        OK, or OVER_CAPACITY: then the plan is empty, but its counts are there.
    counts
        (batch, work items, partials, chunk, query tokens, last entry of kv_indptr).
    offsets
        The sections' begins and the end, as `plan.PlanOffsets`.
    buffer
        The packed plan, int32: header, work, qo_indptr, kv_indptr, kv_len, page indices (with has_indices, unless a capacity keeps them elsewhere),
        semaphores. What a section has no values for is zero.
    """
    batch = len(kv_len)
    chunk, unit, n_work, num_partials, tiles = measure(
        qo_len,
        kv_len,
        numbers[GROUP],
        numbers[TILE_Q],
        numbers[TILE_KV],
        numbers[SLOTS],
        numbers[EXTRA],
        numbers[CAUSAL] != 0,
        numbers[WINDOW_LEFT],
        numbers[CHUNK],
    )
    pages = np.int64(kv_indptr[batch])
    n_indices = pages if has_indices and numbers[MAX_INDICES] != 0 else np.int64(-1)
    room_work, room_batch, room_indices, semaphores = n_work, np.int64(batch), n_indices, num_partials
    code = OK
    if numbers[MAX_WORK] >= 0:
        room_work, room_batch, semaphores = numbers[MAX_WORK], numbers[MAX_BATCH], numbers[MAX_PARTIALS]
        if n_indices >= 0:
            room_indices = numbers[MAX_INDICES]
        if n_work > room_work or batch > room_batch or num_partials > semaphores or n_indices > room_indices:
            code = OVER_CAPACITY
    at_work = np.int64(HEADER_INTS)
    at_qo = at_work + 8 * room_work
    at_kv = at_qo + _round4(room_batch + 1)
    at_len = at_kv + _round4(room_batch + 1)
    at_indices = at_len + _round4(room_batch)
    at_semaphore = at_indices + _round4(max(room_indices, np.int64(0)))
    total = at_semaphore + _round4(semaphores * numbers[KV_HEADS])
    offsets = (at_work, at_qo, at_kv, at_len, at_indices if n_indices >= 0 else np.int64(-1), at_semaphore, total)
    counts = (np.int64(batch), n_work, num_partials, chunk, np.int64(qo_indptr[batch]), pages)
    if code != OK:
        return code, counts, offsets, np.empty(0, np.int32)
    buffer = np.empty(total, np.int32)
    buffer[:at_work] = 0
    buffer[0] = n_work
    buffer[1] = num_partials
    buffer[2] = batch
    end = at_work + 8 * n_work
    emit(tiles, chunk, unit, buffer[at_work:end].reshape(n_work, 8))
    buffer[end:at_qo] = 0
    _put(buffer, at_qo, at_kv, qo_indptr, batch + 1)
    _put(buffer, at_kv, at_len, kv_indptr, batch + 1)
    _put(buffer, at_len, at_indices, kv_len, batch)
    _put(buffer, at_indices, at_semaphore, indices, max(n_indices, np.int64(0)))
    buffer[at_semaphore:] = 0
    return code, counts, offsets, buffer


@kernel(fastmath=False)
def plan_batch(qo_indptr, kv_indptr, last_page_len, indices, has_indices, numbers):
    """Check a batch's host metadata and plan it, in one call: `plan_lengths` of a paged or, with page size 0, ragged batch.

    Returns (code, array, where, value), max_page and the rest as `plan_lengths`; for a code that is neither OK nor OVER_CAPACITY, `array` says
    which one is wrong (0: qo_indptr, 1: the keys').
    """
    batch = len(kv_indptr) - 1
    qo_len = np.empty(batch, np.int32)
    kv_len = np.empty(batch, np.int32)
    array = 0
    max_page = np.int64(-1)
    code, where, value = check_indptr(qo_indptr, qo_len)
    if code == OK:
        array = 1
        if numbers[PAGE_SIZE] > 0:
            code, where, value, max_page = check_page_table(
                kv_indptr, last_page_len, indices, numbers[PAGE_SIZE], kv_len
            )
            if code == TOO_FEW_INDICES and not has_indices:
                code = OK
        else:
            code, where, value = check_indptr(kv_indptr, kv_len)
    none = np.int64(0)
    if code != OK:
        empty = (none, none, none, none, none, none)
        return (code, array, where, value), max_page, empty, (none, *empty), np.empty(0, np.int32)
    code, counts, offsets, buffer = plan_lengths(qo_indptr, qo_len, kv_indptr, kv_len, indices, has_indices, numbers)
    return (code, array, where, value), max_page, counts, offsets, buffer


@kernel(fastmath=False)
def _put(buffer, begin, end, values, count):
    """Copy values[:count] to buffer[begin:] and zero the rest up to `end`.

    Counting from 0 in a slice: an index that might be negative, as any sum may, keeps the loop from being vectorised (20 us for 65,536 pages, not 5).
    """
    section = buffer[begin:end]
    for i in range(count):
        section[i] = values[i]
    for i in range(count, len(section)):
        section[i] = 0


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
    previous = np.int64(2147483647)
    sorted_already = True
    for t in range(len(tiles)):
        length = np.int64(tiles[t, 4]) - tiles[t, 3]
        pieces, piece = _pieces(length, chunk, unit)
        slot_of[t] = slot if pieces > 1 else 0
        for s in range(pieces):
            tile_of[i] = t
            split_of[i] = s
            part = min(piece, length - s * piece)
            length_of[i] = part
            longest = max(longest, part)
            sorted_already = sorted_already and part <= previous
            previous = part
            i += 1
        if pieces > 1:
            slot += pieces
    order = np.empty(n, np.int32)
    for i in range(n):
        order[i] = i
    if not sorted_already:
        other = np.empty(n, np.int32)
        bits = (
            6 if n < 128 else 8 if n < 512 else 11
        )  # clearing and summing the counts is most of the work for few items
        buckets = 1 << bits
        count = np.empty(buckets + 1, np.int64)
        shift = 0
        while (longest >> shift) > 0:
            count[:] = 0
            for i in range(n):
                count[buckets - ((length_of[i] >> shift) & (buckets - 1))] += 1  # descending keys, counted one place up
            for d in range(1, buckets + 1):
                count[d] += count[d - 1]
            for i in range(n):
                item = order[i]
                key = buckets - 1 - ((length_of[item] >> shift) & (buckets - 1))
                other[count[key]] = item
                count[key] += 1
            order, other = other, order
            shift += bits
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
