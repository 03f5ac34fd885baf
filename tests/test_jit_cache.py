"""The kernel cache: what decides a key, many builders at once, damage, full and read-only disks, and the commands over it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import pwd
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest

from pyinfer.jit import cache, clear_cache_dir, compiler, env
from tests import jit_template as t

pytestmark = pytest.mark.compile
ARCH = "80"


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    """A cache of the test's own, the tiny template known, nothing remembered from earlier tests."""
    folder = tmp_path / "base"
    for name in ("PYINFER_CACHE_DIR", "XDG_CACHE_HOME", "PYINFER_JIT", "PYINFER_JIT_LOCK_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(folder))
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(compiler, "read_source", t.reader())
    monkeypatch.setattr(cache, "_warned", set())
    compiler.forget()
    yield folder
    monkeypatch.undo()
    compiler.forget()


@pytest.fixture
def compiles(tmp_path, monkeypatch):
    """A function that tells how many compiles there were since it was last asked."""
    log = tmp_path / "compiles"
    monkeypatch.setattr(compiler, "compile_source", t.count_compiles(log))

    def count():
        n = len(log.read_text().splitlines()) if log.exists() else 0
        log.unlink(missing_ok=True)
        return n

    return count


def build(value=1):
    """Build as a new process would: from the disk or the compiler, not from memory."""
    compiler.forget()
    return t.tiny(value).build(ARCH)


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---- the key ---------------------------------------------------------------------------------------------------------------------


def test_second_build_is_a_hit(compiles):
    first = build()
    assert compiles() == 1 and not first.cached
    second = build()
    assert compiles() == 0 and second.cached
    assert (second.code, second.log, second.resources, second.key) == (
        first.code,
        first.log,
        first.resources,
        first.key,
    )
    assert first.code.startswith(b"\x7fELF") and first.resources.registers > 0


def test_key_depends_on_all_that_decides_the_binary(monkeypatch):
    def key(spec=None, arch=ARCH):
        compiler.cache_key.cache_clear()
        return compiler.cache_key(spec or t.tiny(), arch)

    keys = [key(), key(t.tiny(2)), key(t.tiny(options=("-DX=1",))), key(arch="90a"), key(arch="compute_80")]
    for name, text in ((t.TEMPLATE, t.SOURCES[t.TEMPLATE] + " "), (t.HEADER, t.SOURCES[t.HEADER].replace("7", "8"))):
        with monkeypatch.context() as m:
            m.setattr(compiler, "read_source", t.reader({**t.SOURCES, name: text}))
            compiler._template.cache_clear()
            keys.append(key())
    with monkeypatch.context() as m:
        m.setattr(compiler, "nvrtc_version", lambda: "99.9")
        keys.append(key())
    with monkeypatch.context() as m:
        m.setattr(compiler, "ABI", "next")
        keys.append(key())
    compiler._template.cache_clear()
    assert len(set(keys)) == len(keys)
    assert key() == keys[0]


def test_header_of_a_header_counts(monkeypatch):
    sources = {
        **t.SOURCES,
        t.HEADER: t.SOURCES[t.HEADER] + '#  include  "test/inner.cuh"\n',
        "test/inner.cuh": "constexpr int A = 1;\n",
    }
    monkeypatch.setattr(compiler, "read_source", t.reader(sources))
    before = build().key
    sources["test/inner.cuh"] = "constexpr int A = 2;\n"
    assert build().key != before


def test_changed_header_byte_is_a_miss(compiles, monkeypatch):
    sources = dict(t.SOURCES)
    monkeypatch.setattr(compiler, "read_source", t.reader(sources))
    first = build()
    sources[t.HEADER] = sources[t.HEADER].replace("OFFSET = 7", "OFFSET = 8")
    second = build()
    assert compiles() == 2 and first.code != second.code
    sources[t.HEADER] = t.SOURCES[t.HEADER]
    assert build().code == first.code and compiles() == 0


def test_touched_reinstalled_and_moved_package_is_a_hit(base, tmp_path):
    """A copy of the package elsewhere, every file with a new time: the same keys, so no compile."""
    t.finish(t.start("t.tiny().build('80')"))
    copy = tmp_path / "elsewhere"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("pyinfer", "cuda_src", "schedulers"):
        source = t.ROOT / folder
        if not source.exists():  # an installed package holds the two others
            continue
        shutil.copytree(source, copy / folder, ignore=ignore, copy_function=shutil.copyfile)
    (copy / "tests").mkdir()
    for name in ("__init__.py", "jit_template.py"):
        shutil.copyfile(t.ROOT / "tests" / name, copy / "tests" / name)
    code = "import pyinfer; print(Path(pyinfer.__file__).parent.parent); print(t.tiny().build('80').cached)"
    assert t.finish(t.start(code, cwd=copy)).split() == [str(copy), "True"]


def test_times_and_order_of_constants_leave_no_trace_in_the_entry_name(base):
    path = t.tiny().cache_path(ARCH)
    build()
    assert t.tiny().cache_path(ARCH) == path and path.exists() and t.tiny().is_built(ARCH)
    assert path.parent == base / env.version() / ARCH / "cached_ops"
    assert (base / env.version() / ARCH / "generated" / (path.stem + ".cu")).read_text() == t.tiny().source(ARCH)


# ---- many at once ----------------------------------------------------------------------------------------------------------------


def test_16_processes_compile_once(tmp_path, base):
    log, go = tmp_path / "compiles", tmp_path / "go"
    code = f"""
compiler.compile_source = t.count_compiles(Path({str(log)!r}), 0.2)
compiler.nvrtc()
Path({str(tmp_path)!r}, f"ready{{os.getpid()}}").touch()
t.wait_for(Path({str(go)!r}))
artifact = t.tiny().build("80")
print(len(artifact.code), artifact.cached)
"""
    processes = [t.start(code) for _ in range(16)]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready*"))) < 16:
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            p.communicate() for p in processes if p.poll()
        ]
        time.sleep(0.01)
    go.touch()
    results = [t.finish(p).split() for p in processes]
    assert len(log.read_text().splitlines()) == 1
    assert {size for size, _ in results} == {str(len(build().code))}
    assert sorted(cached for _, cached in results) == ["False"] + ["True"] * 15


