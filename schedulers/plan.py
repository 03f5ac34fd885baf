"""The plan: which tile of which request reads which keys, in the one format that every attention backend consumes (docs/internals.md)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

HEADER_INTS = 16
WORK_FIELDS = ("request", "row_begin", "row_count", "kv_begin", "kv_end", "split", "num_splits", "slot")
SINGLE_SEMAPHORE_BYTES = 65536


class PlanCapacity(NamedTuple):
    """What a plan may grow to without moving a section of its buffer or changing the grid (CUDA graphs).

    Attributes
    ----------
    max_work
        Work items.
    max_partials
        Partial slots.
    max_batch
        Requests.
    max_indices
        Page indices kept in the buffer; 0 where they lie elsewhere.
    """

    max_work: int
    max_partials: int
    max_batch: int
    max_indices: int = 0


class PlanOffsets(NamedTuple):
    """Where the sections of a packed plan begin, in int32 elements (multiples of 4, so 16-byte aligned). kv_indices is -1 when absent."""

    work: int
    qo_indptr: int
    kv_indptr: int
    kv_len: int
    kv_indices: int
    semaphore: int
    total: int


def _round4(n: int) -> int:
    return (n + 3) & -4


@functools.lru_cache(maxsize=64)
def plan_offsets(work: int, batch: int, indices: int, semaphores: int) -> PlanOffsets:
    """Sections of a packed plan for these counts (indices < 0: no such section)."""
    at_work = HEADER_INTS
    at_qo = at_work + 8 * work
    at_kv = at_qo + _round4(batch + 1)
    at_len = at_kv + _round4(batch + 1)
    at_indices = at_len + _round4(batch)
    at_semaphore = at_indices + _round4(max(indices, 0))
    return PlanOffsets(
        at_work,
        at_qo,
        at_kv,
        at_len,
        at_indices if indices >= 0 else -1,
        at_semaphore,
        at_semaphore + _round4(semaphores),
    )


@dataclass(frozen=True, eq=False, slots=True)
class AttentionPlan:
    """An immutable schedule of one batch. Made by `decode.decode_plan` and `prefill.prefill_plan`; all arrays are views of one int32 buffer.

    Attributes
    ----------
    work
        int32 [n_work, 8], longest first; the columns are `WORK_FIELDS`.
    qo_indptr, kv_indptr
        int32 [batch + 1]: query tokens; pages if paged, kv tokens if ragged.
    kv_len
        int32 [batch]: kv tokens.
    kv_indices
        int32 page numbers, or None for ragged keys and for indices that live on the device.
    page_size
        Tokens a page; 0 for ragged keys.
    tile_q
        Packed rows (query token x query head of one kv head) a tile holds at most.
    kv_chunk
        Upper bound of the kv tokens of one item; 0 if no tile is split.
    num_partials
        Partial results that are merged; 0 if no tile is split.
    causal, window_left
        The mask the tiles' ranges were clipped with; window_left -1 is none.
    capacity
        Bounds that fix offsets and grid, or None.
    max_page
        Largest page number in kv_indices, -1 if none is known.
    """

    buffer: np.ndarray
    work: np.ndarray
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    kv_len: np.ndarray
    kv_indices: np.ndarray | None
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    tile_q: int
    kv_chunk: int
    num_partials: int
    causal: bool
    window_left: int
    capacity: PlanCapacity | None
    offsets: PlanOffsets
    max_page: int

    @property
    def batch_size(self) -> int:
        """Requests in the batch."""
        return len(self.kv_len)

    @property
    def n_work(self) -> int:
        """Work items."""
        return len(self.work)

    @property
    def total_rows(self) -> int:
        """Query tokens in the batch."""
        return int(self.qo_indptr[-1])

    @property
    def group_size(self) -> int:
        """Query heads that share a kv head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def max_work(self) -> int:
        """Work items to launch for: the capacity's bound, or n_work."""
        return self.capacity.max_work if self.capacity else len(self.work)

    @property
    def max_partials(self) -> int:
        """Partial slots in the workspace: the capacity's bound, or num_partials."""
        return self.capacity.max_partials if self.capacity else self.num_partials

    @property
    def partial_lse_offset(self) -> int:
        """Byte offset of partial_lse in the workspace (partial_o begins it)."""
        return partial_bytes(self.max_partials, self.num_kv_heads, self.tile_q, self.head_dim_vo)[0]

    @property
    def workspace_bytes(self) -> int:
        """Bytes the partial results need: exact, 0 if nothing is split."""
        return sum(partial_bytes(self.max_partials, self.num_kv_heads, self.tile_q, self.head_dim_vo))

    def pack(self) -> np.ndarray:
        """The int32 buffer as the device takes it: header, work, qo_indptr, kv_indptr, kv_len, kv_indices, semaphores (zero). Not a copy."""
        return self.buffer

    def copy_into(self, buffer: Any) -> None:
        """Copy the packed plan into the front of an int32 tensor of any framework, on its current stream if it lies on a GPU.

        Raises
        ------
        TypeError, ValueError
            If `buffer` is not int32, not contiguous, or holds fewer than `offsets.total` elements.
        """
        from pyinfer.core.dtypes import INT32
        from pyinfer.core.errors import check_dtype, check_ndim, fail
        from pyinfer.core.tensor import as_numpy, current_stream, view

        op = "AttentionPlan.copy_into"
        v = view(buffer, op, "buffer")
        check_dtype(op, "buffer", v, (INT32,))
        check_ndim(op, "buffer", v, 1)
        if not v.is_contiguous():
            fail(op, "buffer", "is not contiguous", f"strides {tuple(v.strides)}", "a contiguous tensor")
        if v.size < self.buffer.size:
            wanted = f"at least {self.buffer.size} (plan.offsets.total)"
            fail(op, "buffer", "is too small", f"{v.size} int32", wanted)
        if v.device < 0:
            as_numpy(v)[: self.buffer.size] = self.buffer
            return
        import cupy

        runtime = cupy.cuda.runtime
        with cupy.cuda.Device(v.device):  # from pageable memory: staged by the driver before the call returns
            nbytes, data = self.buffer.nbytes, self.buffer.ctypes.data
            runtime.memcpyAsync(v.ptr, data, nbytes, runtime.memcpyHostToDevice, current_stream(v))

    def __repr__(self) -> str:
        kind = f"page_size={self.page_size}" if self.page_size else "ragged"
        return (
            f"AttentionPlan(batch={self.batch_size}, rows={self.total_rows}, heads={self.num_qo_heads}/{self.num_kv_heads}, "
            f"dims={self.head_dim_qk}/{self.head_dim_vo}, {kind}, tile_q={self.tile_q}, n_work={self.n_work}, kv_chunk={self.kv_chunk}, "
            f"num_partials={self.num_partials}, workspace_bytes={self.workspace_bytes})"
        )


