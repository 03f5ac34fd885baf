"""Printing: sizes, tables and a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TextIO


def human_bytes(n: float) -> str:
    """1536 → '1.5 KB'."""
    for unit in ("B", "KB", "MB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GB"


def plural(n: int, noun: str) -> str:
    """'1 kernel', '2 kernels'; 'entry' becomes 'entries'."""
    if n == 1:
        return f"1 {noun}"
    return f"{n} {noun[:-1]}ies" if noun.endswith("y") else f"{n} {noun}s"


def table(rows: Sequence[Sequence[object]], header: Sequence[str], right: str = "") -> str:
    """Rows as aligned columns.

    Parameters
    ----------
    rows
        Cells, printed with str().
    header
        Column titles.
    right
        One character a column, 'r' for right-aligned; missing ones are left-aligned.
    """
    cells = [[str(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    align = [">" if right[i : i + 1] == "r" else "<" for i in range(len(header))]
    return "\n".join(
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, align, widths, strict=True)).rstrip() for row in cells
    )


class Progress:
    """A progress bar on a terminal, a line now and then elsewhere.

    Parameters
    ----------
    total
        Number of steps.
    what
        Shown in front of the bar.
    stream
        Where to print; default stderr, so that stdout stays clean for output.
    """

    def __init__(self, total: int, what: str, stream: TextIO | None = None) -> None:
        self.total = total
        self.what = what
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.start = time.perf_counter()
        self._printed = 0.0

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are over; `note` says what the last one was."""
        now = time.perf_counter()
        last = done >= self.total
        if not last and now - self._printed < (0.05 if self.live else 5.0):
            return
        self._printed = now
        seconds = now - self.start
        left = f", {seconds / done * (self.total - done):.0f} s left" if 0 < done < self.total else ""
        if self.live:
            import shutil

            full = 24 * done // max(self.total, 1)
            line = f"{self.what} [{'█' * full}{'·' * (24 - full)}] {done}/{self.total} {seconds:.1f} s{left}  {note}"
            print(
                f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}",
                end="\n" if last else "",
                file=self.stream,
                flush=True,
            )
        else:
            print(f"{self.what}: {done}/{self.total}, {seconds:.1f} s{left}", file=self.stream, flush=True)
