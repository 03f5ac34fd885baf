"""What tools/gpu/record_sanitizer.py reads out of compute-sanitizer's logs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

SCRIPT = Path(__file__).parents[1] / "tools" / "gpu" / "record_sanitizer.py"
JUNIT = (
    '<testsuites><testsuite><testcase classname="tests.test_smoke" name="test_norm" time="1"/></testsuite></testsuites>'
)
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
BAD = """========= Invalid __global__ read of size 4 bytes
=========     at decode_sm80_bf16_d128+0x1f0
========= ERROR SUMMARY: 3 errors
========= ERROR SUMMARY: 1 error
"""
RACES = """========= Error: Race reported between Write access at prefill_sm80_f16_d64+0x10
=========     and Read access at prefill_sm80_f16_d64+0x20 [16 hazards]
========= RACECHECK SUMMARY: 3 hazards displayed (2 errors, 1 warning)
"""
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to the documentation\n"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("record_sanitizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder: Path, tool: str, log: str, code: int, junit: str = JUNIT) -> None:
    (folder / f"sanitizer_{tool}.log").write_text(log)
    (folder / f"sanitizer_{tool}.xml").write_text(junit)
    (folder / f"sanitizer_{tool}.status").write_text(f"{code} 42\n")


def test_a_clean_run(script, tmp_path, capsys):
    write(tmp_path, "memcheck", CLEAN, 0)
    write(tmp_path, "racecheck", CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"), 0)  # fmt: skip
    assert script.main(["--out", str(tmp_path), "--args", "tests/test_smoke.py", "memcheck", "racecheck"]) == 0
    (path,) = tmp_path.glob("*_sanitizer.json")
    found = json.loads(path.read_text())
    assert found["kind"] == "sanitizer" and found["command"].endswith("pytest --device cuda tests/test_smoke.py")
    for tool in ("memcheck", "racecheck"):
        entry = found["tools"][tool]
        assert (entry["errors"], entry["warnings"], entry["seconds"], entry["complete"]) == (0, 0, 42, True)
        assert entry["tests"] == {"passed": 1}
    assert "memcheck: 0 errors, 0 warnings; 1 passed; exit 0 in 42 s" in capsys.readouterr().out


def test_errors_are_summed_over_processes(script, tmp_path):
    write(tmp_path, "memcheck", BAD, 86)
    write(tmp_path, "racecheck", RACES, 86)
    assert script.main(["--out", str(tmp_path), "memcheck", "racecheck"]) == 1
    (path,) = tmp_path.glob("*_sanitizer.json")
    tools = json.loads(path.read_text())["tools"]
    assert tools["memcheck"]["errors"] == 4 and tools["memcheck"]["kernels"] == ["decode_sm80_bf16_d128"]
    assert (tools["racecheck"]["errors"], tools["racecheck"]["warnings"]) == (2, 1)


@pytest.mark.parametrize(("log", "code", "junit"), [(REFUSED, 1, ""), ("", 124, JUNIT[:40]), (CLEAN, 137, JUNIT)])
def test_what_never_ran_is_not_clean(script, tmp_path, log, code, junit):
    write(tmp_path, "initcheck", log, code, junit)
    assert script.main(["--out", str(tmp_path), "initcheck"]) == 1
    (path,) = tmp_path.glob("*_sanitizer.json")
    entry = json.loads(path.read_text())["tools"]["initcheck"]
    assert not entry["complete"]
    if log is REFUSED:
        assert entry["errors"] is None and "Device not supported" in entry["problem"]