def test_16_threads_compile_once(compiles):
    results, barrier = [], threading.Barrier(16)

    def work():
        barrier.wait()
        results.append(t.tiny().build(ARCH))

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert compiles() == 1 and len(results) == 16 and len({id(r) for r in results}) == 1


def test_stopped_holder_holds_nobody_up(tmp_path, base, compiles, monkeypatch, caplog):
    started = tmp_path / "started"
    holder = t.start(
        f"compiler.compile_source = lambda *a: (Path({str(started)!r}).touch(), time.sleep(600))\nt.tiny().build('80')"
    )
    try:
        t.wait_for(started)
        os.kill(holder.pid, signal.SIGSTOP)
        monkeypatch.setenv("PYINFER_JIT_LOCK_TIMEOUT", "0.3")
        begin = time.monotonic()
        artifact = build()
        assert 0.25 < time.monotonic() - begin < 20
        assert compiles() == 1 and artifact.code.startswith(b"\x7fELF")
        assert len(warnings(caplog)) == 1 and "tiny_1" in warnings(caplog)[0]
        assert not t.tiny().is_built(ARCH) and cache.entries() == []
    finally:
        holder.kill()
        holder.communicate()
    caplog.clear()
    assert not build().cached and t.tiny().is_built(ARCH)  # the lock died with its holder
    assert compiles() == 1 and warnings(caplog) == []


