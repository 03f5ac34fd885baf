"""Which checks of the package raised during a test run, by source line: tests/test_zz_error_sites.py asks at the end."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import NamedTuple

from pyinfer.core import errors

ROOT = Path(errors.__file__).resolve().parent.parent
CHECKS = (
    "check_dtype",
    "check_same_dtype",
    "check_ndim",
    "check_shape",
    "check_same_device",
    "check_last_dim_contiguous",
)
raised: set[tuple[str, int]] = set()  # file, line
_message = errors.message


def _noting_message(*args: object, **kwargs: object) -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename == errors.__file__:
        frame = frame.f_back  # type: ignore[assignment]
    raised.add((frame.f_code.co_filename, frame.f_lineno))
    return _message(*args, **kwargs)  # type: ignore[arg-type]


def install() -> None:
    """Note from now on where messages are made."""
    errors.message = _noting_message


class Site(NamedTuple):
    """A call that raises, or may."""

    path: Path
    first: int
    last: int
    name: str
    text: str

    @property
    def was_raised(self) -> bool:
        """Whether this run saw it."""
        return any((str(self.path), line) in raised for line in range(self.first, self.last + 1))

    def __str__(self) -> str:
        return f"{self.path.name}:{self.first} {self.name}({self.text})"


def sites(path: Path, names: tuple[str, ...] = ("fail", "fail_type", *CHECKS)) -> list[Site]:
    """The calls of these functions in a file, with their argument and message."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            text = ", ".join(ast.unparse(a) for a in node.args[1:3])
            found.append(Site(path, node.lineno, node.end_lineno or node.lineno, node.func.id, text))
    return found
