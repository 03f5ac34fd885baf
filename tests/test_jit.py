"""Architectures, specs, rendering, error messages, log lines, and building many specs at once."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading

import pytest

import pyinfer.jit
from pyinfer.core.params import ParamStruct, i32, ptr
from pyinfer.jit import JitError, JitModule, JitSpec, build_jit_specs, cache, compiler, env, gen_jit_spec
from tests import jit_template as t

pytestmark = pytest.mark.compile


@pytest.fixture(autouse=True)
def sources(tmp_path, monkeypatch):
    """The test's own cache folder and template files; returns the files, which a test may change before its first build."""
    for name in ("PYINFER_CACHE_DIR", "XDG_CACHE_HOME", "PYINFER_JIT", "PYINFER_JIT_VERBOSE", "PYINFER_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # reads look into every cache folder there is
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(tmp_path / "base"))
    files = dict(t.SOURCES)
    monkeypatch.setattr(compiler, "read_source", t.reader(files))
    compiler.forget()
    yield files
    monkeypatch.undo()
    compiler.forget()


def spec_of(sources, text, *constants, name="probe", **fields):
    sources["test/probe.cu.jinja"] = text
    return JitSpec(name, "test/probe.cu.jinja", t.PARAMS, constants, **fields)


# ---- architectures ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "arch"),
    [
        ("8.0", "80"), ("80", "80"), ("sm_80", "80"), (" 8.9 ", "89"), ("9.0", "90a"), ("90", "90a"), ("9.0a", "90a"), ("SM_90A", "90a"),
        ("10.0", "100a"), ("10.0f", "100f"), ("100f", "100f"), ("12.0a", "120a"), ("121", "121a"),
        ("8.0+PTX", "compute_80"), ("8.0+ptx", "compute_80"), ("compute_80", "compute_80"), ("compute_90", "compute_90"),
    ],
)  # fmt: skip
def test_parse_arch(text, arch):
    assert env.parse_arch(text) == arch
    assert env.parse_arch(arch) == arch  # canonical forms are stable


@pytest.mark.parametrize(
    "text", ["", "hopper", "7.5", "70", "9", "8.0a", "89f", "9.0b", "1000.0", "8.0 9.0", "+PTX", "-80"]
)
def test_parse_arch_refuses(text):
    with pytest.raises(ValueError, match=r"PYINFER_CUDA_ARCH_LIST: .*") as error:
        env.parse_arch(text)
    assert repr(text) in str(error.value)


@pytest.mark.parametrize(
    ("arch", "number"), [("80", 80), ("90a", 90), ("100f", 100), ("120a", 120), ("compute_80", 80), ("compute_90", 90)]
)
def test_arch_number(arch, number):
    assert env.arch_number(arch) == number


@pytest.mark.parametrize(
    ("text", "archs"),
    [
        ("", []),
        ("  ", []),
        ("8.0", ["80"]),
        ("8.0;9.0a", ["80", "90a"]),
        ("8.0, 8.9  9.0,8.0", ["80", "89", "90a"]),
        ("8.0+PTX", ["80", "compute_80"]),  # as in torch's list: both forms
        ("9.0a+PTX", ["90a", "compute_90"]),
        ("compute_80", ["compute_80"]),
    ],
)
def test_arch_list(text, archs, monkeypatch):
    monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", text)
    assert env.arch_list() == archs
    if archs:
        assert env.default_archs() == archs


@pytest.mark.parametrize(
    ("listed", "capability", "arch"),
    [
        ("", 80, "80"), ("", 90, "90a"), ("", 121, "121a"),
        ("8.0+PTX", 90, "compute_80"), ("8.0+PTX", 80, "80"), ("8.0+PTX", 89, "80"),
        ("8.0 9.0a", 90, "90a"), ("8.0 8.6", 89, "86"), ("8.0 8.9", 86, "80"),
        ("8.0+PTX 9.0+PTX", 100, "compute_90"), ("10.0f", 103, "100f"), ("10.0f 8.0+PTX", 120, "compute_80"),
    ],
)  # fmt: skip
def test_arch_for_capability(listed, capability, arch, monkeypatch):
    monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", listed)
    assert env.arch_for_capability(capability) == arch