def partial_bytes(partials: int, num_kv_heads: int, tile_q: int, head_dim_vo: int) -> tuple[int, int]:
    """Bytes of partial_o (rounded up to 16) and of partial_lse."""
    rows = partials * num_kv_heads * tile_q
    return (4 * rows * head_dim_vo + 15) & -16, 4 * rows


def check_heads(op: str, num_qo_heads: int, num_kv_heads: int) -> None:
    """ValueError unless the query heads are a positive multiple of the kv heads."""
    from pyinfer.core.errors import fail

    if num_kv_heads < 1 or num_qo_heads < 1:
        arg, got = ("num_kv_heads", num_kv_heads) if num_kv_heads < 1 else ("num_qo_heads", num_qo_heads)
        fail(op, arg, "is no head count", got, "1 or more")
    if num_qo_heads % num_kv_heads:
        fail(
            op,
            "num_qo_heads",
            "does not divide among the kv heads",
            f"{num_qo_heads} query heads, {num_kv_heads} kv heads",
            "a multiple of num_kv_heads",
        )


def page_table(
    op: str, indptr: np.ndarray, last_page_len: np.ndarray, indices: np.ndarray | None, page_size: int
) -> tuple[np.ndarray, int]:
    """Check a host page table and work out the lengths.

    Parameters
    ----------
    indptr, last_page_len, indices
        int32 [batch + 1], [batch], [at least indptr[-1]]. indices None: they are on the device and not checked.
    page_size
        Tokens a page.

    Returns
    -------
    kv_len
        int32 [batch].
    max_page
        The largest page number, -1 if there is none.

    Raises
    ------
    ValueError
        Naming the array, the place and the value. An empty page range makes an empty request, whatever its last_page_len in 0..page_size.
    """
    import numpy as np

    from pyinfer.core.errors import fail
    from pyinfer.schedulers.lazy import kernels

    if page_size < 1:
        fail(op, "page_size", "is no page size", page_size, "1 or more")
    _check_indptr_size(op, "paged_kv_indptr", indptr)
    batch = len(indptr) - 1
    if len(last_page_len) != batch:
        fail(
            op,
            "paged_kv_last_page_len",
            "has the wrong length",
            len(last_page_len),
            f"{batch} (paged_kv_indptr has {batch + 1} entries)",
        )
    kv_len = np.empty(batch, np.int32)
    k = kernels(batch + (0 if indices is None else len(indices)))
    code, where, value, max_page = k.check_page_table(
        indptr, last_page_len, indptr[:0] if indices is None else indices, page_size, kv_len
    )
    if code == k.TOO_FEW_INDICES and indices is None:
        code = k.OK
    if code != k.OK:
        _fail_table(op, code, where, value, indptr, indices, page_size)
    return kv_len, max_page


