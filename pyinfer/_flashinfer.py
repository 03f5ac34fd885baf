"""pyinfer in the place of FlashInfer: `import flashinfer` and its submodules give what pyinfer has by these names.

A finder in front of `sys.meta_path` serves `flashinfer` and `flashinfer.X` as modules whose attributes are looked up in `pyinfer.X` when they are used.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

NAME = "flashinfer"
API_VERSION = "0.2.9"  # the version whose names, arguments and semantics are matched
_INTERNAL = ("core", "cpu", "cuda_src", "schedulers", "torch_ops")
# Names that a module of FlashInfer imports from another one, and that users import from there.
_ELSEWHERE = {
    "decode": {"get_seq_lens": "page", "_get_range_buf": "utils"},
    "prefill": {"get_seq_lens": "page", "_get_range_buf": "utils"},
    "sparse": {"_get_range_buf": "utils"},
    "utils": {"_get_range_buf": "utils"},
}


def install_as_flashinfer(*, replace: bool = False) -> None:
    """Make `import flashinfer`, and imports of its submodules, give pyinfer, in this process and from now on.

    What pyinfer has, it has by FlashInfer's names; docs/flashinfer_compat.md lists what it lacks. A missing name is an AttributeError, a missing import an
    ImportError, and both say so; `importlib.util.find_spec` and `hasattr` answer as for any module that is not there. `flashinfer.__version__` is the version
    whose interface is matched, followed by pyinfer's own.

    Parameters
    ----------
    replace
        Allow it after FlashInfer itself has been imported. Its modules are dropped; what was imported from them before (functions, classes, modules held
        by other modules) stays FlashInfer's.

    Raises
    ------
    ValueError
        If FlashInfer itself has been imported and `replace` is False.

    Examples
    --------
    >>> import pyinfer
    >>> pyinfer.install_as_flashinfer()
    >>> from flashinfer.norm import rmsnorm
    >>> rmsnorm is pyinfer.rmsnorm
    True
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    loaded = [name for name in sys.modules if name == NAME or name.startswith(NAME + ".")]
    if loaded and not replace:
        from pyinfer.core.errors import fail

        where = getattr(sys.modules.get(NAME), "__file__", None) or ", ".join(loaded)
        fix = "Call it first, or pass replace=True: what others have imported from it stays FlashInfer's."
        fail("install_as_flashinfer", NAME, "has been imported already", where, "a process that has not", fix)
    for name in loaded:
        del sys.modules[name]
    sys.meta_path.insert(0, _Finder())


def uninstall_as_flashinfer() -> None:
    """Undo `install_as_flashinfer`: a FlashInfer that is installed can be imported again."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    for name, module in list(sys.modules.items()):
        if type(module) is _Stand:  # no isinstance: it would make modules that load lazily do so
            del sys.modules[name]


def _missing(what: str) -> str:
    from pyinfer import __version__

    return (
        f"pyinfer {__version__}, installed as flashinfer, has no {what} (docs/flashinfer_compat.md lists what it lacks)"
    )


def _counterpart(fullname: str) -> str | None:
    """The module of pyinfer that stands for a module of FlashInfer, if there is one."""
    parts = fullname.split(".")[1:]
    if not parts:
        return "pyinfer"
    if parts[0] in _INTERNAL or any(part.startswith("_") for part in parts):
        return None
    name = ".".join(("pyinfer", *parts))
    try:
        return name if importlib.util.find_spec(name) is not None else None
    except ModuleNotFoundError:  # its parent is no package
        return None


class _Stand(types.ModuleType):
    """A module `flashinfer[.X]`."""

    def __getattr__(self, name: str) -> Any:
        module = self.__name__.partition(".")[2]
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        other = _ELSEWHERE.get(module, {}).get(name)
        if other is not None:
            value = getattr(importlib.import_module(f"pyinfer.{other}"), name)
        elif _counterpart(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        else:
            counterpart = importlib.import_module(_counterpart(self.__name__) or "pyinfer")
            value = None if name.startswith("_") else getattr(counterpart, name, None)
            if value is None or isinstance(value, types.ModuleType):
                raise AttributeError(_missing(f"{module}.{name}" if module else name))
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        names = dir(importlib.import_module(_counterpart(self.__name__) or "pyinfer"))
        return sorted({n for n in names if not n.startswith("_")} | set(self.__dict__))


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules `flashinfer` and `flashinfer.X`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(NAME + "."):
            return None
        if _counterpart(fullname) is not None:
            # Each one a package, though without a path: only then does Python ask here about the names of a `from flashinfer.X import name` that
            # are missing, and the answer can say more than that.
            return importlib.machinery.ModuleSpec(fullname, self, origin="pyinfer", is_package=True)
        # An import asks through importlib's _find_and_load_unlocked and is told why it fails. importlib.util.find_spec, with which code probes for
        # a part, wants None.
        caller = sys._getframe(2).f_code.co_name
        if caller == "_find_and_load_unlocked":
            raise ModuleNotFoundError(_missing(fullname.partition(".")[2]))
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        counterpart = importlib.import_module(_counterpart(spec.name) or "pyinfer")
        module = _Stand(spec.name, counterpart.__doc__)
        module.__file__ = counterpart.__file__
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == NAME:
            from pyinfer import __version__

            module.__dict__["__version__"] = f"{API_VERSION}+pyinfer.{__version__}"
