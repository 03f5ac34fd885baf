"""Render a template, compile it with NVRTC, cache the result.

Compilation goes through CuPy's low-level NVRTC binding and needs no GPU, no driver, no CUDA toolkit and no subprocess. Headers are handed over by
content: nothing outside cuda_src is included, so there is no include path.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.jit import cache, env

if TYPE_CHECKING:
    from pyinfer.jit.spec import JitSpec

_log = logging.getLogger("pyinfer.jit")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_DIAGNOSTIC = re.compile(r"^(?P<file>[^\s(]+)\((?P<line>\d+)\): (?P<text>.*)$", re.MULTILINE)
_MARK = re.compile(r"\0([^\0]+):(\d+)\0")
BASE_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "-lineinfo")
ABI = "2"
"""Part of every key; raise it when the meaning of a cached entry changes."""
OWN_VARIABLES = ("params", "kernel_name", "arch", "block_size", "part", "embed")
"""Template variables that every spec has without naming them."""


class JitError(RuntimeError):
    """A kernel could not be compiled.

    The message names kernel, specification, architecture, NVRTC version and the first diagnostics with the template's lines.
    """


class Resources(NamedTuple):
    """What ptxas reports of a kernel (zeros for PTX, which the driver compiles later). Bytes, but for registers per thread."""

    registers: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    smem: int = 0


class Artifact(NamedTuple):
    """A compiled kernel: binary (cubin, or PTX text for a compute_NN target), compiler log, resources, seconds its compile took (on the clock, and
    of one CPU). `cached` tells that the compile took place earlier, perhaps in another process.
    """

    name: str
    arch: str
    code: bytes
    log: str
    resources: Resources
    key: str
    seconds: float = 0.0
    cached: bool = False
    cpu_seconds: float = 0.0


@functools.cache
def _environment() -> Any:
    return _make_environment(lambda name: read_source(name))


def _make_environment(load: Callable[[str], str]) -> Any:
    import jinja2

    # StrictUndefined: a constant that a spec forgot is an error, never an empty string.
    return jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # CUDA, not HTML
        loader=jinja2.FunctionLoader(load),
        cache_size=0,  # `_template` keeps them
    )


@functools.cache
def read_source(name: str) -> str:
    """The text of a file of cuda_src, by its path there ("common/types.cuh")."""
    path = files("pyinfer.cuda_src").joinpath(*name.split("/"))
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise JitError(
            f"{name} is not part of pyinfer.cuda_src ({error}). The installation is incomplete: reinstall pyinfer-kernels."
        ) from error


@functools.cache
def _template(name: str) -> Any:
    return _environment().get_template(name)


def included_headers(source: str) -> dict[str, str]:
    """Every header that `source` includes, directly or not: name → text, in order of first appearance."""
    found: dict[str, str] = {}
    pending = _INCLUDE.findall(source)
    while pending:
        name = pending.pop(0)
        if name not in found:
            found[name] = read_source(name)
            pending += _INCLUDE.findall(found[name])
    return found


def render(spec: JitSpec, arch: str) -> str:
    """The CUDA source of a spec for one architecture.

    Raises
    ------
    JitError
        If the template does not render: a constant is missing, a tag is not closed. Names the template's line.
    """
    import jinja2

    try:
        return _render(spec, arch, _template)
    except jinja2.TemplateError as error:
        raise JitError(
            f"cannot render {_describe(spec)} for {arch}:\n  {_jinja_position(error, spec)}\n      {error.message or error}"
        ) from error


def _render(spec: JitSpec, arch: str, get_template: Callable[[str], Any]) -> str:
    constants = ", ".join(f"{k}={v}" for k, v in spec.constants if "\n" not in str(v))  # on one line, as a comment
    head = f"// {spec.name}: {spec.template} for {'PTX ' + arch if arch.startswith('compute_') else 'sm_' + arch}\n// {constants}\n"

    def variables(of: JitSpec) -> dict[str, Any]:
        x, y, z = of.block
        return dict(
            of.constants,
            params=of.params.cpp_source(),
            kernel_name=of.name,
            arch=env.arch_number(arch),
            block_size=x * y * z,
            embed=embed,
        )

    def embed(other: JitSpec, part: str) -> str:
        """Another spec's template, as a device function `part` instead of a kernel (a constant may be a spec)."""
        return get_template(other.template).render(variables(other), part=part)

    return head + get_template(spec.template).render(variables(spec))