def _check_indptr_size(op: str, arg: str, indptr: np.ndarray) -> None:
    from pyinfer.core.errors import fail

    if len(indptr) < 1:
        fail(op, arg, "is empty", "0 entries", "batch_size + 1 entries")


def _fail_table(
    op: str,
    code: int,
    where: int,
    value: int,
    indptr: np.ndarray,
    indices: Any,
    page_size: int,
    arg: str = "paged_kv_indptr",
) -> None:
    from pyinfer.core.errors import fail
    from pyinfer.schedulers.lazy import kernels

    k = kernels()
    if code == k.BAD_START:
        fail(op, arg, "does not start at 0", value, 0)
    if code == k.NOT_MONOTONE:
        fail(
            op,
            arg,
            "decreases",
            f"{value} at entry {where} after {int(indptr[where - 1])}",
            "a non-decreasing sequence",
        )
    if code == k.BAD_LAST_PAGE:
        pages = int(indptr[where + 1]) - int(indptr[where])
        wanted = f"1..{page_size}" if pages else f"0..{page_size}"
        fail(
            op,
            "paged_kv_last_page_len",
            "is out of range",
            f"{value} for request {where} ({pages} pages)",
            f"{wanted} (page_size {page_size})",
        )
    if code == k.TOO_FEW_INDICES:
        fail(op, "paged_kv_indices", "is too short", len(indices), f"at least {value} (paged_kv_indptr[-1])")
    if code == k.NEGATIVE_PAGE:
        fail(op, "paged_kv_indices", "holds a negative page", f"{value} at entry {where}", "0 or more")
    fail(op, arg, "makes a request too long", f"{value} tokens in request {where}", "at most 2147483647")


def lengths(op: str, arg: str, indptr: np.ndarray) -> np.ndarray:
    """The differences of a host CSR row pointer, checked (ValueError naming `arg`)."""
    import numpy as np

    from pyinfer.schedulers.lazy import kernels

    _check_indptr_size(op, arg, indptr)
    k = kernels(len(indptr))
    out = np.empty(len(indptr) - 1, np.int32)
    code, where, value = k.check_indptr(indptr, out)
    if code != k.OK:
        _fail_table(op, code, where, value, indptr, None, 0, arg)
    return out