@pytest.mark.parametrize(
    ("listed", "capability"), [("8.0", 90), ("9.0a", 100), ("8.9", 80), ("10.0a", 103), ("9.0+PTX", 89)]
)
def test_arch_that_nothing_listed_runs_on(listed, capability, monkeypatch):
    monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", listed)
    own = f"{capability // 10}.{capability % 10}"
    with pytest.raises(ValueError, match=f"PYINFER_CUDA_ARCH_LIST .*{re.escape(own)}. Add '{re.escape(own)}'"):
        env.arch_for_capability(capability)


def test_default_archs_without_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)  # not installed
    assert env.default_archs() == list(env.NATIVE_ARCHS)


def test_env_names(monkeypatch, tmp_path):
    assert str(tmp_path) in str(env.PYINFER_BASE_DIR)
    for name in ("CACHE", "WORKSPACE", "JIT", "GEN_SRC"):
        assert getattr(env, f"PYINFER_{name}_DIR").parent == env.PYINFER_BASE_DIR
    assert (env.PYINFER_CSRC_DIR / "common" / "types.cuh").is_file() and (
        env.PYINFER_INCLUDE_DIR / "common" / "types.cuh"
    ).is_file()
    with pytest.raises(AttributeError, match="PYINFER_NO_DIR"):
        env.PYINFER_NO_DIR  # noqa: B018 - the access is the test


# ---- specs -----------------------------------------------------------------------------------------------------------------------


def test_spec_is_a_value():
    spec, same, other = t.tiny(), t.tiny(), t.tiny(2)
    assert spec == same and hash(spec) == hash(same) and spec is not same
    assert spec != other and len({spec, same, other}) == 2
    for twin in (pickle.loads(pickle.dumps(spec)), copy.deepcopy(spec)):
        assert twin == spec and hash(twin) == hash(spec) and twin.source("80") == spec.source("80")
        assert twin.params.pack(1, 2) == spec.params.pack(1, 2)
    assert str(spec) == "tiny_1 [test/tiny.cu.jinja] value=1"
    with pytest.raises(AttributeError):
        spec.name = "x"


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"name": "a-b"}, r"'a-b'.*letters, digits"),
        ({"name": "1a"}, "'1a'"),
        ({"name": ""}, "no C identifier"),
        ({"smem": 228 * 1024}, "233472 bytes.*227 KiB"),
        ({"smem": -1}, "-1 bytes"),
        ({"block": (1025, 1, 1)}, r"\(1025, 1, 1\).*1024"),
        ({"block": (32, 0, 1)}, r"\(32, 0, 1\)"),
        ({"block": (1, 1, 65)}, "64 in z"),
        ({"constants": (("arch", 1),)}, "arch"),
        ({"constants": (("a", 1), ("a", 2))}, "constant a is given twice"),
    ],
)
def test_spec_refuses(fields, text):
    with pytest.raises(ValueError, match=text):
        JitSpec(**{"name": "fine", "template": t.TEMPLATE, "params": t.PARAMS, **fields})


def test_gen_jit_spec():
    spec = gen_jit_spec(
        "x", t.TEMPLATE, t.PARAMS, value=3, block=(64, 1, 1), smem=128, options=("-DX",), min_arch=90, cluster=(2, 1, 1)
    )
    assert spec == JitSpec("x", t.TEMPLATE, t.PARAMS, (("value", 3),), (64, 1, 1), 128, ("-DX",), 90, (2, 1, 1))
    assert gen_jit_spec("x", t.TEMPLATE, t.PARAMS, b=1, a=2) == gen_jit_spec("x", t.TEMPLATE, t.PARAMS, a=2, b=1)


def test_too_old_an_arch():
    spec = t.tiny(min_arch=90)
    with pytest.raises(ValueError, match="tiny_1: arch is too old: got 89, wanted 90 or newer"):
        spec.build("8.9")
    assert spec.build("9.0").arch == "90a"


def test_too_new_an_arch():
    spec = t.tiny(min_arch=90, max_arch=90)
    with pytest.raises(ValueError, match="tiny_1: arch lacks its instructions: got 100a, wanted 90"):
        spec.build("10.0")
    assert spec.build("9.0").arch == "90a" and [spec.suits(a) for a in (80, 90, 100, 120)] == [
        False,
        True,
        False,
        False,
    ]


def test_default_arch_is_one_that_has_the_instructions(monkeypatch):
    monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", "8.0 9.0a")
    assert t.tiny().build().arch == "80" and t.tiny(min_arch=90).build().arch == "90a"
    assert "for sm_90a" in t.tiny(min_arch=90).source()