def test_lock_is_released_even_if_a_child_was_forked(base):
    child = 0
    try:
        with cache.build_lock(ARCH, "x", "key") as held:
            assert held
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
        with open(next(base.rglob("*.lock")), "a+b") as file:
            assert cache._try_lock(file)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_child_forked_during_a_build_can_build(monkeypatch):
    """The forking thread's build never ends in the child: no lock of it may be waited for."""
    inside, leave = threading.Event(), threading.Event()
    original = compiler.compile_source

    def slow(*args):
        inside.set()
        leave.wait(30)
        return original(*args)

    monkeypatch.setattr(compiler, "compile_source", slow)
    monkeypatch.setenv("PYINFER_JIT_LOCK_TIMEOUT", "0.1")
    thread = threading.Thread(target=build)
    thread.start()
    assert inside.wait(30)
    child = os.fork()
    if child == 0:
        compiler.compile_source = lambda *args: (b"binary", "")
        os._exit(0 if t.tiny().build(ARCH).code == b"binary" else 1)
    try:
        deadline = time.monotonic() + 20
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            assert time.monotonic() < deadline, "the child waits for a lock that nobody will release"
            time.sleep(0.01)
        assert ended[1] == 0
    finally:
        leave.set()
        thread.join(30)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_bad_lock_timeout_is_named(monkeypatch):
    monkeypatch.setenv("PYINFER_JIT_LOCK_TIMEOUT", "soon")
    with pytest.raises(ValueError, match=r"PYINFER_JIT_LOCK_TIMEOUT.*'soon'"):
        build()


# ---- killed, truncated, flipped --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_killed_while_writing(tmp_path, base, function, compiles):
    stalled = tmp_path / "stalled"
    process = t.start(
        f"os.{function} = lambda *a: (Path({str(stalled)!r}).touch(), time.sleep(600))\nt.tiny().build('80')"
    )
    t.wait_for(stalled)
    process.kill()
    process.communicate()
    assert list(base.rglob(".tmp-*")) and cache.entries() == []
    assert not build().cached and compiles() == 1
    assert build().cached and compiles() == 0
    cache.prune(keep_current_version=True)
    assert not list(base.rglob(".tmp-*")) and build().cached


def test_killed_at_any_moment(base, rng):
    """A writer that replaces one entry over and over is killed 100 times; a reader never sees anything but a whole entry."""
    key = "0" * 64
    payload = rng.bytes(300_000)
    cache.store(ARCH, "victim", key, payload, {}, "")
    for _ in range(100):
        child = os.fork()
        if child == 0:
            with cache.build_lock(ARCH, "victim", key):
                while True:
                    cache.store(ARCH, "victim", key, payload, {}, "")
        time.sleep(float(rng.uniform(0.0, 0.008)))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = cache.find(ARCH, "victim", key)
        assert found is not None and found[0] == payload
        with cache.build_lock(ARCH, "victim", key) as held:
            assert held
    assert cache.verify()[1] == [] and not list(base.rglob("*.bad"))


