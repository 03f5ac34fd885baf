"""Every check of attention was raised by some test of this run. Last in the alphabet, so that the whole suite has run before it."""

from __future__ import annotations

import pytest

from tests import error_sites
from tests.error_sites import ROOT, sites

ATTENTION = (
    "_attention", "_attention_options", "_batch_attention", "_batch_pod", "_batch_prefill", "_batch_run", "_cascade_wrappers", "_flashinfer",
    "_fp8_queries", "_paged_mla",
    "_replan", "_sink_wrapper", "_support", "attention", "cascade", "decode", "mla", "pod", "prefill", "quantization", "sparse", "utils",
    "jit/attention", "jit/attention_config", "jit/attention_fp8", "jit/attention_fp8_launch",
    "jit/attention_launch", "jit/attention_options", "jit/cascade", "jit/mla", "jit/pod", "jit/replan",
)  # fmt: skip
SCHEDULERS = ("decode", "mixed", "plan", "prefill")
FILES = [ROOT / f"{name}.py" for name in ATTENTION] + [ROOT.parent / "schedulers" / f"{name}.py" for name in SCHEDULERS]
# Test files whose refusals are counted on. A run without one of them (a single file, the GPU suite) asks nothing.
NEEDED = {
    "test_attention_compile", "test_attention_errors", "test_batch_attention", "test_batch_pod", "test_cascade", "test_cascade_wrappers", "test_decode",
    "test_device_errors", "test_flashinfer", "test_graph_replay", "test_mla", "test_mla_sm90", "test_options", "test_plan_contract", "test_plan_wrappers",
    "test_pod", "test_prefill",
    "test_prefill_fp8", "test_quantization", "test_replan", "test_schedulers", "test_sink_wrapper", "test_sm90_launch", "test_sparse",
    "test_support", "test_utils", "test_variants_errors",
}  # fmt: skip


def test_sites_are_found_and_noted(tmp_path):
    """The collector sees calls over several lines, and a raise marks the one it came from, not its neighbour."""
    code = "from pyinfer.core.errors import fail\n\ndef f(x):\n    if x:\n        fail(\n            'op', 'a', 'is bad',\n"
    code += "            x, 1,\n        )\n    fail('op', 'b', 'is worse', x, 2)\n"
    path = tmp_path / "module.py"
    path.write_text(code)
    scope: dict = {}
    exec(compile(code, str(path), "exec"), scope)
    first, second = sorted(sites(path), key=lambda s: s.first)
    assert (first.first, first.last, second.first) == (5, 8, 9) and str(first) == "module.py:5 fail('a', 'is bad')"
    with pytest.raises(ValueError, match="op: a is bad: got 1, wanted 1"):
        scope["f"](1)
    assert first.was_raised and not second.was_raised
    error_sites.raised.difference_update({r for r in error_sites.raised if r[0] == str(path)})


@pytest.mark.cpu
def test_every_check_of_attention_was_raised(request):
    ran = {item.path.stem for item in request.session.items}
    if not ran >= NEEDED or hasattr(request.config, "workerinput"):
        pytest.skip("needs the whole suite in one process")
    assert all(path.exists() for path in FILES)
    found = [site for path in FILES for site in sites(path)]
    assert len(found) > 200
    never = [str(site) for site in found if not site.was_raised]
    assert not never, "no test raises:\n" + "\n".join(never)