def test_names_of_flashinfer():
    spec = t.tiny()
    assert spec.jit_library_path == spec.get_library_path() == spec.cache_path()


def test_jit_package_finds_names():
    assert pyinfer.jit.JitSpec is JitSpec and pyinfer.jit.compiler is compiler
    for name in ("nothing", "_EXPORT", "gen_nothing"):
        assert not hasattr(pyinfer.jit, name)
    assert pyinfer.jit.gen_rmsnorm is pyinfer.jit.norm.gen_rmsnorm
    assert set(pyinfer.jit._EXPORTS) <= set(dir(pyinfer.jit))


# ---- rendering -------------------------------------------------------------------------------------------------------------------


def test_template_variables(sources):
    text = "{{ kernel_name }}|{{ arch }}|{{ block_size }}|{{ value }}|{{ params }}"
    spec = spec_of(sources, text, ("value", 1.5), block=(8, 4, 2))
    assert spec.source("9.0").endswith(f"probe|90|64|1.5|{t.PARAMS.cpp_source()}")
    assert "|80|" in spec.source("compute_80")
    first, second, *_ = spec.source("9.0").splitlines()
    assert first == "// probe: test/probe.cu.jinja for sm_90a" and second == "// value=1.5"
    assert spec.source("compute_80").startswith("// probe: test/probe.cu.jinja for PTX compute_80\n")


def test_forgotten_constant_is_an_error(sources):
    spec = spec_of(sources, "line one\n{% if TILE > 1 %}\n{% endif %}\n")
    with pytest.raises(JitError, match="TILE") as error:
        spec.build("80")
    assert (
        "cuda_src/test/probe.cu.jinja:2" in str(error.value)
        and "probe (" in str(error.value)
        and "for 80" in str(error.value)
    )


def test_broken_template(sources):
    with pytest.raises(JitError, match=r"cannot render probe.*\n  cuda_src/test/probe\.cu\.jinja:3\n"):
        spec_of(sources, "one\ntwo\n{% if %}\n").source("80")


def test_missing_template_and_header(sources):
    with pytest.raises(JitError, match=r"no/such\.cu\.jinja is not part of pyinfer\.cuda_src.*reinstall"):
        JitSpec("x", "no/such.cu.jinja", t.PARAMS).source("80")
    with pytest.raises(JitError, match=r"cannot build probe .*common/no\.cuh is not part of"):
        spec_of(sources, '#include "common/no.cuh"\n').build("80")


def test_headers_are_found_once_and_in_order(sources):
    sources.update(
        {"a.cuh": '#include "b.cuh"\n# include "c.cuh"\n', "b.cuh": '#include "c.cuh"\n', "c.cuh": '#include "a.cuh"\n'}
    )
    assert list(compiler.included_headers('  #\tinclude "a.cuh"\n// #include "x.cuh"\n#include <y.cuh>\n')) == [
        "a.cuh",
        "b.cuh",
        "c.cuh",
    ]


# ---- what a failed compile says --------------------------------------------------------------------------------------------------