def damage(kind, data):
    header = data.index(b"\n")
    flips = {
        "magic": 12,
        "length": data.index(b'"length"') + 10,
        "key": data.index(b'"key"') + 9,
        "log": data.index(b'"log"') + 9,
    }
    if kind in flips:
        at = flips[kind]
        return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    return {
        "empty": b"",
        "truncated header": data[: header // 2],
        "header only": data[: header + 1],
        "truncated payload": data[:-1],
        "one byte more": data + b"x",
        "no newline": data.replace(b"\n", b" "),
        "first payload byte": data[: header + 1] + bytes([data[header + 1] ^ 0x80]) + data[header + 2 :],
        "last payload byte": data[:-1] + bytes([data[-1] ^ 1]),
        "not JSON": b"\x00\xff\n" + data,
        "JSON of another kind": b"[1]\n" + data[header + 1 :],
        "deep JSON": b"[" * 200_000 + b"\n",
        "another version of the format": data.replace(b"pyinfer-kernel-1", b"pyinfer-kernel-0"),
    }[kind]


KINDS = (
    "empty", "truncated header", "header only", "truncated payload", "one byte more", "no newline", "first payload byte", "last payload byte",
    "not JSON", "JSON of another kind", "deep JSON", "another version of the format", "magic", "length", "key", "log",
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_entry_is_set_aside_and_rebuilt(kind, base, compiles, caplog):
    good = build()
    path = t.tiny().cache_path(ARCH)
    bad = damage(kind, path.read_bytes())
    path.write_bytes(bad)
    assert compiles() == 1
    rebuilt = build()
    assert compiles() == 1 and rebuilt.code == good.code
    assert path.with_suffix(".bad").read_bytes() == bad
    assert len(warnings(caplog)) == 1 and str(path) in warnings(caplog)[0]
    assert build().cached and compiles() == 0


def test_every_flipped_byte_is_noticed(base, rng):
    build()
    data = t.tiny().cache_path(ARCH).read_bytes()
    whole = cache._parse(data)
    header = data.index(b"\n") + 1
    positions = [*range(header), *rng.choice(range(header, len(data)), 300, replace=False)]
    passed = []
    for at in positions:
        flipped = data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1 :]
        parsed = cache._parse(flipped)
        if parsed is not None:
            passed.append(at)
            assert parsed == whole, f"byte {at}: {data[at]} -> {flipped[at]}"
    # What may pass is a white space for another between the tokens of the JSON, or a digit beyond the precision of a time.
    assert len(passed) <= len(data[:header].split()) + 4 and max(passed, default=0) < header


def test_entry_under_another_key_is_not_taken(compiles):
    """A file renamed by hand, or a hash of which only the first 40 digits agree."""
    build(1)
    shutil.copyfile(t.tiny(1).cache_path(ARCH), t.tiny(2).cache_path(ARCH))
    compiles()
    assert build(2).name == "tiny_2" and compiles() == 1


# ---- nowhere to write ------------------------------------------------------------------------------------------------------------

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_RDONLY, _MNT_DETACH = 1, 2


@contextlib.contextmanager
def mounted(folder, *, read_only=False, size="64k"):
    folder.mkdir(exist_ok=True)
    if _LIBC.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", _MS_RDONLY if read_only else 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")
    try:
        yield folder
    finally:
        _LIBC.umount2(os.fsencode(folder), _MNT_DETACH)


def _can_mount():
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(OSError, AttributeError), mounted(Path(folder)):
        return True
    return False


# A mounted file system is the real thing, but needs privileges; the emulation runs everywhere.
REAL = ["mount"] if _can_mount() else []


