"""The benchmarks themselves: timing, checks, line format, result files, README's tables, the GPU scripts' record."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import types
from pathlib import Path

import pytest

from benchmarks import calls, harness, machine, peers, readme_tables, timing
from benchmarks.__main__ import main
from benchmarks.suites import NAMES

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).resolve().parent.parent
torch = __import__("torch") if os.environ.get("PYINFER_REQUIRE_ALL") else pytest.importorskip("torch")


def check_document(document: dict) -> None:
    """The schema that benchmarks/results/README.md describes."""
    for key, kind in {
        "schema": int,
        "kind": str,
        "date": str,
        "command": str,
        "device": str,
        "quick": bool,
        "commit": str,
        "sources_sha256": str,
        "machine": dict,
        "versions": dict,
    }.items():
        assert isinstance(document[key], kind), key
    assert (
        document["schema"] == harness.SCHEMA
        and document["kind"] == "benchmark"
        and document["device"] in ("cuda", "cpu")
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", document["date"])
    assert isinstance(document["peers"], dict) and isinstance(document["method"], str)
    assert document["suites"] and set(document["suites"]) <= set(NAMES)
    if document["device"] == "cuda":
        assert {"gpu", "driver"} <= set(document["machine"])
    for suite in document["suites"].values():
        assert suite["limits"]["copy_tb_s"] > 0 and suite["limits"]["matmul_tflop_s"] > 0
        for case in suite["cases"]:
            assert case["op"] and case["spec"] and case["flops"] >= 0 and case["bytes"] >= 0 and case["results"]
            for r in case["results"]:
                assert r["name"].split()[0] in (harness.OURS, *peers.NAMES)
                assert r["status"] == "ok" or re.match(r"(missing|error|differs): .", r["status"]), r["status"]
                if r["status"] == "ok":
                    assert 0 < r["us_p10"] <= r["us"] <= r["us_p90"] and r["samples"] >= 1
                    assert r.get("relative_error") is None or math.isfinite(r["relative_error"])


class StubTimer:
    """Gives each variant the time it asks for."""

    device = "cpu"

    def __init__(self, *times: float) -> None:
        self.times = times

    def synchronize(self) -> None:
        pass

    def measure(self, runs):
        return [timing.Samples(t, t, t, 3) for t in self.times[: len(runs)]]


@pytest.fixture
def ctx(tmp_path):
    context = harness.Context("cpu", ["flashinfer", "torch", "fa3"], quick=True, out=tmp_path / "r.json")
    context.timer = StubTimer(10.0, 20.0, 5.0)
    context.limits = {"copy_tb_s": 1.0, "matmul_tflop_s": 1.0}
    context._suite = "decode"
    context.suites["decode"] = {"limits": context.limits, "cases": []}
    return context


def gives(x):
    return lambda: lambda: x


def raises(error):
    def factory():
        raise error

    return factory


def test_measure_checks_peers_and_works_out_ratios(ctx, capsys):
    x = torch.randn(4, 4)
    case = harness.Case("op", "b1", flops=8e6, bytes=5e6)
    record = ctx.measure(
        case,
        [("flashinfer fa2", gives(x * (1 + 1e-4))), ("pyinfer", gives(x)), ("torch", gives(x)), ("triton", gives(x))],
    )
    by_name = {r["name"]: r for r in record["results"]}
    assert set(by_name) == {
        "pyinfer",
        "flashinfer fa2",
        "torch",
        "fa3",
    }  # triton was not asked for; fa3 was and has no variant
    ours, theirs = by_name["pyinfer"], by_name["flashinfer fa2"]
    assert ours["us"] == 10.0 and ours["tflop_s"] == pytest.approx(0.8) and ours["tb_s"] == pytest.approx(0.5)
    assert ours["percent_of_limit"] == pytest.approx(80.0)  # 8 us of operations, 5 us of bytes: the larger is the floor
    assert ours["best_peer"] == "torch" and ours["times_peer"] == pytest.approx(0.5)
    assert theirs["times_peer"] == pytest.approx(2.0) and theirs["relative_error"] == pytest.approx(1e-4, rel=0.05)
    assert by_name["fa3"]["status"].startswith("missing: ")
    out = capsys.readouterr().out
    assert re.search(r"^op b1 · pyinfer +\| +10\.0 \| +0\.8 \| +0\.5 \| +80\.0 \| 0\.50 torch$", out, re.MULTILINE), out
    assert "fa3" not in out and any("fa3" in text for text in ctx.problems())
    check_document(json.loads((ctx.write()).read_text()))


@pytest.mark.parametrize("bad", ["nan", "shape", "value", "unwritten"])
def test_a_peer_that_differs_is_not_timed(ctx, bad):
    x = torch.randn(4, 4)
    y = {"nan": x.clone().fill_diagonal_(math.nan), "shape": x[:2], "value": x + 0.1, "unwritten": torch.zeros_like(x)}[
        bad
    ]
    record = ctx.measure(
        harness.Case("op", "b1"), [("pyinfer", gives(x)), ("torch", gives(y)), ("flashinfer", gives(x))]
    )
    by_name = {r["name"]: r for r in record["results"]}
    assert by_name["torch"]["status"].startswith("differs: relative error") and "us" not in by_name["torch"]
    assert by_name["flashinfer"]["status"] == "ok" and by_name["pyinfer"]["best_peer"] == "flashinfer"


def test_missing_and_failing_variants_are_recorded_and_the_rest_goes_on(ctx):
    x = torch.randn(4)
    variants = [
        ("pyinfer", gives(x)),
        ("flashinfer a", raises(peers.Missing("not built"))),
        ("torch", raises(RuntimeError("no kernel image\nmore"))),
    ]
    record = ctx.measure(harness.Case("op", "b1"), variants)
    status = {r["name"]: r["status"] for r in record["results"]}
    assert status == {
        "pyinfer": "ok",
        "flashinfer a": "missing: not built",
        "torch": "error: RuntimeError: no kernel image",
        "fa3": status["fa3"],
    }
    check_document(ctx.document())


def test_cases_glob(ctx):
    ctx.glob = "decode *b64*"
    assert ctx.measure(harness.Case("decode", "32/8 b1 L1k"), []) is None
    assert ctx.selected(harness.Case("decode", "32/8 b64 L4k")) and not ctx.suites["decode"]["cases"]


def test_cpu_timer_takes_turns_and_gives_medians():
    order = []
    timer = timing.CpuTimer(quick=True)
    samples = timer.measure([lambda: order.append("a"), lambda: order.append("b")])
    assert len(samples) == 2 and all(s.us_p10 <= s.us <= s.us_p90 for s in samples)
    timed = order[4:]  # a warm-up and an estimate of each come first
    assert timed[:6] == ["a", "b", "b", "a", "a", "b"]


class FakeEvent:
    def __init__(self, cuda):
        self.cuda = cuda

    def record(self):
        self.at, self.spin = self.cuda.now, self.cuda.spun
        self.cuda.now += self.cuda.call_us / 1e3

    def query(self):  # passed already: the spin was shorter than the CPU needed
        return self.spin < self.cuda.needed

    def elapsed_time(self, other):
        return other.at - self.at


def test_cuda_timer_throws_late_samples_away_and_spins_longer():
    cuda = types.SimpleNamespace(now=0.0, spun=0.0, needed=0.0, call_us=7.0, flushes=0)
    cuda.Event = lambda enable_timing: FakeEvent(cuda)
    cuda.synchronize = lambda: None
    cuda._sleep = lambda cycles: setattr(cuda, "spun", cycles)
    timer = object.__new__(timing.CudaTimer)
    timer._torch = types.SimpleNamespace(cuda=cuda)
    timer._cycles_per_us, timer.min_samples, timer.max_samples, timer.seconds = 1.0, 5, 9, 0.0
    timer.flush = lambda: setattr(cuda, "flushes", cuda.flushes + 1)
    (calm,) = timer.measure([lambda: None])
    assert calm.late == 0 and calm.samples == 5 and calm.us == pytest.approx(7.0) and cuda.flushes == 6
    cuda.needed = (
        100.0  # the first spin is 50 us and a little: two or so samples are late, then the spin is long enough
    )
    (late,) = timer.measure([lambda: None])
    assert 1 <= late.late <= 3 and late.samples == 5 and late.us == pytest.approx(7.0)
    cuda.needed = math.inf  # a call that waits for the GPU itself: reported with what there is, and how many were late
    (always,) = timer.measure([lambda: None])
    assert always.samples == 5 and always.late > always.samples


class FakeFlashInfer:
    """pyinfer in FlashInfer's place: drives the same adapter code; its wrappers take FlashInfer's options and ignore them."""

    def __init__(self):
        import pyinfer

        self._pyinfer = pyinfer

    def __getattr__(self, name):
        found = getattr(self._pyinfer, name)
        return (lambda workspace, layout, **options: found(workspace, layout)) if name.endswith("Wrapper") else found


@pytest.fixture
def fake_flashinfer(monkeypatch):
    asked = set()

    def load(module):
        assert module in peers.MODULES, module
        asked.add(module)
        return FakeFlashInfer()

    monkeypatch.setattr(peers, "flashinfer", load)
    monkeypatch.setattr(peers, "version", lambda name: "fake")
    return asked


def test_suites_run_on_tiny_cases(fake_flashinfer, tmp_path, capsys):
    suites = ["decode", "prefill", "mla", "memory_bound", "sampling", "host_cost", "cpu_attention"]
    code = main([*suites, "--device", "cpu", "--quick", "--peers", "flashinfer", "torch", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    assert path.name.endswith("_" + "-".join(suites) + ".json")
    document = json.loads(path.read_text())
    check_document(document)
    assert code == 0, out
    assert fake_flashinfer == set(peers.MODULES)
    for suite in suites:
        for case in document["suites"][suite]["cases"]:
            names = {r["name"].split()[0]: r["status"] for r in case["results"]}
            assert names.get("pyinfer", "ok") == "ok", (suite, case["spec"], names)
            assert not any(status.startswith("differs") for status in names.values()), (suite, case["spec"], names)
    # every table can be made of it
    document = {
        **document,
        "file": path.name,
        "quick": False,
        "all": True,
        "machine": {**document["machine"], "gpu": "Test GPU", "driver": "1"},
    }
    for name, (suite, device, make) in readme_tables.TABLES.items():
        if suite in suites:
            text = make({**document, "device": device})
            assert text.count("\n|") >= 2 and "None" not in text, name


def test_cold_start_in_fresh_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYINFER_BENCH_BUILT", str(tmp_path))
    record = {"module": "norm", "version": "9", "seconds": 45.0, "import_seconds": 3.0, "max_jobs": "4"}
    (tmp_path / "norm.json").write_text(json.dumps(record))
    out = tmp_path / "out"
    assert (
        main(
            [
                "cold_start",
                "--device",
                "cpu",
                "--quick",
                "--peers",
                "flashinfer",
                "--cases",
                "cold *m*rt*",
                "--out",
                str(out),
            ]
        )
        == 0
    )  # import
    assert (
        main(
            [
                "cold_start",
                "--device",
                "cpu",
                "--quick",
                "--peers",
                "flashinfer",
                "--cases",
                "cold rmsnorm",
                "--out",
                str(out / "b.json"),
            ]
        )
        == 0
    )
    document = json.loads((out / "b.json").read_text())
    check_document(document)
    specs = {
        case["spec"]: {r["name"]: r["us"] for r in case["results"]}
        for case in document["suites"]["cold_start"]["cases"]
    }
    assert set(specs) == {"rmsnorm, empty cache", "rmsnorm, disk cache"}
    assert specs["rmsnorm, empty cache"]["flashinfer"] == 45e6
    document = {**document, "file": "b.json"}
    assert "| `rmsnorm` |" in readme_tables.cold_start(document) and "45.00 s" in readme_tables.cold_start(document)


def test_unknown_suite_device_and_peer_are_refused(capsys):
    for argv in (["nope"], ["decode", "--peers", "nope"]):
        with pytest.raises(SystemExit):
            main(argv)
    with pytest.raises(SystemExit, match=r"runs on cpu only|no GPU here"):
        main(["cpu_attention", "--device", "cuda"])


def test_a_flashinfer_module_that_is_not_built_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("PYINFER_BENCH_BUILT", str(tmp_path))
    monkeypatch.setattr(peers, "_import_flashinfer", lambda: "the module")
    with pytest.raises(peers.Missing, match="norm is not built"):
        peers.flashinfer("norm")
    (tmp_path / "norm.json").write_text("{}")
    assert peers.flashinfer("norm") == "the module"


FA3_SCHEMA = """q k v k_new v_new q_v out cu_seqlens_q cu_seqlens_k cu_seqlens_k_new seqused_q seqused_k max_seqlen_q max_seqlen_k page_table
    kv_batch_idx leftpad_k rotary_cos rotary_sin seqlens_rotary q_descale k_descale v_descale softmax_scale is_causal window_size_left
    window_size_right softcap is_rotary_interleaved scheduler_metadata num_splits pack_gqa sm_margin s_aux cp_world_size cp_rank
    cp_tot_seqused_k""".split()  # noqa: SIM905 - in the order of the operator's own schema, as text to compare with it


@pytest.mark.parametrize("page_size", [0, 4])
def test_fa3_arguments_are_placed_by_name(monkeypatch, page_size):
    from benchmarks.inputs import Attention

    seen = {}
    monkeypatch.setattr(
        peers,
        "_fa3_forward",
        lambda: (lambda *a: (seen.update(zip(FA3_SCHEMA, a, strict=True)), ["out"])[1], FA3_SCHEMA),
    )
    a = Attention([3, 2], [9, 6], 4, 2, 8, page_size, True, "float32", "cpu")
    assert peers.fa3(a)() == "out"
    assert (
        seen["is_causal"] is True
        and seen["max_seqlen_q"] == 3
        and seen["max_seqlen_k"] == 9
        and seen["softmax_scale"] == 8**-0.5
    )
    assert (seen["page_table"] is None) == (page_size == 0) and (seen["cu_seqlens_k"] is None) == (page_size != 0)
    if page_size:
        assert seen["page_table"].shape == (2, 3) and seen["seqused_k"].tolist() == [9, 6]
        first = a.kv_indices.tolist()
        assert seen["page_table"][0].tolist() == first[:3] and seen["page_table"][1].tolist()[:2] == first[3:5]
    monkeypatch.setattr(peers, "_fa3_forward", lambda: (None, FA3_SCHEMA[:-8]))
    with pytest.raises(peers.Missing, match="has no argument"):
        peers.fa3(a)


@pytest.mark.parametrize("page_size", [0, 4])
def test_attention_inputs_agree_with_torch(page_size):
    """The dense view of the batch (what torch is given) and the batch itself (what we are given) are the same problem, flops counted by pairs."""
    import pyinfer
    from benchmarks.inputs import Attention

    a = Attention([5, 5], [5, 5], 4, 2, 32, page_size, True, "float32", "cpu")
    ours = calls.prefill(pyinfer, a)()
    k, v = a.dense_kv(expand_heads=True)
    q = a.q.view(2, 5, 4, 32).transpose(1, 2)
    theirs = (
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(a.q.shape)
    )
    assert harness.relative_error(theirs, ours) < 1e-5
    assert a.flops == 4 * 2 * 15 * 4 * 32  # 15 visible pairs of 5 × 5
    assert a.kv_bytes == 2 * 10 * 2 * 32 * 4


@pytest.mark.parametrize("style", ["torch", "torch-compile", "triton"])
def test_elementwise_styles_compute_the_same(style, monkeypatch):
    from benchmarks import elementwise

    if style == "triton":
        if importlib.util.find_spec("triton") is not None:
            pytest.skip("Triton is here: its kernels are checked against ours in the memory_bound suite, on a GPU")
        with pytest.raises(peers.Missing, match="triton"):
            elementwise.STYLES[style]
        return
    monkeypatch.setattr(
        torch, "compile", lambda f, dynamic: f
    )  # the function that is compiled is what is checked here, no C++ compiler is wanted
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    e = elementwise.STYLES[style]
    norm = lambda t: (t.double() / torch.sqrt((t.double() ** 2).mean(-1, keepdim=True) + 1e-6) * weight).float()  # noqa: E731
    assert torch.allclose(e.rmsnorm(x, weight)(), norm(x), atol=1e-5)
    run, result = e.fused_add_rmsnorm(x, residual, weight)
    assert torch.allclose(result(), torch.cat([norm(x + residual), x + residual]), atol=1e-5)
    assert run() is not None
    assert torch.allclose(e.silu_and_mul(x)(), x[:, :4] * torch.sigmoid(x[:, :4]) * x[:, 4:], atol=1e-6)


def test_allowed_set_of_a_draw():
    from benchmarks.suites.sampling import _allowed, _checker

    p = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0]])
    assert _allowed(p, None, None, None).tolist() == [[True] * 4 + [False]]
    assert _allowed(p, 2, None, None).tolist() == [
        [True, True, True, False, False]
    ]  # a tie at the k-th place is kept whole
    assert _allowed(p, None, 0.6, None)[0, :1].all() and not _allowed(p, None, 0.6, None)[0, 3:].any()
    assert _allowed(p, None, None, 0.4).tolist() == [[True, True, True, False, False]]
    check = _checker(p, {"top_k": 1})
    assert (
        check(None, torch.tensor([0])) == 0.0
        and check(None, torch.tensor([1])) == 1.0
        and check(None, torch.tensor([5])) == math.inf
    )


def test_readme_tables_are_up_to_date():
    assert readme_tables.main(["--check"]) == 0, "run python -m benchmarks.readme_tables"


def test_readme_tables_replace_their_blocks_only(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench:decode -->\nold\n<!-- /bench:decode -->\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(tmp_path)]
    assert readme_tables.main(["--check", *arguments]) == 1 and "old" in readme.read_text()
    assert readme_tables.main(arguments) == 0 and readme_tables.main(["--check", *arguments]) == 0
    assert (
        readme.read_text()
        == "before\n<!-- bench:decode -->\n" + readme_tables.NOT_MEASURED + "<!-- /bench:decode -->\nafter\n"
    )
    for bad in ("<!-- bench:nope -->\n<!-- /bench:nope -->", "<!-- bench:decode -->\n"):
        with pytest.raises(ValueError, match=r"README\.md"):
            readme_tables.render(bad, [])


def test_the_gpu_machines_commit_is_the_stamped_one(tmp_path, monkeypatch):
    """Its copy has a .git of the commit that the session began with."""
    (tmp_path / "COMMIT").write_text("0123abc\ndirty\n")
    monkeypatch.setenv("PEERS", str(tmp_path))
    assert machine.commit.__wrapped__() == "0123abc+"


def test_newest_full_result_counts():
    def document(date, status="ok", device="cuda", **more):
        return {
            "date": date,
            "file": date,
            "device": device,
            "suites": {"decode": {"cases": [{"results": [{"name": "pyinfer", "status": status}]}]}},
            **more,
        }

    documents = sorted(
        [
            document("2026-01-02"),
            document("2026-01-03"),
            document("2026-01-04", "error: x"),
            document("2026-01-05", device="cpu"),
        ],
        key=lambda d: d["date"],
        reverse=True,
    )
    assert readme_tables.newest(documents, "decode", "cuda")["date"] == "2026-01-03"
    assert readme_tables.newest(documents, "prefill", "cuda") is None


def test_a_run_of_some_cases_replaces_those_rows_only():
    def document(date, **times):
        cases = [
            {"op": "host", "spec": k, "results": [{"name": "pyinfer", "status": "ok", "us": v}]}
            for k, v in times.items()
        ]
        return {"date": date, "file": f"{date}.json", "device": "cuda", "suites": {"host_cost": {"cases": cases}}}

    old, new = document("2026-01-02", plan=9.0, run=2.0), document("2026-01-03", plan=4.0)
    merged = readme_tables.newest([new, old], "host_cost", "cuda")
    assert [(c["spec"], c["results"][0]["us"]) for c in merged["suites"]["host_cost"]["cases"]] == [
        ("plan", 4.0),
        ("run", 2.0),
    ]
    assert merged["files"] == ["2026-01-03.json", "2026-01-02.json"]
    assert readme_tables.newest([document("2026-01-04", plan=3.0, run=1.0), new, old], "host_cost", "cuda")[
        "files"
    ] == ["2026-01-04.json"]


def test_kept_results_follow_the_schema():
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        document = json.loads(path.read_text())
        check_document(document)
        assert not document["quick"] and path.name.startswith(machine_name(document) + "_" + document["date"][:10]), (
            path.name
        )


def machine_name(document: dict) -> str:
    gpu = document["machine"].get("gpu", "cpu") if document["device"] == "cuda" else "cpu"
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")


def test_machine_description_names_no_host():
    text = json.dumps({**machine.describe(), **machine.versions()})
    assert machine.describe()["cores"] >= 1 and "python" in machine.versions()
    host = socket.gethostname()
    assert len(host) < 6 or host == "localhost" or host not in text
    assert re.fullmatch(r"([0-9a-f]{40}\+?|unknown)", machine.commit()) and re.fullmatch(
        r"[0-9a-f]{64}", machine.sources_digest()
    )


JUNIT = """<testsuites><testsuite><testcase classname="tests.test_norm" name="test_a[1]" time="0.5"/>
<testcase classname="tests.test_norm.TestX" name="test_b" time="0.25"><failure message="boom">x</failure></testcase>
<testcase classname="tests.test_oracle_grid" name="test_grid[3-paged-float16-d64x64]" time="0"/>
<testcase classname="tests.test_decode" name="test_d[torch-1]" time="0"/>
<testcase classname="tests.jit.test_cache" name="test_c" time="0"><skipped type="pytest.skip" message="needs two GPUs"/></testcase></testsuite></testsuites>"""


def test_gpu_record(tmp_path):
    spec = importlib.util.spec_from_file_location("record", ROOT / "tools" / "gpu" / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    (tmp_path / "j.xml").write_text(JUNIT)
    arguments = [
        "--name",
        "ptx",
        "--arch-list",
        "8.0+PTX",
        "--junit",
        str(tmp_path / "j.xml"),
        "--out",
        str(tmp_path),
        "--seed",
        "3",
    ]
    assert record.main(arguments) == 0
    (path,) = tmp_path.glob("*_ptx.json")
    found = json.loads(path.read_text())
    assert (
        found["totals"] == {"passed": 3, "failed": 1, "skipped": 1}
        and found["complete"]
        and found["whole_suite"]
        and found["seed"] == 3
    )
    assert (
        found["files"]["tests/test_norm.py"] == {"passed": 1, "failed": 1, "seconds": 0.8}
        and "tests/jit/test_cache.py" in found["files"]
    )
    assert found["failures"] == [{"test": "tests/test_norm.py::test_b", "message": "boom"}] and found["skips"] == {
        "needs two GPUs": 1
    }
    assert found["wrappers"] == {
        "BatchPrefillWithPagedKVCacheWrapper": {"passed": 1},
        "BatchDecodeWithPagedKVCacheWrapper": {"passed": 1},
    }
    assert found["command"] == "PYINFER_CUDA_ARCH_LIST=8.0+PTX pytest --device cuda"
    (tmp_path / "j.xml").write_text(JUNIT[:200])  # cut off
    record.main([*arguments, "--exit-code", "124"])
    found = json.loads(path.read_text())
    assert not found["complete"] and found["problem"] == "timed out" and found["totals"] == {}


def test_gpu_scripts_parse():
    bash = "/bin/bash"
    if not Path(bash).exists():
        pytest.skip("no bash here")
    for path in sorted((ROOT / "tools" / "gpu").glob("*.sh")):
        done = subprocess.run([bash, "-n", str(path)], capture_output=True, text=True)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"
