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


def test_operator_table_names_everything():
    """A name in the table exists, and every operator is in it (the sampling row abbreviates)."""
    table = README.split("## Operators")[1].split("\nAttention takes")[0]
    operators = {name for names in pyinfer._FAMILIES.values() for name in names}
    named = set(re.findall(r"`(\w+)`", table)) - {"_inplace"}
    assert {n for n in named if "…" not in n} <= operators
    missing = {n.removesuffix("_inplace") for n in operators} - named
    short = ("top_k_sampling", "top_p_sampling", "top_k_top_p_sampling")  # the table writes top_k_… for these
    synonyms = {"top_k_renorm_prob", "top_p_renorm_prob", "single_prefill_with_kv_cache_return_lse"}
    synonyms.add("CUDAGraphBatchDecodeWithPagedKVCacheWrapper")
    assert {n for n in missing if not n.startswith(short)} <= synonyms


def test_files_it_points_to_exist():
    root = Path(__file__).resolve().parent.parent
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (root / target).exists(), target
    for target in re.findall(r"`((?:pyinfer|cuda_src|schedulers)/[\w/.]+)`", README):
        assert (root / target).exists(), target
