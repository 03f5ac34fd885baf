"""The plan: which tile of which request reads which keys, in the one format that every attention backend consumes (docs/internals.md)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.schedulers.checks import check_heads, fail_capacity, fail_sizes, fail_table
from pyinfer.schedulers.lazy import kernels

if TYPE_CHECKING:
    import numpy as np

HEADER_INTS = 16
WORK_FIELDS = ("request", "row_begin", "row_count", "kv_begin", "kv_end", "split", "num_splits", "slot")
SINGLE_SEMAPHORE_BYTES = 65536
PLAN_COUNTER, SINGLE_COUNTER = 14, SINGLE_SEMAPHORE_BYTES // 4 - 2
"""Where two counters of a persistent grid are, zero between launches: int32 words of a plan's header, and of the semaphores of a single request."""


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
    max_pages
        Pages that all requests together may have, if each of them has one query token in every plan; 0: nothing is promised.
    """

    max_work: int
    max_partials: int
    max_batch: int
    max_indices: int = 0
    max_pages: int = 0


class PlanOffsets(NamedTuple):
    """Where the sections of a packed plan begin, in int32 elements (multiples of 4, so 16-byte aligned). kv_indices is -1 when absent."""

    work: int
    qo_indptr: int
    kv_indptr: int
    kv_len: int
    kv_indices: int
    semaphore: int
    total: int


@dataclass(frozen=True, eq=False)
class PlanShape:
    """What a plan is made from besides the batch: it stays while a model is served. Made by `plan_shape`, which returns one object for equal arguments.

    The attributes are those of `AttentionPlan` of the same names; `numbers` is what the planners' kernels take (int64, `_kernels.py` names the places).
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    tile_q: int
    causal: bool
    window_left: int
    capacity: PlanCapacity | None
    numbers: np.ndarray