def build_plan(
    op: str,
    qo_indptr: np.ndarray,
    qo_len: np.ndarray,
    kv_indptr: np.ndarray,
    kv_len: np.ndarray,
    kv_indices: np.ndarray | None,
    *,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    page_size: int,
    tile_q: int,
    tile_kv: int,
    num_sms: int,
    ctas_per_sm: int,
    causal: bool,
    window_left: int,
    fixed_split_size: int | None,
    disable_split_kv: bool,
    extra_slots: int,
    capacity: PlanCapacity | None,
    max_page: int,
) -> AttentionPlan:
    """Plan a checked batch: the common part of `decode_plan` and `prefill_plan`, whose docstrings describe the parameters."""
    import numpy as np

    from pyinfer.schedulers.lazy import kernels

    k = kernels(8 * len(kv_len))
    slots = device_slots(num_sms, ctas_per_sm, num_kv_heads)
    if disable_split_kv:
        chunk = 0
    elif fixed_split_size is not None:
        chunk = int(fixed_split_size) * max(page_size, 1)
    else:
        chunk = -1
    batch = len(kv_len)
    chunk, unit, n_work, num_partials, tiles = k.measure(
        qo_len,
        kv_len,
        num_qo_heads // num_kv_heads,
        tile_q,
        tile_kv,
        slots,
        extra_slots * slots,
        causal,
        window_left,
        chunk,
    )
    if capacity is None:
        n_indices = -1 if kv_indices is None else int(kv_indptr[-1])
        offsets = plan_offsets(n_work, batch, n_indices, num_partials * num_kv_heads)
    else:
        n_indices = -1 if kv_indices is None or capacity.max_indices == 0 else int(kv_indptr[-1])
        _check_capacity(op, capacity, n_work, num_partials, batch, n_indices)
        offsets = plan_offsets(
            capacity.max_work,
            capacity.max_batch,
            capacity.max_indices if n_indices >= 0 else -1,
            capacity.max_partials * num_kv_heads,
        )
    buffer = np.empty(offsets.total, np.int32)
    end = offsets.work + 8 * n_work
    at_indices = offsets.kv_indices if n_indices >= 0 else offsets.semaphore
    sections = (
        offsets.work,
        offsets.qo_indptr,
        offsets.kv_indptr,
        offsets.kv_len,
        at_indices,
        offsets.semaphore,
        offsets.total,
    )
    packed_indices = kv_indptr[:0] if kv_indices is None or n_indices < 0 else kv_indices
    k.assemble(buffer, sections, n_work, num_partials, tiles, chunk, unit, qo_indptr, kv_indptr, kv_len, packed_indices)
    buffer.flags.writeable = False  # before the views are taken: they inherit it
    if n_indices >= 0:
        kv_indices = buffer[offsets.kv_indices : offsets.kv_indices + n_indices]
    return AttentionPlan(
        buffer, buffer[offsets.work : end].reshape(n_work, 8), buffer[offsets.qo_indptr : offsets.qo_indptr + batch + 1],
        buffer[offsets.kv_indptr : offsets.kv_indptr + batch + 1], buffer[offsets.kv_len : offsets.kv_len + batch], kv_indices,
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, tile_q, chunk, num_partials, causal, window_left, capacity, offsets, max_page,
    )  # fmt: skip


def device_slots(num_sms: int, ctas_per_sm: int, num_kv_heads: int) -> int:
    """Work items the device runs at a time, each of them once per kv head."""
    return max(num_sms * ctas_per_sm // num_kv_heads, 1)


def _check_capacity(
    op: str, capacity: PlanCapacity, n_work: int, num_partials: int, batch: int, n_indices: int
) -> None:
    from pyinfer.core.errors import fail

    for name, got in (
        ("max_batch", batch),
        ("max_work", n_work),
        ("max_partials", num_partials),
        ("max_indices", n_indices),
    ):
        limit = getattr(capacity, name)
        if got > limit:
            fail(
                op,
                name.replace("max_", "plan's "),
                "outgrows the plan's capacity",
                got,
                f"at most {limit} (capacity.{name})",
                "The capacity is fixed by the first plan; make a new wrapper with larger buffers.",
            )