@pytest.fixture(params=["emulated", *REAL])
def full_disk(request, tmp_path, monkeypatch):
    """A folder on a full disk."""
    if request.param == "mount":
        with mounted(tmp_path / "full") as folder:
            with contextlib.suppress(OSError), open(folder / "ballast", "wb", buffering=0) as file:
                while True:
                    file.write(b"x" * 4096)
            yield folder
        return
    folder = tmp_path / "full"
    folder.mkdir()

    def fsync(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    yield folder


@pytest.fixture(params=["file", "nobody's file", *REAL])
def read_only(request, tmp_path):
    """A folder that cannot be written. As root no mode protects one: a file stands in its way, or it is mounted read-only."""
    if request.param == "mount":
        with mounted(tmp_path / "readonly", read_only=True) as folder:
            yield folder
    else:
        path = tmp_path / "readonly"
        path.write_text("")
        yield path if request.param == "file" else path / "below"


def test_full_disk(full_disk, monkeypatch, compiles, caplog):
    monkeypatch.setattr(env, "cache_bases", lambda: [full_disk])
    artifact = t.tiny().build(ARCH)
    assert artifact.code.startswith(b"\x7fELF") and compiles() == 1
    assert (
        len(warnings(caplog)) == 1 and "memory only" in warnings(caplog)[0] and "No space left" in warnings(caplog)[0]
    )
    assert cache.entries() == [] and not list(full_disk.rglob(".tmp-*"))
    assert t.tiny().build(ARCH) is artifact and compiles() == 0


def test_read_only_home(read_only, tmp_path, monkeypatch, compiles, caplog):
    monkeypatch.delenv("PYINFER_WORKSPACE_BASE")
    monkeypatch.setenv("HOME", str(read_only))
    build(1)
    build(2)
    assert compiles() == 2
    assert len(warnings(caplog)) == 1 and str(read_only) in warnings(caplog)[0]
    assert build(1).cached and build(2).cached  # in the temporary directory
    assert {e.name for e in cache.entries()} == {"tiny_1", "tiny_2"}
    assert all(str(e.path).startswith(str(tmp_path / "tmp")) for e in cache.entries())


def test_home_unset(tmp_path, monkeypatch, compiles):
    def getpwuid(uid):
        raise KeyError(uid)

    monkeypatch.delenv("PYINFER_WORKSPACE_BASE")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", getpwuid)
    assert env.cache_bases() == [tmp_path / "tmp" / f"pyinfer-{os.getuid()}"]
    build()
    assert build().cached and compiles() == 1


def test_no_writable_place_at_all(read_only, monkeypatch, compiles, caplog):
    def gettempdir():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(read_only))
    monkeypatch.setenv("HOME", str(read_only))
    monkeypatch.setattr(tempfile, "gettempdir", gettempdir)
    artifacts = [t.tiny(v).build(ARCH) for v in (1, 2, 1, 2)]
    assert compiles() == 2 and artifacts[0] is artifacts[2] and artifacts[1] is artifacts[3]
    assert len(warnings(caplog)) == 1 and "PYINFER_WORKSPACE_BASE" in warnings(caplog)[0]
    assert cache.entries() == [] and cache.prune() == (0, 0) and cache.verify() == ([], [])


def test_readable_cache_that_cannot_be_written(base, tmp_path, monkeypatch, compiles):
    """A warmed cache in an image: read in place, new kernels go to the next folder."""
    build(1)
    monkeypatch.setattr(env, "cache_bases", lambda: [base, tmp_path / "second"])
    write = cache._write_atomically

    def refuse(path, data):
        if path.is_relative_to(base):
            raise PermissionError(errno.EACCES, "Permission denied")
        write(path, data)

    monkeypatch.setattr(cache, "_write_atomically", refuse)
    assert build(1).cached and not build(2).cached and build(2).cached
    assert t.tiny(2).cache_path(ARCH).is_relative_to(tmp_path / "second")
    assert compiles() == 2


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o000, 0o077])
def test_temporary_folder_is_private(umask, tmp_path, monkeypatch, compiles):
    monkeypatch.setattr(env, "cache_bases", lambda: [env.temporary_base()])
    old = os.umask(umask)
    try:
        build()
    finally:
        os.umask(old)
    assert env.temporary_base().stat().st_mode & 0o777 == 0o700
    assert build().cached and compiles() == 1


@pytest.mark.parametrize("planted", ["folder", "link"])
def test_temporary_folder_of_somebody_else_is_not_used(planted, tmp_path, monkeypatch, compiles, caplog):
    """Whoever may write there could hand us machine code."""
    folder = env.temporary_base()
    if planted == "folder":
        folder.mkdir()
        folder.chmod(0o777)
    else:
        (tmp_path / "theirs").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "theirs")
    monkeypatch.setattr(env, "cache_bases", lambda: [folder])
    build()
    assert not build().cached and compiles() == 2
    assert len(warnings(caplog)) == 1 and list(folder.iterdir()) == []


def test_folder_names(monkeypatch, tmp_path):
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", "~/a")  # from a unit file: no shell has expanded it
    monkeypatch.setenv("PYINFER_CACHE_DIR", "b")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    assert env.cache_bases()[:4] == [
        home / "a",
        tmp_path / "b",
        tmp_path / "c" / "pyinfer",
        home / ".cache" / "pyinfer",
    ]
    assert len(env.cache_bases()) == 5


