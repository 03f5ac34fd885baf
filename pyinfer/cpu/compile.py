"""How CPU kernels are compiled: `@kernel` is Numba's njit without the GIL, with a disk cache that cannot break a call and cannot serve a stale kernel."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache

_log = logging.getLogger("pyinfer")

# What the memory-bound kernels may assume about float arithmetic: contraction to FMA and reordering of sums (so that they vectorise), but not "there
# are no NaN and no infinities" (masks are -inf, and bad input must stay visible).
FASTMATH = frozenset({"contract", "reassoc", "nsz", "arcp"})


@functools.cache
def _module_digest(name: str) -> str:
    """sha256 of a module's source; empty if it has none on disk (then Numba's own stamp must do)."""
    try:
        source = inspect.getsource(sys.modules[name])
    except (OSError, TypeError, KeyError):
        return ""
    return hashlib.sha256(source.encode()).hexdigest()


def _callee_modules(root: str) -> list[str]:
    """The modules of the same package that a kernel in module `root` can reach through module-level names, itself left out."""
    package = root.partition(".")[0]
    seen: set[str] = set()
    queue = [root]
    while queue:
        name = queue.pop()
        if name in seen or name not in sys.modules:
            continue
        seen.add(name)
        for value in list(vars(sys.modules[name]).values()):
            owner = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(owner, str) and owner.partition(".")[0] == package:
                queue.append(owner)
    return sorted(seen - {root})


class _KernelCache(FunctionCache):
    """Numba's function cache, with two holes closed.

    Numba stamps an entry with the source of the kernel's own file only, so an upgrade that changes a helper in another module would go on serving the
    old kernel: the digests of the modules the kernel can reach become part of the key. And a cache that cannot be read or written (full disk,
    truncated entry, folder gone) costs a compile, never an exception.
    """

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        reached = _callee_modules(self._py_func.__module__)
        digest = hashlib.sha256("".join(_module_digest(name) for name in reached).encode()).hexdigest()
        return (*super()._index_key(sig, codegen), digest)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            _log.debug("cannot read the CPU kernel cache for %s (%s): compiling", self._name, error)
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _log.debug("cannot write the CPU kernel cache for %s (%s)", self._name, error)


def _enable_cache(dispatcher: Any) -> None:
    try:
        dispatcher._cache = _KernelCache(dispatcher.py_func)
    except (RuntimeError, OSError) as error:  # no writable place at all: kernels live in memory only
        _log.debug("no disk cache for CPU kernels (%s)", error)


def kernel(function: Callable[..., Any] | None = None, *, fastmath: Any = FASTMATH, inline: str = "never") -> Any:
    """Compile a CPU kernel or a helper that kernels call.

    `njit(nogil=True, error_model="numpy")` with a disk cache as described at `_KernelCache`. Kernels handed to `threads.run` take
    `(begin, end, *args)` and loop over items begin..end-1.

    Parameters
    ----------
    fastmath
        Numba's fastmath flags; False for IEEE arithmetic in source order.
    inline
        "always" makes Numba inline the function before type inference (needed only where LLVM's inliner does not).

    Returns
    -------
    Callable
        The Numba dispatcher.
    """

    def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
        dispatcher = njit(
            nogil=True,
            error_model="numpy",
            fastmath=set(fastmath) if isinstance(fastmath, frozenset) else fastmath,
            inline=inline,
        )(f)
        if inline == "never" and hasattr(dispatcher, "py_func"):  # with NUMBA_DISABLE_JIT njit gives the function back
            _enable_cache(dispatcher)
        return dispatcher

    return decorate if function is None else decorate(function)