def _jinja_position(error: Any, spec: JitSpec) -> str:
    """Template and line of an error raised by Jinja, which puts templates into the traceback as if they were modules."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == "<template>"]
    line = getattr(error, "lineno", None) or (frames[-1].lineno if frames else None)
    name = getattr(error, "name", None) or spec.template
    return f"cuda_src/{name}:{line}" if line else f"cuda_src/{name}"


def _describe(spec: JitSpec) -> str:
    return f"{spec.name} ({spec.template}: {', '.join(f'{k}={v}' for k, v in spec.constants)})"


@functools.cache
def nvrtc() -> Any:
    """CuPy's low-level NVRTC binding.

    Raises
    ------
    JitError
        If CuPy or the NVRTC library is missing, with the command that installs them.
    """
    fix = "Install them with: pip install 'pyinfer-kernels[cu12]' (or [cu13])."
    try:
        from cupy_backends.cuda.libs import nvrtc as binding

        binding.getVersion()
    except ImportError as error:
        raise JitError(f"CuPy is not installed ({error}); CUDA kernels need CuPy and NVRTC. {fix}") from error
    except Exception as error:
        raise JitError(f"the NVRTC library could not be loaded ({error}). {fix}") from error
    return binding


@functools.cache
def nvrtc_version() -> str:
    """'12.9', '13.0', ..."""
    major, minor = nvrtc().getVersion()
    return f"{major}.{minor}"


def options_for(spec: JitSpec, arch: str) -> tuple[str, ...]:
    """The NVRTC command line of a spec."""
    target = arch if arch.startswith("compute_") else f"sm_{arch}"
    no_ptxas = target.startswith("compute_") or bool(spec.link)
    base = tuple(o for o in BASE_OPTIONS if not (no_ptxas and o.startswith("--ptxas")))
    return (f"-arch={target}", *base, *(("-dlto",) if spec.link else ()), *spec.options)


def _linked_parts(spec: JitSpec) -> tuple[str, ...]:
    """What of the key belongs to functions that are linked in: their text, and the versions of what compiles and links them."""
    if not spec.link:
        return ()
    from pyinfer.jit import variant_link

    return (*(repr(f) for f in spec.link), variant_link.toolchain())


@functools.lru_cache(maxsize=4096)
def cache_key(spec: JitSpec, arch: str) -> str:
    """sha256 of all that decides the binary: rendered source, header bytes, options, NVRTC version, architecture."""
    source = render(spec, arch)
    try:
        headers = included_headers(source)
    except JitError as error:
        raise JitError(f"cannot build {_describe(spec)} for {arch}: {error}") from error
    return cache.digest(
        ABI,
        source,
        *[part for item in sorted(headers.items()) for part in item],
        *sorted(options_for(spec, arch)),
        *_linked_parts(spec),
        nvrtc_version(),
        arch,
    )


@functools.cache
def _shipped_sources() -> tuple[frozenset[str], str]:
    """The files of cuda_src (as paths there), and one sha256 over the bytes of all."""
    found: dict[str, bytes] = {}

    def walk(folder: Any, prefix: str) -> None:
        for entry in folder.iterdir():
            if entry.is_dir():
                walk(entry, f"{prefix}{entry.name}/")
            elif entry.name.endswith((".cuh", ".jinja")):
                found[prefix + entry.name] = entry.read_bytes()

    walk(files("pyinfer.cuda_src"), "")
    return frozenset(found), cache.digest(*[part for item in sorted(found.items()) for part in item])


@functools.lru_cache(maxsize=4096)
def _quick_key(spec: JitSpec, arch: str) -> str | None:
    """Stands for `cache_key` without rendering: sha256 of the spec, every file of cuda_src, options, NVRTC version, architecture.

    None for a template that is not shipped.

    NOTE: Jinja takes 25 ms to import, half of a first call that finds its kernel on disk. Any edit in cuda_src changes the key, and the full one decides.
    """
    names, digest = _shipped_sources()
    if spec.template not in names:
        return None
    options = sorted(options_for(spec, arch))
    return cache.digest(ABI, repr(spec), digest, *options, *_linked_parts(spec), nvrtc_version(), arch)


_artifacts: dict[str, Artifact] = {}
_key_locks: dict[str, threading.Lock] = {}
_guard = threading.Lock()


def forget() -> None:
    """Drop what this process has built (see `cache.clear_cache_dir`)."""
    with _guard:
        _artifacts.clear()
    for cached in (cache_key, read_source, _template, _shipped_sources, _quick_key):  # an edited template is read again
        cached.cache_clear()


def _after_fork() -> None:
    """In a forked child no thread is left that would ever release a lock held during the fork."""
    global _guard
    _guard = threading.Lock()
    _key_locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def build(spec: JitSpec, arch: str, *, ahead: bool = False) -> Artifact:
    """The compiled kernel: from this process, from the disk cache, or from NVRTC. Threads and processes that want one key compile it once.

    `ahead` allows compiling under `PYINFER_JIT=error`.
    """
    quick = _quick_key(spec, arch)
    known = None if quick is None else _artifacts.get(quick) or _recall(spec, arch, quick)
    if known is not None:
        return known
    key = cache_key(spec, arch)
    found = _artifacts.get(key)
    if found is not None:
        return found
    with _guard:
        lock = _key_locks.setdefault(key, threading.Lock())
    with lock:
        found = _artifacts.get(key) or _from_disk(spec, arch, key)
        if found is None:
            if not ahead:
                _refuse_if_forbidden(spec, arch)
            with cache.build_lock(arch, spec.name, key) as may_write:
                found = _from_disk(spec, arch, key) or _compile(spec, arch, key, may_write)
        _artifacts[key] = found
        if quick is not None:
            _artifacts[quick] = found
            cache.remember(arch, spec.name, quick, key)
    return found


def _recall(spec: JitSpec, arch: str, quick: str) -> Artifact | None:
    """What an earlier process found under this quick key, if its entry is still good."""
    key = cache.recall(arch, spec.name, quick)
    found = None if key is None else _artifacts.get(key) or _from_disk(spec, arch, key)
    if key is not None and found is not None:
        _artifacts[key] = _artifacts[quick] = found
    return found


def _from_disk(spec: JitSpec, arch: str, key: str) -> Artifact | None:
    hit = cache.find(arch, spec.name, key)
    if hit is None:
        return None
    code, header = hit
    log = str(header.get("log", ""))
    return Artifact(spec.name, arch, code, log, _resources(log), key, header["seconds"], True, header["cpu_seconds"])


def _refuse_if_forbidden(spec: JitSpec, arch: str) -> None:
    if os.environ.get("PYINFER_JIT", "").lower() == "error":
        raise JitError(
            f"{spec.name} is not in the cache for {arch} and PYINFER_JIT=error forbids compiling on first use. "
            f"Build it ahead: pyinfer build --arch {arch} --match '{spec.name}', or pyinfer.warmup(...) for a whole model"
        )


@functools.cache
def _follow_verbose() -> None:
    """`PYINFER_JIT_VERBOSE=1`: show this logger's lines on stderr, whatever the program's own logging does."""
    if os.environ.get("PYINFER_JIT_VERBOSE", "") not in ("", "0"):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("pyinfer: %(message)s"))
        _log.addHandler(handler)
        _log.setLevel(min(_log.getEffectiveLevel(), logging.INFO))


def _compile(spec: JitSpec, arch: str, key: str, may_write: bool) -> Artifact:
    _follow_verbose()
    source = render(spec, arch)
    headers = included_headers(source)
    _log.info("compiling %s for %s", spec.name, arch)
    start, cpu_start = time.perf_counter(), time.thread_time()
    try:
        code, log = compile_source(source, f"{spec.name}.cu", headers, options_for(spec, arch), spec, arch)
        if spec.link:
            from pyinfer.jit import variant_link

            code, log = variant_link.link(spec, code, arch)
    except JitError as error:
        path = cache.store_source(arch, spec.name, key, source)
        raise JitError(
            f"{error}\nRendered source: {path or 'JitSpec.source() gives it; no folder could be written'}"
        ) from None
    seconds, cpu_seconds = time.perf_counter() - start, time.thread_time() - cpu_start
    resources = _resources(log)
    _log.info(
        "compiled %s for %s in %.2f s: %d registers, %d bytes spilled",
        spec.name,
        arch,
        seconds,
        resources.registers,
        resources.spill_stores,
    )
    artifact = Artifact(spec.name, arch, code, log, resources, key, seconds, False, cpu_seconds)
    if may_write:
        cache.store(
            arch,
            spec.name,
            key,
            code,
            {
                "log": log,
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "nvrtc": nvrtc_version(),
                "template": spec.template,
            },
            source,
        )
    return artifact


def compile_source(
    source: str,
    file_name: str,
    headers: dict[str, str],
    options: tuple[str, ...],
    spec: JitSpec | None = None,
    arch: str = "",
) -> tuple[bytes, str]:
    """Compile CUDA source. Returns (cubin or PTX, log).

    Raises
    ------
    JitError
        With NVRTC's first diagnostics.
    """
    binding = nvrtc()
    # CuPy takes the source and its name as str, headers and theirs as bytes.
    program = binding.createProgram(
        source, file_name, [text.encode() for text in headers.values()], [name.encode() for name in headers]
    )
    try:
        try:
            binding.compileProgram(program, options)
        except binding.NVRTCError as error:
            raise JitError(
                _describe_failure(binding.getProgramLog(program) or str(error), source, file_name, spec, arch)
            ) from None
        log = binding.getProgramLog(program)
        if "-dlto" in options:
            return binding.getLTOIR(program), log
        if any(o.startswith("-arch=compute_") for o in options):
            ptx = binding.getPTX(program)
            return (ptx if isinstance(ptx, bytes) else ptx.encode()) + b"\0", log
        # NOTE: CuPy's getCUBIN drops the last byte of the image; the cubin's own length fields count it.
        return binding.getCUBIN(program) + b"\0", log
    finally:
        binding.destroyProgram(program)


def _resources(log: str) -> Resources:
    def number(pattern: str) -> int:
        return max((int(m) for m in re.findall(pattern, log)), default=0)

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores"),
        number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes smem"),
    )


def _describe_failure(log: str, source: str, file_name: str, spec: JitSpec | None, arch: str) -> str:
    found = list(_DIAGNOSTIC.finditer(log))
    errors = [m for m in found if m["text"].startswith(("error", "catastrophic error"))] or found
    rendered = source.splitlines()
    lines = []
    for m in errors[:3]:
        number = int(m["line"])
        if m["file"] != file_name:
            where = f"cuda_src/{m['file']}:{number}"
        elif spec is None:
            where = f"{file_name}:{number}"
        else:
            template, line = template_line(spec, arch, number)
            where = f"cuda_src/{template}:{line} (rendered line {number})"
        if m["file"] == file_name and 0 < number <= len(rendered):
            where += f"\n      {rendered[number - 1].strip()}"
        lines.append(f"  {where}\n      {m['text']}")
    if len(errors) > 3:
        lines.append(f"  ... and {len(errors) - 3} more")
    details = "\n".join(lines) or log.strip()[:2000]
    if "gpu-architecture" in details:
        known = ", ".join(str(a) for a in nvrtc().getSupportedArchs() if a >= 80)
        details += (
            f"\n  This NVRTC knows {known}. Install a newer one, or set PYINFER_CUDA_ARCH_LIST, e.g. to '9.0+PTX', "
            "which the driver compiles for newer GPUs."
        )
    what = _describe(spec) if spec else file_name
    return f"NVRTC {nvrtc_version()} could not compile {what} for {arch or 'the given options'}:\n{details}"


def template_line(spec: JitSpec, arch: str, rendered_line: int) -> tuple[str, int]:
    """The template, or the file it includes with Jinja, and the line there that a rendered line came from.

    The template is rendered once more with its name and line number in front of every line break of its text. A rendered line without a mark came out of an
    expression of several lines, so that the next mark names the line of the expression's end.
    """
    rendered = _render(spec, arch, _make_environment(lambda name: _mark_lines(name, read_source(name))).get_template)
    for line in rendered.split("\n")[rendered_line - 1 :]:
        found = _MARK.findall(line)
        if found:
            return found[-1][0], int(found[-1][1])
    return spec.template, max(len(read_source(spec.template).splitlines()), 1)


def _mark_lines(name: str, text: str) -> str:
    # Only Jinja's own lexer knows what is text and what belongs to a tag, however many lines a tag takes.
    parts = []
    for start, kind, value in _environment().lexer.tokeniter(text, name):
        if kind == "data":
            lines = value.split("\n")
            value = "\n".join([*(f"{line}\0{name}:{start + i}\0" for i, line in enumerate(lines[:-1])), lines[-1]])
        parts.append(value)
    return "".join(parts)