_KERNEL = 'extern "C" __global__ void {{ kernel_name }}(const __grid_constant__ Params p) {\n'
# Every template fails where it says BAD, and must be told so, whatever Jinja did to the lines before.
SHAPES = {
    "plain": "using int32_t = int;\n{{ params }}\n" + _KERNEL + "    p.n;\n    BAD;\n}\n",
    "first line": "BAD;\n{{ params }}\n",
    "after params": "using int32_t = int;\n{{ params }}\nBAD;\n",
    "last line without a newline": "int x;\nBAD",
    "block not taken": "{% if false %}\none\ntwo\n{% endif %}\nint x;\nBAD;\n",
    "block taken": "{% if true %}\nint x;\nBAD;\n{% else %}\nthree\n{% endif %}\n",
    "indented blocks": "    {% if true %}\n        {% if true %}\n    int x; BAD;\n        {% endif %}\n    {% endif %}\n",
    "loop": "{% for i in range(5) %}\nint x{{ i }};\n{% endfor %}\nBAD;\n",
    "inside a loop": "int y;\n{% for i in range(3) %}\nint x{{ i }};\n{% if i == 2 %}\nBAD;\n{% endif %}\n{% endfor %}\n",
    "comment over lines": "{# one\ntwo\nthree #}\nint x;\nBAD;\n",
    "tag over lines": "{% if true\n      and 1 < 2\n%}\nint x;\n{% endif %}\nBAD;\n",
    "expression over lines": "int x = {{\n  1 +\n  2\n}};\nBAD;\n",
    "on the expression's line": "int x;\nint y = {{ 'BAD' }};\n",
    "set over lines": "{% set body %}\nint a;\nint b;\n{% endset %}\n{{ body }}\nBAD;\n",
    "whitespace control": "int x;\n{%- if true -%}\nint y;\n{%- endif %}\n\n\nBAD;\n",
    "inline block": "int x; {% if true %}int y;{% endif %} int z;\n{% if true %}BAD;{% endif %}\n",
    "line continued": "#define A(x) \\\n    int x; \\\n    int y##x\nA(u);\nBAD;\n",
    "raw": "{% raw %}\n// {{ not a tag }} {% nor this %}\n{% endraw %}\nBAD;\n",
    "braces in text": "struct S { int a[2] = { {}, 1 }; };\nBAD;\n",
    "macro": "{% macro f(x) %}\nint {{ x }};\n{% endmacro %}\n{{ f('a') }}\n{{ f('b') }}\nBAD;\n",
    "string with a tag's end": "{% set s = '%}' %}\nBAD; // {{ s }}\n",
}


@pytest.mark.parametrize("shape", SHAPES)
def test_error_names_the_template_line(shape, sources):
    text = SHAPES[shape]
    line = next(i for i, content in enumerate(text.split("\n"), 1) if "BAD" in content)
    with pytest.raises(JitError) as error:
        spec_of(sources, text).build("80")
    assert f"cuda_src/test/probe.cu.jinja:{line} (rendered line " in str(error.value), str(error.value)
    assert "BAD" in str(error.value)


def test_error_in_a_block_of_params(sources):
    params = ParamStruct("Wrong", ptr("a", "const no_type"), i32("n"))
    sources["test/probe.cu.jinja"] = "using int32_t = int;\n\n{{ params }}\n"
    with pytest.raises(JitError, match=r"probe\.cu\.jinja:3 [^\n]*\n.*no_type"):
        JitSpec("probe", "test/probe.cu.jinja", params).build("80")


def test_error_in_an_included_template(sources):
    sources["test/part.jinja"] = "int a;\n{# x\ny #}\nBAD;\n"
    with pytest.raises(JitError, match=r"cuda_src/test/part\.jinja:4 \(rendered"):
        spec_of(sources, "int b;\n{% include 'test/part.jinja' %}\nint c;\n").build("80")


def test_error_in_a_header(sources):
    sources["test/bad.cuh"] = "#pragma once\nint a;\nBAD;\n"
    with pytest.raises(JitError, match=r"cuda_src/test/bad\.cuh:3\n.*error"):
        spec_of(sources, '#include "test/bad.cuh"\n').build("80")


def test_error_says_all_one_needs(sources):
    spec = spec_of(
        sources,
        "int error_free;\n{{ params }}\n" + "".join(f"bad{i};\n" for i in range(7)),
        ("TILE", 64),
        ("type", "f16"),
    )
    sources["test/probe.cu.jinja"] = "using int32_t = int;\n" + sources["test/probe.cu.jinja"]
    with pytest.raises(JitError) as error:
        spec.build("9.0")
    text = str(error.value)
    assert "probe (test/probe.cu.jinja: TILE=64, type=f16) for 90a" in text
    assert f"NVRTC {compiler.nvrtc_version()}" in text
    assert re.search(r"bad\d", text)[0] == "bad0" and "bad3" not in text and "... and 4 more" in text
    rendered = text.rsplit("Rendered source: ", 1)[1]
    with open(rendered) as file:
        assert file.read() == spec.source("9.0")
    assert not spec.is_built("9.0")


def test_warnings_are_no_errors(sources):
    """A warning whose text speaks of an error is not shown as the first one."""
    text = "{{ params }}\n" + _KERNEL + "    int error_unused;\n    BAD;\n}\n"
    with pytest.raises(JitError) as error:
        spec_of(sources, "using int32_t = int;\n" + text).build("80")
    assert "never referenced" not in str(error.value)


