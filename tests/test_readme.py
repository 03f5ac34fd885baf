"""What README.md says runs, runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import pyinfer

pytestmark = pytest.mark.cpu

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(code.strip().splitlines()) <= 20
    expected = re.search(r"print\(.*\)  # (.*)", code)
    assert expected is not None
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == expected.group(1)


def test_operator_table_names_every_family():
    """Every family has its row, and what a row names exists in that family."""
    table = README.split("## Operators")[1].split("\nAttention takes")[0]
    rows = {cells[1].strip(): cells[2] for cells in (line.split("|") for line in table.splitlines()) if len(cells) > 3}
    assert set(pyinfer._FAMILIES) <= set(rows)
    for family, names in pyinfer._FAMILIES.items():
        assert {n for n in re.findall(r"`(\w+)`", rows[family]) if n != "_inplace"} <= set(names)


def test_files_it_points_to_exist():
    root = Path(__file__).resolve().parent.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target
    for target in re.findall(r"`((?:pyinfer|cuda_src|schedulers)/[\w/.]+)`", README):
        assert (root / target).exists(), target