def test_imports_create_nothing(tmp_path):
    home = tmp_path / "empty"
    home.mkdir()
    variables = {
        "HOME": str(home),
        "TMPDIR": str(home),
        "XDG_CACHE_HOME": str(home / "x"),
        "PYINFER_WORKSPACE_BASE": str(home / "y"),
    }
    variables["PYTHONDONTWRITEBYTECODE"] = "1"
    code = "import pyinfer.jit\nt.tiny().source('80'), env.PYINFER_JIT_DIR, env.cache_bases(), cache.entries(), cache.prune()\nassert 'cupy' not in sys.modules"
    t.finish(t.start(code, env=variables))
    assert list(home.iterdir()) == []


# ---- commands --------------------------------------------------------------------------------------------------------------------


def test_entries_verify_prune(base):
    for value in (1, 2, 3):
        build(value)
    found = cache.entries()
    assert [e.name for e in found] == ["tiny_1", "tiny_2", "tiny_3"] and {e.arch for e in found} == {ARCH}
    assert all(
        e.size == e.path.stat().st_size and compiler.cache_key(t.tiny(i), ARCH).startswith(e.key)
        for i, e in enumerate(found, 1)
    )

    found[1].path.write_bytes(b"junk")
    good, bad = cache.verify(quarantine=False)
    assert (
        [e.name for e in good] == ["tiny_1", "tiny_3"]
        and [e.name for e in bad] == ["tiny_2"]
        and len(cache.entries()) == 3
    )
    assert [e.name for e in cache.verify()[1]] == ["tiny_2"] and len(cache.entries()) == 2
    assert found[1].path.with_suffix(".bad").exists()

    os.utime(found[0].path, (time.time() - 1000,) * 2)
    size = found[0].path.stat().st_size
    assert cache.prune(older_than=500) == (1, size)
    assert [e.name for e in cache.entries()] == ["tiny_3"]
    assert cache.prune(keep_current_version=True)[0] == 4  # the quarantined file and three locks
    assert build(3).cached
    cache.prune()
    assert cache.entries() == [] and not [p for p in base.rglob("*") if p.is_file()]


def test_prune_leaves_what_is_not_ours(base):
    build()
    folder = t.tiny().cache_path(ARCH).parent
    (folder / "notes.txt").write_text("mine")
    (folder / "strange.kernel").write_text("no key in its name")
    (folder / "a.b.kernel").mkdir()
    assert {e.name for e in cache.entries()} == {"tiny_1", "a"}
    assert [e.name for e in cache.verify()[0]] == ["tiny_1"]
    cache.prune()
    assert (folder / "notes.txt").exists()


def test_prune_of_other_versions(base):
    build()
    old = base / "0.0.1" / ARCH / "cached_ops" / "x.00.kernel"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    cache.prune(keep_current_version=True)
    assert not old.exists() and build().cached


def test_clear_cache_dir(compiles):
    build()
    clear_cache_dir()
    assert cache.entries() == []
    t.tiny().build(ARCH)
    assert compiles() == 2


def test_writer_survives_a_prune(base, monkeypatch, compiles):
    """`pyinfer cache prune` while another process writes: its temporary file is gone when it wants to move it."""
    replace = os.replace

    def pruned(*args):
        monkeypatch.setattr(os, "replace", replace)
        cache.prune()
        return replace(*args)

    monkeypatch.setattr(os, "replace", pruned)
    assert build().code and build().code and compiles() >= 1


def test_header_holds_provenance(base):
    build()
    header = json.loads(t.tiny().cache_path(ARCH).read_bytes().split(b"\n")[0])
    assert (header["name"], header["arch"], header["template"]) == ("tiny_1", ARCH, t.TEMPLATE)
    assert header["nvrtc"] == compiler.nvrtc_version() and header["seconds"] > 0