def test_arch_that_nvrtc_does_not_know():
    with pytest.raises(JitError, match=r"tiny_1 .* for 990a(.|\n)*This NVRTC knows 80, .*PYINFER_CUDA_ARCH_LIST"):
        t.tiny().build("99.0")


# ---- building --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", env.NATIVE_ARCHS)
def test_builds_for_another_arch_without_a_gpu(arch):
    artifact = t.tiny().build(arch)
    assert artifact.code.startswith(b"\x7fELF") and artifact.arch == arch and artifact.resources.registers > 0
    # The cubin's own header says how long the file is: CuPy cuts off the last byte, which must be there again.
    section_table = int.from_bytes(artifact.code[40:48], "little")
    sections, size = int.from_bytes(artifact.code[60:62], "little"), int.from_bytes(artifact.code[58:60], "little")
    program_table = int.from_bytes(artifact.code[32:40], "little")
    programs, program_size = (
        int.from_bytes(artifact.code[56:58], "little"),
        int.from_bytes(artifact.code[54:56], "little"),
    )
    assert len(artifact.code) >= max(section_table + sections * size, program_table + programs * program_size)


def test_builds_ptx():
    code = t.tiny().build("8.0+PTX").code
    assert b".target sm_80" in code and b".entry tiny_1(" in code and code.endswith(b"\0")


def test_resources_come_from_the_compiler(sources):
    text = (
        "using int32_t = int;\n{{ params }}\n" + _KERNEL + "    __shared__ int tile[100];\n    int big[64];\n"
        "    for (int i = 0; i < p.n; ++i) { big[(i * 7 + p.n) % 64] += p.out[i]; tile[i % 100] = i; }\n"
        "    __syncthreads();\n    p.out[0] = big[p.n % 64] + tile[p.n % 100];\n}\n"
    )
    resources = spec_of(sources, text).build("80").resources
    assert resources.stack == 256 and resources.smem == 400 and resources.registers >= 8 and resources.spill_stores == 0


def test_log_lines(caplog):
    with caplog.at_level(logging.INFO, "pyinfer.jit"):
        t.tiny().build("80")
        compiler.forget()
        t.tiny().build("80")
    lines = [r.getMessage() for r in caplog.records if r.name == "pyinfer.jit"]
    assert len(lines) == 2, lines  # nothing is said of a hit
    assert lines[0] == "compiling tiny_1 for 80"
    assert re.fullmatch(r"compiled tiny_1 for 80 in \d+\.\d\d s: \d+ registers, 0 bytes spilled", lines[1])


@pytest.mark.parametrize(("value", "count"), [("1", 2), ("0", 0), ("", 0)])
def test_jit_verbose(value, count, tmp_path):
    code = "import logging; t.tiny().build('80'); compiler.forget(); t.tiny().build('80')"
    process = t.start(code, env={"PYINFER_JIT_VERBOSE": value, "PYINFER_WORKSPACE_BASE": str(tmp_path / "fresh")})
    _, stderr = process.communicate(timeout=60)
    lines = [line for line in stderr.splitlines() if line.startswith("pyinfer: ")]
    assert process.returncode == 0 and len(lines) == count, stderr
    if count:
        assert lines[0] == "pyinfer: compiling tiny_1 for 80" and lines[1].startswith(
            "pyinfer: compiled tiny_1 for 80 in "
        )


def test_jit_error_forbids_lazy_compiles_only(monkeypatch):
    monkeypatch.setenv("PYINFER_JIT", "error")
    with pytest.raises(JitError) as error:
        t.tiny().build("9.0")
    assert "pyinfer build --arch 90a --match 'tiny_1'" in str(error.value)
    build_jit_specs([t.tiny()], archs=["9.0"])  # what that command does
    compiler.forget()
    assert t.tiny().build("9.0").cached


def test_no_process_no_toolkit(tmp_path):
    """R1: with an empty PATH and no toolkit in sight the first kernel builds, and no compiler is ever started.

    (CuPy's search for the NVRTC library may ask /sbin/ldconfig, which need not exist.)
    """
    code = (
        "started, events = [], ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork')\n"
        "sys.addaudithook(lambda e, a: started.append(a) if e in events and 'ldconfig' not in str(a[0]) else None)\n"
        "assert t.tiny().build('90a').code.startswith(b'\\x7fELF') and not started, started\nprint('built')"
    )
    variables = {
        "PATH": "",
        "CUDA_HOME": str(tmp_path / "none"),
        "CUDA_PATH": str(tmp_path / "none"),
        "PYINFER_WORKSPACE_BASE": str(tmp_path / "b"),
    }
    assert t.finish(t.start(code, env=variables)) == "built\n"


