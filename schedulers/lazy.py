"""The planners' loops, compiled when they are needed often, interpreted until then.

Importing Numba and compiling the planners takes 2 s in a new environment and 0.5 s with their disk cache, far more than a first
plan takes in plain Python (about 2 ms for 64 requests). So the first plans of a process run the very same functions interpreted,
while a thread compiles them. Both give the same plan: they are integer arithmetic.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from types import ModuleType

_log = logging.getLogger("pyinfer")
_MODULE = "pyinfer.schedulers._kernels"
PATIENCE = 200_000
"""Metadata entries beyond which waiting for the compiler beats interpreting (about 50 ms)."""

HEAD_START = 0.5
"""Seconds that the program has to itself before the compiling thread competes with it for the interpreter (its first call is what should be quick)."""

_lock = threading.Lock()
_hurry = threading.Event()
_compiled: ModuleType | None = None
_interpreted: ModuleType | None = None
_thread: threading.Thread | None = None
_forked = False
_local = threading.local()


def kernels(entries: int = 0) -> ModuleType:
    """The module of planner loops to use now.

    Parameters
    ----------
    entries
        Size of the metadata at hand: large ones wait for the compiled form.
    """
    if _compiled is not None:
        return _compiled
    own = getattr(_local, "module", None)
    if own is not None:
        return own
    _start()
    if entries > PATIENCE and not _forked:
        return wait()
    return _plain()


def wait() -> ModuleType:
    """The compiled loops, as soon as they are ready (the interpreted ones should compiling have failed)."""
    _start()
    _hurry.set()
    if _thread is not None:
        _thread.join()
    return _compiled or _plain()


def _plain() -> ModuleType:
    """The loops as Python functions: their module, executed once more without Numba."""
    global _interpreted
    if _interpreted is None:
        spec = importlib.util.find_spec(_MODULE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        module.INTERPRETED = True  # type: ignore[attr-defined]
        spec.loader.exec_module(module)
        _interpreted = module
    return _interpreted


def _start() -> None:
    """Start the compiling thread, once a process. Not a daemon: the interpreter must not end in the middle of LLVM."""
    global _thread
    if _thread is None and not _forked:
        with _lock:
            if _thread is None:
                _thread = threading.Thread(target=_compile, name="pyinfer-compile-planners")
                _thread.start()


def _compile() -> None:
    global _compiled
    _hurry.wait(HEAD_START)
    try:
        import numpy as np

        from pyinfer.schedulers import _kernels
        from pyinfer.schedulers.decode import decode_plan
        from pyinfer.schedulers.prefill import prefill_plan

        _local.module = _kernels
        indptr, last, indices = np.array([0, 1], np.int32), np.array([1], np.int32), np.zeros(1, np.int32)
        shape = {"num_qo_heads": 1, "num_kv_heads": 1, "head_dim_qk": 64, "tile_q": 16, "tile_kv": 64, "num_sms": 1}
        decode_plan(indptr, indices, last, page_size=1, **shape)  # type: ignore[arg-type]
        prefill_plan(indptr, indptr, page_size=0, **shape)  # type: ignore[arg-type]
        _kernels.lengths_fit(indptr, indptr, last, indices, True, 1)
        _compiled = _kernels
    except Exception as error:  # plans go on in plain Python
        _log.warning(
            "the planners could not be compiled (%s: %s); they run interpreted, which is slower",
            type(error).__name__,
            error,
        )


def _after_fork() -> None:
    """A forked child has no compiling thread, and Numba's compiler lock may be held by the one that stayed behind: it goes on interpreting."""
    global _thread, _lock, _hurry, _forked
    if _thread is not None and _compiled is None:
        _thread, _lock, _hurry, _forked = None, threading.Lock(), threading.Event(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