@functools.lru_cache(maxsize=256)
def plan_shape(
    op: str,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim_qk: int,
    head_dim_vo: int,
    page_size: int,
    tile_q: int,
    tile_kv: int,
    num_sms: int,
    ctas_per_sm: int,
    extra_slots: int,
    causal: bool = False,
    window_left: int = -1,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    capacity: PlanCapacity | None = None,
) -> PlanShape:
    """The `PlanShape` of these arguments, which `decode.decode_plan` describes; splitting may add extra_slots work items for each of the device's slots.

    Raises
    ------
    ValueError
        For head counts that do not divide, or a page size below 0 (0: ragged keys).
    """
    import numpy as np

    check_heads(op, num_qo_heads, num_kv_heads)
    if page_size < 0:
        from pyinfer.core.errors import fail

        fail(op, "page_size", "is no page size", page_size, "1 or more")
    slots = device_slots(num_sms, ctas_per_sm, num_kv_heads)
    if disable_split_kv:
        chunk = 0
    elif fixed_split_size is not None:
        chunk = int(fixed_split_size) * max(page_size, 1)
    else:
        chunk = -1
    bounds = (-1, -1, -1, -1) if capacity is None else capacity[:4]
    numbers = np.array(
        [page_size, num_qo_heads // num_kv_heads, tile_q, tile_kv, slots, extra_slots * slots, causal, window_left, chunk, num_kv_heads, *bounds],
        np.int64,
    )  # fmt: skip
    return PlanShape(
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, tile_q, bool(causal), window_left, capacity, numbers
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """An immutable schedule of one batch. Made by `decode.decode_plan` and `prefill.prefill_plan`; all arrays are read-only views of one int32 buffer.

    Attributes
    ----------
    shape
        Everything but the batch.
    buffer
        The packed plan, see `pack`.
    batch_size, n_work
        Requests; work items.
    num_partials
        Partial results that are merged; 0 if no tile is split.
    kv_chunk
        Upper bound of the kv tokens of one item; 0 if no tile is split.
    total_rows, total_kv
        Query tokens; pages if paged, kv tokens if ragged.
    max_page
        Largest page number in kv_indices, -1 if none is known.
    offsets
        Where the sections of `buffer` begin.
    workspace_bytes, partial_lse_offset
        Bytes the partial results need (exact, 0 if nothing is split); where partial_lse begins among them, behind partial_o.
    other_indices
        Host page numbers that are not in the buffer, or None.
    """

    shape: PlanShape
    buffer: np.ndarray
    batch_size: int
    n_work: int
    num_partials: int
    kv_chunk: int
    total_rows: int
    total_kv: int
    max_page: int
    offsets: PlanOffsets
    workspace_bytes: int
    partial_lse_offset: int
    other_indices: np.ndarray | None = None

    @property
    def work(self) -> np.ndarray:
        """int32 [n_work, 8], longest first; the columns are `WORK_FIELDS`."""
        begin = self.offsets.work
        return self.buffer[begin : begin + 8 * self.n_work].reshape(self.n_work, 8)

    @property
    def qo_indptr(self) -> np.ndarray:
        """int32 [batch + 1]: query tokens."""
        begin = self.offsets.qo_indptr
        return self.buffer[begin : begin + self.batch_size + 1]

    @property
    def kv_indptr(self) -> np.ndarray:
        """int32 [batch + 1]: pages if paged, kv tokens if ragged."""
        begin = self.offsets.kv_indptr
        return self.buffer[begin : begin + self.batch_size + 1]

    @property
    def kv_len(self) -> np.ndarray:
        """int32 [batch]: kv tokens."""
        begin = self.offsets.kv_len
        return self.buffer[begin : begin + self.batch_size]

    @property
    def kv_indices(self) -> np.ndarray | None:
        """int32 page numbers, or None for ragged keys and for indices that live on the device."""
        begin = self.offsets.kv_indices
        return self.buffer[begin : begin + self.total_kv] if begin >= 0 else self.other_indices

    @property
    def num_qo_heads(self) -> int:
        """Query heads."""
        return self.shape.num_qo_heads

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self.shape.num_kv_heads

    @property
    def head_dim_qk(self) -> int:
        """Head dimension of queries and keys."""
        return self.shape.head_dim_qk

    @property
    def head_dim_vo(self) -> int:
        """Head dimension of values and outputs."""
        return self.shape.head_dim_vo

    @property
    def page_size(self) -> int:
        """Tokens a page; 0 for ragged keys."""
        return self.shape.page_size

    @property
    def tile_q(self) -> int:
        """Packed rows (query token x query head of one kv head) a tile holds at most."""
        return self.shape.tile_q

    @property
    def causal(self) -> bool:
        """Whether the tiles' ranges were clipped for the causal mask."""
        return self.shape.causal

    @property
    def window_left(self) -> int:
        """The window that the tiles' ranges were clipped with; -1 is none."""
        return self.shape.window_left

    @property
    def capacity(self) -> PlanCapacity | None:
        """Bounds that fix offsets and grid, or None."""
        return self.shape.capacity

    @property
    def group_size(self) -> int:
        """Query heads that share a kv head."""
        return self.shape.num_qo_heads // self.shape.num_kv_heads

    @property
    def max_work(self) -> int:
        """Work items to launch for: the capacity's bound, or n_work."""
        capacity = self.shape.capacity
        return self.n_work if capacity is None else capacity.max_work

    @property
    def max_partials(self) -> int:
        """Partial slots in the workspace: the capacity's bound, or num_partials."""
        capacity = self.shape.capacity
        return self.num_partials if capacity is None else capacity.max_partials

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
    """Plan checked lengths, of which qo_len may leave requests out (0) that qo_indptr has. `plan_shape` and `decode.decode_plan` describe the parameters."""
    shape = plan_shape(
        op, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size, tile_q, tile_kv, num_sms, ctas_per_sm, extra_slots, causal, window_left,
        fixed_split_size, disable_split_kv, capacity,
    )  # fmt: skip
    k = kernels(8 * len(kv_len))
    given = kv_indptr[:0] if kv_indices is None else kv_indices
    code, counts, offsets, buffer = k.plan_lengths(
        qo_indptr, qo_len, kv_indptr, kv_len, given, kv_indices is not None, shape.numbers
    )
    return _packed(op, shape, code, counts, max_page, offsets, buffer, kv_indices)


def plan_batch(
    op: str,
    shape: PlanShape,
    qo_indptr: np.ndarray,
    kv_indptr: np.ndarray,
    kv_indices: np.ndarray | None,
    last_page_len: np.ndarray | None,
) -> AttentionPlan:
    """Check host metadata, int32 and contiguous, and plan it: what `decode_plan` and `prefill_plan` do once the shape is known.

    Raises
    ------
    ValueError
        For malformed metadata, naming the array, the place and the value, or a plan beyond the shape's capacity.
    """
    kv_arg = "paged_kv_indptr" if shape.page_size else "kv_indptr"
    batch = len(kv_indptr) - 1
    if batch < 0 or len(qo_indptr) != batch + 1 or (last_page_len is not None and len(last_page_len) != batch):
        fail_sizes(op, kv_arg, qo_indptr, kv_indptr, last_page_len)
    given = kv_indptr[:0] if kv_indices is None else kv_indices
    k = kernels(8 * batch + len(given))
    (code, array, where, value), max_page, counts, offsets, buffer = k.plan_batch(
        qo_indptr, kv_indptr, kv_indptr if last_page_len is None else last_page_len, given, kv_indices is not None, shape.numbers
    )  # fmt: skip
    if code != k.OK and code != k.OVER_CAPACITY:
        if array == 0:
            fail_table(op, code, where, value, qo_indptr, None, 0, "qo_indptr")
        fail_table(op, code, where, value, kv_indptr, kv_indices, shape.page_size, kv_arg)
    return _packed(op, shape, code, counts, max_page, offsets, buffer, kv_indices)


def _packed(
    op: str,
    shape: PlanShape,
    code: int,
    counts: tuple[int, ...],
    max_page: int,
    offsets: tuple[int, ...],
    buffer: np.ndarray,
    kv_indices: np.ndarray | None,
) -> AttentionPlan:
    """What a kernel returned, as a plan."""
    if type(counts[0]) is not int:  # interpreted, the kernels give NumPy's integers
        counts, offsets, max_page = tuple(map(int, counts)), tuple(map(int, offsets)), int(max_page)
    batch, n_work, num_partials, chunk, rows, total_kv = counts
    at = PlanOffsets(*offsets)
    capacity = shape.capacity
    if code:
        assert capacity is not None
        pages = total_kv if at.kv_indices >= 0 else -1
        fail_capacity(op, capacity, n_work, num_partials, batch, pages)
    partials = num_partials if capacity is None else capacity.max_partials
    at_lse = lse_bytes = 0
    if partials:
        at_lse, lse_bytes = partial_bytes(partials, shape.num_kv_heads, shape.tile_q, shape.head_dim_vo)
    buffer.flags.writeable = False  # before views are taken: they inherit it
    # A frozen dataclass's own __init__ sets field by field, which takes three times as long.
    plan = object.__new__(AttentionPlan)
    plan.__dict__.update(
        shape=shape, buffer=buffer, batch_size=batch, n_work=n_work, num_partials=num_partials, kv_chunk=chunk, total_rows=rows, total_kv=total_kv,
        max_page=max_page, offsets=at, workspace_bytes=at_lse + lse_bytes, partial_lse_offset=at_lse,
        other_indices=kv_indices if at.kv_indices < 0 else None,
    )  # fmt: skip
    return plan


def device_slots(num_sms: int, ctas_per_sm: int, num_kv_heads: int) -> int:
    """Work items the device runs at a time, each of them once per kv head."""
    return max(num_sms * ctas_per_sm // num_kv_heads, 1)
