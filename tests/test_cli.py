"""The `pyinfer` command."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import pyinfer
from pyinfer.__main__ import main
from pyinfer._cli import doctor, select, text

pytestmark = [pytest.mark.smoke, pytest.mark.cpu]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, with no arch list and no memory of kernels built before."""
    from pyinfer.jit import compiler

    base = tmp_path / "cache"
    for name in ("PYINFER_CACHE_DIR", "PYINFER_CUDA_ARCH_LIST", "PYINFER_JIT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(base))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    compiler.forget()
    yield base
    compiler.forget()


def test_help_is_light():
    """`pyinfer --help` must not load NumPy, Numba or CuPy."""
    script = (
        "import sys\n"
        "from pyinfer.__main__ import make_parser\n"
        "make_parser().format_help()\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'numpy', 'numba', 'cupy', 'torch', 'jinja2'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_module_runs():
    done = subprocess.run([sys.executable, "-m", "pyinfer", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pyinfer", pyinfer.__version__]


def test_unknown_command_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fly"])
    assert stop.value.code == 2
    assert "show-config" in capsys.readouterr().err


def test_show_config(cache, capsys):
    assert main(["show-config"]) == 0
    out = capsys.readouterr().out
    assert str(cache) in out and "numba" in out and "NVRTC" in out
    assert not cache.exists()  # looking creates nothing


def test_show_config_json(cache, capsys):
    import numpy

    assert main(["show-config", "--json"]) == 0
    config = json.loads(capsys.readouterr().out)
    assert config["packages"]["numpy"] == numpy.__version__
    assert config["cache"][0] == {"path": str(cache), "exists": False, "kernels": 0, "bytes": 0}
    assert config["environment"]["PYINFER_WORKSPACE_BASE"] == str(cache)


def test_show_prints_the_rendered_cuda(capsys):
    spec = select.find("rmsnorm")[0]
    assert main(["show", "rmsnorm", "--arch", "8.0"]) == 0
    captured = capsys.readouterr()
    assert captured.out.rstrip("\n") == spec.source("80").rstrip("\n")
    assert f"{spec.name}(" in captured.out and "{{" not in captured.out


def test_show_headers_and_resources(cache, capsys):
    assert main(["show", "rmsnorm", "--arch", "90a", "--headers", "--resources"]) == 0
    out = capsys.readouterr().out
    assert "// ======== common/types.cuh ========" in out
    last = out.rstrip().splitlines()[-1]
    assert last.startswith("// 90a: ") and "registers" in last and not last.startswith("// 90a: 0 ")


def test_show_lists_matches(capsys):
    names = [s.name for s in select.find("rmsnorm")]
    assert main(["show", "rmsnorm", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == names


def test_show_unknown_suggests(capsys):
    assert main(["show", "rmsnrom"]) == 1
    err = capsys.readouterr().err
    assert "no kernel matches 'rmsnrom'" in err and "rmsnorm" in err


@pytest.mark.parametrize("name", [name for names in pyinfer._FAMILIES.values() for name in names])
def test_every_public_operator_can_be_shown(name):
    """From API name to CUDA in one command, for all of them: a template in the folder of the operator's module, or its family."""
    found = select.find(name)
    assert found
    module = select.RUNS_KERNELS_OF.get(pyinfer._MODULE_OF[name], pyinfer._MODULE_OF[name])
    assert {s.template.split("/")[0] for s in found} == {module} or set(found) == set(select.specs_of(module))


def test_list_modules(cache, capsys):
    assert main(["list-modules", "--arch", "80", "90a"]) == 0
    out = capsys.readouterr().out
    for family in select.families():
        assert family in out
    assert "80" in out.splitlines()[0] and "90a" in out.splitlines()[0]


def test_build_then_list_then_cache(cache, capsys):
    spec = select.find("rmsnorm")[0]
    assert main(["build", spec.name, "--arch", "8.0", "90a", "--threads", "1", "--verbose"]) == 0
    captured = capsys.readouterr()
    assert "2 kernels compiled, 0 already there, 0 failed" in captured.out
    assert "building: 2/2" in captured.err
    assert len(list(cache.rglob("*.kernel"))) == 2

    from pyinfer.jit import compiler

    compiler.forget()
    assert main(["build", "--match", spec.name, "--arch", "80", "90a"]) == 0
    assert "0 kernels compiled, 2 already there" in capsys.readouterr().out

    assert main(["list-modules", "--arch", "80", "89", "--specs", "--match", spec.name]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(spec.name))
    assert line.split()[-2:] == ["built", "-"]

    assert main(["cache", "ls", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert {(e["name"], e["arch"]) for e in entries} == {(spec.name, "80"), (spec.name, "90a")}
    assert main(["cache", "ls"]) == 0
    assert "2 kernels" in capsys.readouterr().out


def test_build_list_builds_nothing(cache, capsys):
    assert main(["build", "--arch", "80", "--list", "--match", "rmsnorm*"]) == 0
    assert "rmsnorm" in capsys.readouterr().out
    assert not cache.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "--arch", "7.0", "--list"], "'7.0' is not supported"),
        (["build", "--arch", "hopper", "--list"], "'hopper' is no CUDA architecture"),
        (["build", "--match", "nothing_like_it"], "no kernel matches 'nothing_like_it'"),
        (["build", "nothing_like_it"], "no kernel matches 'nothing_like_it'"),
        (["build", "--threads", "0"], "--threads: got 0, wanted 1 or more"),
    ],
)
def test_build_refuses(cache, capsys, arguments, message):
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_build_reports_a_kernel_that_does_not_compile(cache, capsys, monkeypatch):
    from dataclasses import replace

    good = select.find("rmsnorm")[0]
    bad = replace(good, options=("-DBREAK", "-include=nonsense.h"))
    monkeypatch.setattr(select, "find", lambda pattern: [bad])
    assert main(["build", "--arch", "80"]) == 1
    captured = capsys.readouterr()
    assert "1 failed" in captured.out
    assert good.name in captured.err


def test_cache_verify_finds_damage(cache, capsys):
    spec = select.find("rmsnorm")[0]
    spec.build("80")
    assert main(["cache", "verify"]) == 0
    assert "1 kernel intact, 0 damaged" in capsys.readouterr().out
    (entry,) = cache.rglob("*.kernel")
    data = bytearray(entry.read_bytes())
    data[-100] ^= 1
    entry.write_bytes(data)
    assert main(["cache", "verify", "--dry-run"]) == 1
    assert entry.exists()
    assert main(["cache", "verify"]) == 1
    assert "0 kernels intact, 1 damaged" in capsys.readouterr().out
    assert not entry.exists()
    assert main(["cache", "verify"]) == 0


def test_cache_prune(cache, capsys):
    spec = select.find("rmsnorm")[0]
    spec.build("80")
    (entry,) = cache.rglob("*.kernel")
    old = Path(str(entry).replace("/0.1.0/", "/0.0.9/"))
    assert old != entry
    old.parent.mkdir(parents=True)
    old.write_bytes(entry.read_bytes())
    assert main(["cache", "prune", "--older-than", "1"]) == 0
    assert entry.exists() and old.exists()
    assert main(["cache", "prune"]) == 0
    assert entry.exists() and not old.exists()
    assert main(["cache", "prune", "--all"]) == 0
    assert not entry.exists()
    capsys.readouterr()
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out.startswith("0 kernels, 0 B")


def test_doctor_is_content_here(cache, capsys):
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "rmsnorm agrees with its reference" in out and out.rstrip().endswith("pyinfer works here.")
    assert not cache.exists()  # the check of the folder leaves nothing behind


def test_doctor_notices_a_wrong_kernel(cache, capsys, monkeypatch):
    monkeypatch.setitem(vars(pyinfer), "rmsnorm", lambda x, w, eps, out: out.__setitem__(..., x))
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "FAIL  CPU backend: rmsnorm is wrong" in capsys.readouterr().out


def test_doctor_notices_an_unwritable_cache(tmp_path, capsys, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("a file where a folder should be")
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(blocked))
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert f"{blocked} is no folder" in out and "→ set PYINFER_WORKSPACE_BASE to a writable folder" in out


def test_doctor_notices_a_damaged_cache(cache, capsys):
    select.find("rmsnorm")[0].build("80")
    (entry,) = cache.rglob("*.kernel")
    entry.write_bytes(entry.read_bytes()[:-7])
    assert main(["doctor", "--device", "cpu"]) == 1
    assert "1 damaged entries" in capsys.readouterr().out
    assert entry.exists()  # a look changes nothing


def test_doctor_says_when_cupy_is_missing(cache, capsys, monkeypatch):
    """A driver is there, CuPy is not: say which extra fits the driver."""
    from pyinfer._cli import config

    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(config, "driver_version", lambda: "13.0")
    assert main(["doctor", "--device", "cuda"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  CuPy" in out and "pip install 'pyinfer-kernels[cu13]'" in out


def test_doctor_says_when_nvrtc_is_missing(cache, capsys, monkeypatch):
    from pyinfer.jit import compiler

    def missing():
        raise compiler.JitError("the NVRTC library could not be loaded (libnvrtc.so.12). Install them with: pip ...")

    monkeypatch.setattr(compiler, "nvrtc_version", missing)
    main(["doctor", "--device", "cuda"])
    out = capsys.readouterr().out
    assert "NVRTC: the NVRTC library could not be loaded (libnvrtc.so.12)." in out
    assert "pip install 'pyinfer-kernels[cu1" in out


def test_doctor_says_whether_variants_compile(cache, capsys, monkeypatch):
    from pyinfer.jit import variant_link

    pytest.importorskip("cupy")
    if importlib.util.find_spec("numba_cuda") is not None:  # the wheel's environment is without the extra
        main(["doctor", "--device", "auto"])
        assert re.search(r"ok {4}variants in Python: numba-cuda .* linked one for \w+ in", capsys.readouterr().out)
    variant_link._numba_cuda.cache_clear()
    variant_link._operations.cache_clear()
    variant_link.compile_function.cache_clear()
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    monkeypatch.setattr(doctor, "_nvidia_hardware", lambda: False)
    main(["doctor", "--device", "auto"])
    out = capsys.readouterr().out
    assert "note  variants in Python: Numba-CUDA is not installed" in out
    assert "pip install 'pyinfer-kernels[cu12,variants-cu12]'" in out
    variant_link._numba_cuda.cache_clear()
    variant_link._operations.cache_clear()


def test_doctor_says_when_there_is_no_driver(cache, capsys, monkeypatch):
    from pyinfer._cli import config

    monkeypatch.setattr(config, "driver_version", lambda: None)
    monkeypatch.setattr(doctor, "_nvidia_hardware", lambda: False)
    assert main(["doctor", "--device", "auto"]) == 0  # a machine without a GPU is healthy
    assert "note  GPU: no NVIDIA driver" in capsys.readouterr().out
    assert main(["doctor", "--device", "cuda"]) == 1  # but not if one was asked for
    assert "FAIL  GPU: no NVIDIA driver" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_nvidia_hardware", lambda: True)
    assert main(["doctor", "--device", "auto"]) == 1
    assert "install the NVIDIA driver" in capsys.readouterr().out


def test_progress_lines_without_a_terminal():
    import io

    stream = io.StringIO()
    bar = text.Progress(3, "building", stream)
    for i in range(1, 4):
        bar.update(i)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("building: 1/3") and lines[-1].startswith("building: 3/3")
    assert len(lines) == 2  # the one in between came too soon to be worth a line


def test_progress_bar_on_a_terminal(monkeypatch):
    import io

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "60")
    bar = text.Progress(2, "building", stream)
    bar.update(1, "x" * 200)
    time.sleep(0.06)
    bar.update(2, "last")
    drawn = stream.getvalue()
    assert drawn.endswith("last\n") and "2/2" in drawn and "█" in drawn
    assert max(len(part) for part in drawn.replace("\x1b[2K", "").replace("\n", "").split("\r")) <= 59


@pytest.mark.parametrize(
    ("n", "expected"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KB"), (5 * 2**20, "5.0 MB"), (3 * 2**40, "3072.0 GB")]
)
def test_human_bytes(n, expected):
    assert text.human_bytes(n) == expected


def test_broken_pipe_is_quiet():
    """`pyinfer show … | head -1` ends without a traceback."""
    child = subprocess.Popen(
        [sys.executable, "-m", "pyinfer", "show", "rmsnorm", "--all", "--headers", "--arch", "80"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.readline()
    child.stdout.close()
    assert "Traceback" not in child.stderr.read()
    child.stderr.close()
    child.wait(timeout=60)
