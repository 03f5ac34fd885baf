"""docs/flashinfer_compat.md tells the truth: what it lists is missing, what it does not list is there, with FlashInfer's arguments in their order."""

from __future__ import annotations

import inspect

import pytest

from tests import flashinfer_api as api

FUNCTIONS = [(m, n) for m, entries in api.SIGNATURES.items() for n, text in entries.items() if text]


def test_the_lists_are_up_to_date():
    text = api.PAGE.read_text(encoding="utf-8")
    written = text[text.index(api.BEGIN) : text.index(api.END) + len(api.END)]
    assert written == api.lists(), "run `python -m tests.flashinfer_api`"


@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=[".".join(f) for f in FUNCTIONS])
def test_arguments_are_in_order(module, name):
    """Positional calls written for FlashInfer mean the same here: its arguments are the first ones, in its order."""
    found = api.find(module, name)
    if found is None:
        pytest.skip("listed as missing")
    parameters = [
        p for p in inspect.signature(found).parameters.values() if p.name != "self" or name == "fast_decode_plan"
    ]
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    catch_all = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    first, later = api.arguments(api.SIGNATURES[module][name])
    assert by_position[: len(first)] == first[: len(by_position)]
    known = {p.name for p in parameters}
    for argument in first:  # a missing one may only be at the end, and is listed
        assert argument in known, argument
    for argument in later:
        assert argument not in known or argument not in by_position[: len(first)]
    if catch_all:
        assert len(by_position) <= len(first) + len(later)


def test_the_question_is_asked_of_enough():
    """The lists hold the whole interface of the sections that are here: the public names of each family but pyinfer's own."""
    import pyinfer

    own = {"copy_pages", "gather_paged_kv_cache", "rmsnorm_dynamic_quant", "fused_add_rmsnorm_dynamic_quant"}
    sections = ("decode", "prefill", "attention", "cascade", "sparse", "pod", "quantization")
    for module in sections:
        unknown = set(pyinfer._FAMILIES[module]) - set(api.SIGNATURES[module]) - own
        assert not unknown, f"{module}: {unknown}"


def test_missing_names_are_found_missing():
    names, args = api.missing()
    assert "trtllm_batch_decode_with_kv_cache" in names["decode"] and "comm" in names
    assert "decode" in api.SIGNATURES and "rmsnorm" not in names.get("norm", [])
    assert "kv_cache_sf" in args["decode.BatchDecodeWithPagedKVCacheWrapper.run"]
    assert api.find("decode", "BatchDecodeWithPagedKVCacheWrapper.no_such_method") is None
    assert api.find("no_such_module", "anything") is None