_BLOCK = """
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Blocker())
"""


def _failure(code, tmp_path):
    return t.finish(
        t.start(
            code + "\ntry: t.tiny().build('80')\nexcept compiler.JitError as e: print(e)",
            env={"PYINFER_WORKSPACE_BASE": str(tmp_path / "b")},
        )
    )


def test_missing_cupy_names_the_install_command(tmp_path):
    text = _failure(_BLOCK.format(blocked=("cupy", "cupy_backends")), tmp_path)
    assert "CuPy is not installed" in text and "pip install 'pyinfer-kernels[cu12]'" in text and "[cu13]" in text


def test_missing_nvrtc_names_the_install_command(tmp_path):
    code = (
        "from cupy_backends.cuda.libs import nvrtc as real\nimport types\n"
        "def getVersion(): raise RuntimeError('CuPy failed to load libnvrtc.so.12: cannot open shared object file')\n"
        "fake = types.SimpleNamespace(**{k: getattr(real, k) for k in dir(real) if not k.startswith('_')})\nfake.getVersion = getVersion\n"
        "import cupy_backends.cuda.libs as libs\nlibs.nvrtc = fake\nsys.modules['cupy_backends.cuda.libs.nvrtc'] = fake"
    )
    text = _failure(code, tmp_path)
    assert (
        "NVRTC library could not be loaded" in text
        and "libnvrtc.so.12" in text
        and "pip install 'pyinfer-kernels[cu12]'" in text
    )


def test_build_jit_specs(monkeypatch):
    seen, active, most, lock = [], 0, 0, threading.Lock()
    original = compiler.compile_source

    def compile_source(*args):
        nonlocal active, most
        with lock:
            active += 1
            most = max(most, active)
        try:
            return original(*args)
        finally:
            with lock:
                active -= 1

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    specs = [t.tiny(1), JitModule("pair", (t.tiny(2), t.tiny(3))), t.tiny(1), t.tiny(4, min_arch=90)]
    artifacts = build_jit_specs(
        specs, archs=["8.0", "9.0"], threads=2, progress=lambda done, total, a: seen.append((done, total, a.name))
    )
    assert [(a.name, a.arch) for a in artifacts] == [
        ("tiny_1", "80"), ("tiny_1", "90a"), ("tiny_2", "80"), ("tiny_2", "90a"), ("tiny_3", "80"), ("tiny_3", "90a"), ("tiny_4", "90a"),
    ]  # fmt: skip
    assert [s[:2] for s in seen] == [(i, 7) for i in range(1, 8)] and 1 <= most <= 2
    assert build_jit_specs([], archs=["8.0"]) == []


def test_build_jit_specs_raises_after_the_others_ended(sources):
    bad = spec_of(sources, "BAD;\n")
    with pytest.raises(JitError, match="probe"):
        build_jit_specs([bad, t.tiny(1), t.tiny(2)], archs=["80"], threads=1)
    assert t.tiny(1).is_built("80") and t.tiny(2).is_built("80")


def test_build_jit_specs_stops_when_interrupted():
    def progress(done, total, artifact):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_jit_specs([t.tiny(v) for v in range(60)], archs=["80"], threads=1, progress=progress)
    assert len(cache.entries()) < 60


def test_build_verbose_and_module(capsys):
    module = JitModule("pair", (t.tiny(2), t.tiny(3)))
    assert [a.name for a in module.build("80", verbose=True)] == ["tiny_2", "tiny_3"]
    assert "tiny_2 (80):" in capsys.readouterr().out
    assert pickle.loads(pickle.dumps(module)) == module


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this platform")
def test_threads_follow_the_affinity():
    code = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from pyinfer.jit.spec import _num_cpus; print(_num_cpus())"
    assert t.finish(t.start(code)) == "1\n"


def test_importing_jit_is_cheap():
    code = "import pyinfer.jit, sys; print(sorted(sys.modules.keys() & {'cupy', 'cupy_backends', 'numpy', 'jinja2', 'numba', 'torch'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir(), timeout=60
    )
    assert done.stdout == "[]\n", done.stderr
