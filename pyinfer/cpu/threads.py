"""A persistent thread pool for CPU kernels: one call splits a range of items over the cores and returns when all are done.

Kernels are Numba functions compiled with nogil, so plain threads run them side by side. Numba's own parallel=True is not used: its threading layers
cannot be called from two threads at once (workqueue aborts the process), and it triples compile time.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

from pyinfer.core import imagined

_state = threading.local()  # .busy: this thread is already working for a run()
_lock = threading.Lock()
_tickets: queue.SimpleQueue[_Job] = queue.SimpleQueue()
_workers: list[threading.Thread] = []
_num_threads = 0  # 0: not looked up yet


class _Job:
    """One call of `run`: ranges of items, handed out one by one, first come first served."""

    __slots__ = ("args", "chunk", "done", "error", "finished", "kernel", "lock", "n_chunks", "n_items", "ticket")

    def __init__(self, kernel: Callable[..., Any], n_items: int, chunk: int, args: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self.args = args
        self.n_items = n_items
        self.chunk = chunk
        self.n_chunks = -(-n_items // chunk)
        self.ticket = itertools.count()  # next() is atomic under the GIL (and locked without one)
        self.done = 0
        self.error: BaseException | None = None
        self.lock = threading.Lock()  # guards done and error
        self.finished = threading.Lock()
        self.finished.acquire()

    def work(self) -> None:
        """Take ranges until none is left. Once one has failed the rest are only counted."""
        count = 0
        while (i := next(self.ticket)) < self.n_chunks:
            if self.error is None:
                try:
                    begin = i * self.chunk
                    self.kernel(begin, min(begin + self.chunk, self.n_items), *self.args)
                except BaseException as error:
                    with self.lock:
                        self.error = self.error or error
            count += 1
        if count:
            with self.lock:
                self.done += count
                last = self.done == self.n_chunks
            if last:
                self.args = ()  # a ticket still queued must not keep the caller's arrays alive
                self.finished.release()


def _serve(tickets: queue.SimpleQueue[_Job | None]) -> None:
    _state.busy = True
    while (job := tickets.get()) is not None:
        job.work()
        del job


def get_num_threads() -> int:
    """The number of threads CPU kernels use, the calling one included.

    `PYINFER_NUM_THREADS` if set when first asked, else the number of cores in this process's affinity mask.

    Raises
    ------
    ValueError
        If PYINFER_NUM_THREADS is no positive integer.
    """
    global _num_threads
    if _num_threads == 0:
        text = os.environ.get("PYINFER_NUM_THREADS", "").strip()
        if text:
            if not text.isdecimal() or int(text) < 1:
                from pyinfer.core.errors import fail

                fail(
                    "pyinfer",
                    "PYINFER_NUM_THREADS",
                    "is no positive integer",
                    repr(text),
                    "a number of threads, 1 or more",
                )
            _num_threads = int(text)
        elif hasattr(os, "sched_getaffinity"):
            _num_threads = len(os.sched_getaffinity(0))
        else:
            _num_threads = os.cpu_count() or 1
    return _num_threads


def set_num_threads(n: int) -> None:
    """Use `n` threads from the next call on (1: everything runs in the calling thread).

    Raises
    ------
    ValueError
        If n < 1.
    """
    global _num_threads
    if n < 1:
        from pyinfer.core.errors import fail

        fail("set_num_threads", "n", "is too small", n, "1 or more")
    _num_threads = int(n)


def _ensure_workers(n: int) -> None:
    if len(_workers) >= n:
        return
    with _lock:
        while len(_workers) < n:
            worker = threading.Thread(target=_serve, args=(_tickets,), name=f"pyinfer-cpu-{len(_workers)}", daemon=True)
            worker.start()
            _workers.append(worker)


def run(kernel: Callable[..., Any], n_items: int, *args: Any, grain: int = 1, chunk: int | None = None) -> None:
    """Call `kernel(begin, end, *args)` over ranges that together cover range(n_items), on several threads.

    Ranges are taken in ascending order by whichever thread is free, the calling thread among them; so items sorted longest first balance well. The
    result must not depend on how items are grouped or on who runs them. Small work runs inline, and so does a call made from within a kernel's thread.

    Parameters
    ----------
    kernel
        A nogil function of (begin, end, *args).
    n_items
        Number of items; 0 calls nothing.
    args
        Passed on to every call.
    grain
        The fewest items worth giving to a thread: below 2*grain items the whole runs inline. Waking a thread costs some 20 us.
    chunk
        Items a thread takes at a time; by default a quarter of an even share, at least `grain`. Use 1 for few, uneven items.

    Raises
    ------
    BaseException
        The first exception a kernel raised, after all ranges in progress have ended; ranges not yet begun are dropped.
    """
    if n_items <= 0:
        return
    imagined.reached()
    threads = _num_threads or get_num_threads()
    if threads == 1 or n_items < 2 * grain or n_items == 1 or getattr(_state, "busy", False):
        kernel(0, n_items, *args)
        return
    if chunk is None:
        chunk = max(grain, -(-n_items // (4 * threads)))
    job = _Job(kernel, n_items, chunk, args)
    helpers = min(threads, job.n_chunks) - 1
    _ensure_workers(helpers)
    for _ in range(helpers):
        _tickets.put(job)
    _state.busy = True  # a kernel that itself calls run() must not wait for this pool
    try:
        job.work()
    finally:
        _state.busy = False
    try:
        job.finished.acquire()
    except BaseException as error:  # KeyboardInterrupt while waiting: let nobody begin another range
        job.error = job.error or error
        raise
    if job.error is not None:
        try:
            raise job.error
        finally:
            job.error = None  # break the cycle job -> traceback -> frame -> job


def _after_fork_in_child() -> None:
    """Threads do not survive a fork: forget them, and the locks they may have held."""
    global _lock, _tickets
    _lock = threading.Lock()
    _tickets = queue.SimpleQueue()
    _workers.clear()
    _state.busy = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
