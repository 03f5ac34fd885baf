"""The one cache of compiled kernels: content-addressed, shared by processes, healing itself.

An entry's key is the sha256 of everything that decides the binary (rendered source, the bytes of every included header, options,
NVRTC version, architecture). Times and paths play no part. An entry is one file, `<version>/<arch>/cached_ops/<name>.<key>.kernel`:
one line of JSON (length and sha256 of what follows, compiler log, provenance), then the binary. It is written to a temporary file
and moved into place, so readers need no lock; a bad entry is set aside and built again. Builders hold an advisory lock that dies
with its process, and wait for it only so long.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pyinfer.jit import env

_log = logging.getLogger("pyinfer.jit")
_MAGIC = "pyinfer-kernel-1"
_OUR_FILES = (
    "cached_ops/*.kernel",
    "cached_ops/*.bad",
    "cached_ops/.tmp-*",
    "generated/*.cu",
    "recall/*.key",
    "recall/.tmp-*",
    "generated/.tmp-*",
    "locks/*.lock",
)
_warned: set[str] = set()


class Entry(NamedTuple):
    """One entry on disk, as `pyinfer cache ls` shows it."""

    path: Path
    name: str
    arch: str
    key: str
    size: int
    modified: float


def digest(*parts: bytes | str) -> str:
    """sha256 over length-prefixed parts, so that no two part lists collide."""
    h = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def _warn_once(topic: str, text: str, *args: object) -> None:
    if topic not in _warned:
        _warned.add(topic)
        _log.warning(text, *args)


def _safe_base(base: Path) -> bool:
    """A folder in the shared temporary directory is trusted only if it is ours alone: kernels are code."""
    if not hasattr(os, "getuid") or base != env.temporary_base():
        return True
    try:
        status = base.lstat()  # of a link itself: its owner could point it elsewhere later
    except OSError:
        return True
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _make_folder(base: Path, folder: Path) -> None:
    """Create a folder below `base`. Raises OSError where that cannot be, or must not be used."""
    if base == env.temporary_base():
        base.mkdir(parents=True, exist_ok=True, mode=0o700)  # whatever the umask: `_safe_base` wants it ours alone
    if not _safe_base(base):
        raise PermissionError(f"{base} belongs to somebody else, or others may write there")
    folder.mkdir(parents=True, exist_ok=True)


def _entry_path(base: Path, arch: str, name: str, key: str) -> Path:
    return base / env.version() / arch / "cached_ops" / f"{name}.{key[:40]}.kernel"


def find(arch: str, name: str, key: str) -> tuple[bytes, dict[str, Any]] | None:
    """The binary and header of an entry, or None. A damaged entry is quarantined and counts as missing."""
    for base in env.cache_bases():
        path = _entry_path(base, arch, name, key)
        try:
            data = path.read_bytes()
        except OSError:
            continue
        if not _safe_base(base):
            continue
        parsed = _parse(data)
        if parsed is not None and parsed[1].get("key") == key:
            return parsed
        _quarantine(path)
    return None


def _parse(data: bytes) -> tuple[bytes, dict[str, Any]] | None:
    line, newline, payload = data.partition(b"\n")
    try:
        header = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if (
        not newline
        or not isinstance(header, dict)
        or header.get("magic") != _MAGIC
        or header.get("length") != len(payload)
    ):
        return None
    if header.get("sha256") != hashlib.sha256(payload).hexdigest() or header.get("check") != _header_check(header):
        return None
    return payload, header


def _header_check(header: dict[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps({k: v for k, v in header.items() if k != "check"}, sort_keys=True).encode()
    ).hexdigest()[:16]


def _quarantine(path: Path) -> None:
    _log.warning("cache entry %s is damaged; setting it aside and building again", path)
    with contextlib.suppress(OSError):
        os.replace(path, path.with_suffix(".bad"))


def store(arch: str, name: str, key: str, payload: bytes, header: dict[str, Any], source: str) -> Path | None:
    """Write an entry, and the rendered source beside it under `generated/`. Returns its path, or None where no directory could be written."""
    header = {
        "magic": _MAGIC,
        "key": key,
        "name": name,
        "arch": arch,
        "length": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
        **header,
    }
    header["check"] = _header_check(header)
    data = json.dumps(header).encode() + b"\n" + payload
    failures: list[str] = []
    for base in env.cache_bases():
        path = _entry_path(base, arch, name, key)
        try:
            _make_folder(base, path.parent)
            _write_atomically(path, data)
        except OSError as error:
            failures.append(f"{base} ({error})")
            continue
        if failures:
            _warn_once("elsewhere", "cannot write the kernel cache under %s; using %s", ", ".join(failures), base)
        store_source(arch, name, key, source)
        return path
    _warn_once(
        "memory",
        "no cache directory can be written, kernels are kept in memory only: %s. Set PYINFER_WORKSPACE_BASE to a writable folder.",
        ", ".join(failures) or "there is none",
    )
    return None


def _recall_path(base: Path, arch: str, name: str, quick: str) -> Path:
    return base / env.version() / arch / "recall" / f"{name}.{quick[:40]}.key"


def recall(arch: str, name: str, quick: str) -> str | None:
    """The full key that `remember` noted under a quick key (see `compiler._quick_key`), or None."""
    for base in env.cache_bases():
        try:
            text = _recall_path(base, arch, name, quick).read_text("ascii")
        except (OSError, UnicodeDecodeError):
            continue
        if _safe_base(base) and len(text) == 64:
            return text
    return None


def remember(arch: str, name: str, quick: str, key: str) -> None:
    """Note the full key of a quick key beside the entry, where that lies in a folder that can be written; a wrong or missing note only costs time."""
    for base in env.cache_bases():
        if _entry_path(base, arch, name, key).exists() and _safe_base(base):
            with contextlib.suppress(OSError):
                path = _recall_path(base, arch, name, quick)
                path.parent.mkdir(parents=True, exist_ok=True)
                _write_atomically(path, key.encode())
            return


def store_source(arch: str, name: str, key: str, source: str) -> Path | None:
    """Write rendered source for people to read (nothing reads it back). Returns its path, or None."""
    for base in env.cache_bases():
        path = source_path(base, arch, name, key)
        with contextlib.suppress(OSError):
            _make_folder(base, path.parent)
            _write_atomically(path, source.encode())
            return path
    return None


def source_path(base: Path, arch: str, name: str, key: str) -> Path:
    """Where the rendered source of an entry lies."""
    return base / env.version() / arch / "generated" / f"{name}.{key[:40]}.cu"


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def lock_timeout() -> float:
    """Seconds a builder waits for another one (`$PYINFER_JIT_LOCK_TIMEOUT`, default 60)."""
    text = os.environ.get("PYINFER_JIT_LOCK_TIMEOUT", "60")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"PYINFER_JIT_LOCK_TIMEOUT: is no number of seconds: got {text!r}, wanted e.g. 60.") from None


@contextlib.contextmanager
def build_lock(arch: str, name: str, key: str) -> Iterator[bool]:
    """Hold the advisory lock of a key while building it.

    Yields True with the lock held (or where no directory can hold a lock file), False when another process kept it for longer than `lock_timeout()`:
    the caller then builds for itself and writes nothing.
    """
    file = _open_lock(arch, name, key)
    if file is None:
        yield True
        return
    held = False
    try:
        held = _acquire(file)
        if not held:
            _log.warning(
                "another process has been building %s for %s for over %g s; building it here without writing the cache",
                name,
                arch,
                lock_timeout(),
            )
        yield held
    finally:
        if held:
            _unlock(file)  # closing does it only where no child forked meanwhile has the file too
        file.close()


def _open_lock(arch: str, name: str, key: str) -> Any:
    for base in env.cache_bases():
        path = base / env.version() / arch / "locks" / f"{name}.{key[:40]}.lock"
        try:
            _make_folder(base, path.parent)
            return open(path, "a+b")
        except OSError:
            continue
    return None


def _acquire(file: Any) -> bool:
    deadline = time.monotonic() + lock_timeout()
    pause = 0.002
    while not _try_lock(file):
        if time.monotonic() >= deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return True


def _try_lock(file: Any) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        import errno

        # EACCES and EDEADLK are how Windows says "locked". Anything else is a file system without locks: racing builders are harmless, writes are atomic.
        return error.errno not in (errno.EACCES, errno.EDEADLK)
    return True


def _unlock(file: Any) -> None:
    with contextlib.suppress(OSError):
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_UN)


def entries() -> list[Entry]:
    """Every entry of every cache directory, all versions and architectures."""
    found = []
    for base in env.cache_bases():
        for path in sorted(base.glob("*/*/cached_ops/*.*.kernel")):
            name, key, _ = path.name.rsplit(".", 2)
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append(Entry(path, name, path.parent.parent.name, key, status.st_size, status.st_mtime))
    return found


def verify(quarantine: bool = True) -> tuple[list[Entry], list[Entry]]:
    """Check every entry's digest. Returns (good, bad); bad ones are set aside unless `quarantine` is False."""
    good: list[Entry] = []
    bad: list[Entry] = []
    for entry in entries():
        try:
            parsed = _parse(entry.path.read_bytes())
        except OSError:
            parsed = None
        if parsed is not None and str(parsed[1].get("key", "")).startswith(entry.key):
            good.append(entry)
        else:
            bad.append(entry)
            if quarantine:
                _quarantine(entry.path)
    return good, bad


def prune(*, older_than: float = 0.0, keep_current_version: bool = False) -> tuple[int, int]:
    """Delete entries last written more than `older_than` seconds ago, with quarantined files, stale temporaries and lock files.

    Returns
    -------
    (int, int)
        Files deleted and bytes freed.
    """
    count = freed = 0
    now = time.time()
    for base in env.cache_bases():
        for pattern in _OUR_FILES:
            for path in base.glob(f"*/*/{pattern}"):
                if (
                    keep_current_version
                    and path.parent.parent.parent.name == env.version()
                    and path.suffix in (".kernel", ".cu")
                ):
                    continue
                with contextlib.suppress(OSError):
                    status = path.stat()
                    if now - status.st_mtime >= older_than:
                        path.unlink()
                        count += 1
                        freed += status.st_size
    return count, freed


def clear_cache_dir() -> None:
    """Delete every compiled kernel on disk and forget the ones built in this process (kernels already loaded stay usable)."""
    from pyinfer.jit import compiler

    prune()
    compiler.forget()
