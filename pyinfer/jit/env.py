"""Where compiled kernels are kept, and for which architectures. Reading this module touches nothing on disk.

Directories are tried in this order: `$PYINFER_WORKSPACE_BASE`, `$PYINFER_CACHE_DIR`, `$XDG_CACHE_HOME/pyinfer`, `~/.cache/pyinfer`, a per-user folder in the
temporary directory. Reads look in every one that exists, writes go to the first that can be written, and where none can the cache lives in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

NATIVE_ARCHS = ("80", "89", "90a", "100a", "120a")
"""What ahead-of-time builds and the compile tests cover by default."""

_ARCH = re.compile(r"^(?:sm_|compute_)?(\d+)(?:\.(\d+))?(a|f)?(\+PTX)?$", re.IGNORECASE)


def version() -> str:
    """The version that names the cache folder."""
    import pyinfer

    return pyinfer.__version__


def cache_bases() -> list[Path]:
    """Candidate base directories, best first. Nothing is created."""
    bases = [os.environ.get("PYINFER_WORKSPACE_BASE"), os.environ.get("PYINFER_CACHE_DIR")]
    xdg = os.environ.get("XDG_CACHE_HOME")
    if xdg:
        bases.append(os.path.join(xdg, "pyinfer"))
    home = os.path.expanduser("~")
    if home not in ("~", "/", ""):  # "~": no HOME and no passwd entry
        bases.append(os.path.join(home, ".cache", "pyinfer"))
    # Settings from a container file or a unit file reach us with their "~": no shell has expanded it.
    found = [Path(os.path.abspath(os.path.expanduser(b))) for b in dict.fromkeys(bases) if b]
    temporary = temporary_base()
    return found if temporary is None else [*found, temporary]


def temporary_base() -> Path | None:
    """The user's own folder in the temporary directory, or None where there is no such directory."""
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")
    with contextlib.suppress(OSError):  # raised where no directory at all can be written
        return Path(tempfile.gettempdir(), f"pyinfer-{user}")
    return None


def __getattr__(name: str) -> Path:
    """`PYINFER_BASE_DIR`, `_CACHE_DIR`, `_WORKSPACE_DIR`, `_JIT_DIR`, `_GEN_SRC_DIR`, `_CSRC_DIR`, `_INCLUDE_DIR`.

    The folders by the names users of FlashInfer know, computed when asked.
    """
    from importlib.resources import files

    base = cache_bases()[0]
    table = {
        "PYINFER_BASE_DIR": base,
        "PYINFER_CACHE_DIR": base / version(),
        "PYINFER_WORKSPACE_DIR": base / version(),
        "PYINFER_JIT_DIR": base / version(),
        "PYINFER_GEN_SRC_DIR": base / version(),
    }
    if name in table:
        return table[name]
    if name in ("PYINFER_CSRC_DIR", "PYINFER_INCLUDE_DIR"):
        return Path(str(files("pyinfer.cuda_src")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse_arch(text: str) -> str:
    """Canonical architecture: "8.0", "80", "sm_80" → "80"; "9.0", "9.0a" → "90a"; "8.0+PTX", "compute_80" → "compute_80".

    From 9.0 on the architecture-specific target ("a") is the native one: wgmma and setmaxnreg need it.
    """
    match = _ARCH.match(text.strip())
    if not match:
        raise ValueError(
            f"PYINFER_CUDA_ARCH_LIST: {text!r} is no CUDA architecture, wanted e.g. '8.0', '9.0a' or '8.0+PTX'."
        )
    major, minor, suffix, ptx = match.groups()
    number = int(major) * 10 + int(minor) if minor is not None else int(major)
    if number < 80 or number > 999:
        raise ValueError(f"PYINFER_CUDA_ARCH_LIST: {text!r} is not supported, wanted 8.0 or newer.")
    if suffix and number < 90:
        raise ValueError(
            f"PYINFER_CUDA_ARCH_LIST: {text!r} does not exist: '{suffix}' begins with 9.0a. Write '{number // 10}.{number % 10}'."
        )
    if ptx or text.strip().lower().startswith("compute_"):
        return f"compute_{number}"
    return f"{number}{suffix.lower() if suffix else 'a' if number >= 90 else ''}"


def arch_number(arch: str) -> int:
    """80 for "80" and "compute_80", 90 for "90a"."""
    return int(arch.removeprefix("compute_").rstrip("af"))


def arch_list() -> list[str]:
    """`$PYINFER_CUDA_ARCH_LIST` (separated by spaces, commas or semicolons), canonical; empty if unset.

    As in torch's list "8.0+PTX" asks for both forms, the cubin and the PTX.
    """
    found: dict[str, None] = {}
    for part in re.split(r"[\s,;]+", os.environ.get("PYINFER_CUDA_ARCH_LIST", "")):
        if part.upper().endswith("+PTX") and not part.lower().startswith("compute_"):
            found[parse_arch(part[:-4])] = None
        if part:
            found[parse_arch(part)] = None
    return list(found)


def arch_for_capability(capability: int) -> str:
    """The architecture to build for a device of compute capability `capability` (90 for 9.0).

    Without `$PYINFER_CUDA_ARCH_LIST` that is the device's own. With it: its own entry if listed, else the newest listed cubin of the same major
    version that is not newer than the device ("8.0", or a family such as "10.0f"), else the newest listed PTX that is not newer.
    """
    listed = arch_list()
    native = parse_arch(str(capability))
    if not listed or native in listed:
        return native
    same_major = [
        a
        for a in listed
        if a.rstrip("f").isdigit() and arch_number(a) // 10 == capability // 10 and arch_number(a) <= capability
    ]
    ptx = [a for a in listed if a.startswith("compute_") and arch_number(a) <= capability]
    for group in (same_major, ptx):
        if group:
            return max(group, key=arch_number)
    own = f"{capability // 10}.{capability % 10}"
    raise ValueError(
        f"PYINFER_CUDA_ARCH_LIST names {', '.join(listed)}, none of which runs on a device of compute capability {own}. Add '{own}'."
    )


def default_archs() -> list[str]:
    """What ahead-of-time builds target: the arch list if set, else this machine's GPUs, else `NATIVE_ARCHS`."""
    listed = arch_list()
    if listed:
        return listed
    try:
        import cupy

        found = {parse_arch(cupy.cuda.Device(i).compute_capability) for i in range(cupy.cuda.runtime.getDeviceCount())}
    except Exception:  # no CuPy, no driver, no GPU: all mean "build for everything"
        found = set()
    return sorted(found, key=arch_number) or list(NATIVE_ARCHS)
