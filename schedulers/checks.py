"""What is wrong with a batch's host metadata, in words: the checks of the planners, whose loops are in `_kernels.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyinfer.schedulers.lazy import kernels

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.schedulers.plan import PlanCapacity


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

    if page_size < 1:
        fail(op, "page_size", "is no page size", page_size, "1 or more")
    check_indptr_size(op, "paged_kv_indptr", indptr)
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
        fail_table(op, code, where, value, indptr, indices, page_size)
    return kv_len, max_page


def check_indptr_size(op: str, arg: str, indptr: np.ndarray) -> None:
    """ValueError for a row pointer without its first entry."""
    from pyinfer.core.errors import fail

    if len(indptr) < 1:
        fail(op, arg, "is empty", "0 entries", "batch_size + 1 entries")


def fail_table(
    op: str,
    code: int,
    where: int,
    value: int,
    indptr: np.ndarray,
    indices: Any,
    page_size: int,
    arg: str = "paged_kv_indptr",
) -> None:
    """Say what a kernel's code means: the array, the place and the value."""
    from pyinfer.core.errors import fail

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

    check_indptr_size(op, arg, indptr)
    k = kernels(len(indptr))
    out = np.empty(len(indptr) - 1, np.int32)
    code, where, value = k.check_indptr(indptr, out)
    if code != k.OK:
        fail_table(op, code, where, value, indptr, None, 0, arg)
    return out


def fail_sizes(
    op: str, kv_arg: str, qo_indptr: np.ndarray, kv_indptr: np.ndarray, last_page_len: np.ndarray | None
) -> None:
    """Say which of the arrays has a length that the others' do not go with."""
    from pyinfer.core.errors import fail

    check_indptr_size(op, "qo_indptr", qo_indptr)
    check_indptr_size(op, kv_arg, kv_indptr)
    rows = len(kv_indptr)
    if last_page_len is not None and len(last_page_len) != rows - 1:
        arg = "paged_kv_last_page_len"
        fail(op, arg, "has the wrong length", len(last_page_len), f"{rows - 1} (paged_kv_indptr has {rows} entries)")
    fail(op, "qo_indptr", "has the wrong length", len(qo_indptr), f"{rows} (as {kv_arg})")


def fail_capacity(op: str, capacity: PlanCapacity, n_work: int, num_partials: int, batch: int, n_indices: int) -> None:
    """Say which of the counts the capacity has no room for."""
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
