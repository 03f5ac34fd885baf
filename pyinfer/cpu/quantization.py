"""Booleans into bits on the CPU."""

from __future__ import annotations

import numpy as np

from pyinfer.cpu import threads
from pyinfer.cpu.compile import kernel


@kernel
def _pack_segments(begin, end, x, indptr, byte_indptr, out, big):
    """Segments [begin, end): x[indptr[b]:indptr[b + 1]] to out[byte_indptr[b]:byte_indptr[b + 1]]."""
    for b in range(begin, end):
        last = indptr[b + 1]
        for i in range(byte_indptr[b + 1] - byte_indptr[b]):
            first = indptr[b] + i * 8
            byte = 0
            for j in range(min(8, last - first)):
                if x[first + j] != 0:
                    byte |= 1 << (7 - j if big else j)
            out[byte_indptr[b] + i] = byte


def pack_segments(x: np.ndarray, indptr: np.ndarray, byte_indptr: np.ndarray, out: np.ndarray, big: bool) -> None:
    """Pack every segment of x (bool or uint8) into whole bytes.

    Parameters
    ----------
    indptr, byte_indptr
        int64 [batch + 1] into x and out.
    """
    threads.run(_pack_segments, len(indptr) - 1, x.view(np.uint8), indptr, byte_indptr, out, big)
