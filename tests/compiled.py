"""`PYINFER_TEST_TORCH_COMPILE=1`: the operators under torch.compile, in the place of the eager ones, for the tests as they are.

Calls with torch tensors are compiled whole (fullgraph) by the backend that `PYINFER_TEST_TORCH_BACKEND` names, "aot_eager" by default: Dynamo, fakes and
functionalisation, without inductor, which wants a C++ compiler on the CPU. Calls that cannot be traced must be refused by the eager function as well.
"""

from __future__ import annotations

import functools
import importlib
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

TORCH_BUGS = {
    # Aliased inputs that are both written: torch keeps the storage offsets of its first call (so do q.add_(1); k.add_(2), torch 2.13).
    "test_strided": "torch reuses the storage offsets of aliased inputs under functionalisation",
}
"""Tests that torch.compile fails whatever is called, and why."""


def wanted() -> bool:
    return os.environ.get("PYINFER_TEST_TORCH_COMPILE", "") not in ("", "0")


def install() -> None:
    """Replace the functions and methods of the table. Before tests are collected, which import them by name."""
    import torch

    import pyinfer
    from pyinfer.torch_ops.table import FUNCTIONS, METHODS

    for limit in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, limit):
            setattr(torch._dynamo.config, limit, 1 << 20)
    torch._dynamo.config.capture_dynamic_output_shape_ops = True
    for family, rows in FUNCTIONS.items():
        module = importlib.import_module(f"pyinfer.{family}")
        for public in rows:
            function = getattr(module, public)
            replaced = compiled(function)
            for place in (module, pyinfer):
                for name in [n for n, value in vars(place).items() if value is function]:  # aliases too
                    setattr(place, name, replaced)
            setattr(pyinfer, public, replaced)
    for family, rows in METHODS.items():
        module = importlib.import_module(f"pyinfer.{family}")
        for public in rows:
            cls, method = public.split(".")
            setattr(getattr(module, cls), method, compiled(getattr(getattr(module, cls), method)))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `function` from compiled code wherever there is a torch tensor among the arguments."""
    import torch

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    # Dynamo keeps what it compiled by code object; every function needs one of its own.
    code = call.__code__.replace(co_name=function.__name__)
    own = types.FunctionType(code, call.__globals__, function.__name__, None, call.__closure__)
    whole = torch.compile(own, fullgraph=True, backend=os.environ.get("PYINFER_TEST_TORCH_BACKEND", "aot_eager"))

    @functools.wraps(function, updated=())
    def checked(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kwargs.get("generator") is not None or not traceable((args, kwargs)):
            return function(*args, **kwargs)
        try:
            return whole(*args, **kwargs)
        except (ValueError, TypeError):
            raise
        except Exception:
            function(*args, **kwargs)  # raises what the test waits for, or else:
            raise

    return checked


def traceable(value: Any) -> bool:
    """Whether there are tensors, all of torch, and plain numbers (compiled code takes what is NumPy's as something else)."""
    import numpy as np
    import torch

    from pyinfer.core.tensor import is_tensor

    found = [x for x in _leaves(value) if isinstance(x, torch.Tensor) or is_tensor(x)]
    numbers = any(isinstance(x, np.generic) for x in _leaves(value))
    return bool(found) and not numbers and all(isinstance(x, torch.Tensor) for x in found)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for x in value:
            yield from _leaves(x)
    else:
        yield value
