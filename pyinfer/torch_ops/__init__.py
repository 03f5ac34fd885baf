"""pyinfer under torch.compile: every operator is one node of the graph, `torch.ops.pyinfer.<name>`, with its schema, its fake and what it writes to.

An eager call goes straight to the function and knows nothing of this. Compiled code calls the registered operator, which calls the function. Nothing has to
be switched on: a public function carries what torch.compile is to trace in its place, and the first trace that meets one registers them all. `register()`
does so by hand, for programs that name `torch.ops.pyinfer` themselves (an exported one, say).

Limits: a generator cannot be passed in compiled code (pass `seed` and `offset`), `plan()` is called outside of it, and a wrapper's compiled `run()` belongs
to that wrapper: another one compiles anew, another plan of the same dtypes does not. `torch.compile(wrapper.run)` sees the method's own code; compile a
function that calls it. `functools.wraps(pyinfer.rmsnorm)` copies the attribute to the wrapper, which then is not traced itself: pass `updated=()`.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["register"]

eager: dict[str, Callable[..., Any]] = {}
"""The public functions and methods, by their names in the table, as their modules defined them."""


def register() -> None:
    """Register all operators as `torch.ops.pyinfer.*` (imports torch). Further calls do nothing."""
    from pyinfer.torch_ops.registry import register as register_all

    register_all()


def attach(module: str) -> None:
    """Tell torch.compile what to trace in the place of a family's functions. Called by the module of the family when all of them are defined."""
    from pyinfer.torch_ops.table import FUNCTIONS, METHODS
    from pyinfer.torch_ops.trace import traced

    family = module.rpartition(".")[2]
    names: Any = vars(sys.modules[module])
    for public, op in FUNCTIONS.get(family, {}).items():
        function = eager[public] = names[public]
        function._torchdynamo_inline = function._torchdynamo_orig_callable = traced(public, op, function)
        function._torchdynamo_wrapper_id = id(
            function
        )  # with the line above: torch.compile(function) itself compiles what is traced
    for public, op in METHODS.get(family, {}).items():
        cls_name, method = public.split(".")
        cls = names[cls_name]
        function = eager[public] = getattr(cls, method)
        function._torchdynamo_inline = traced(public, op, function)
        if "_remembered" not in vars(cls):
            _remember_instances(cls)


def _remember_instances(cls: type) -> None:
    """Let the constructor enter what it made into the registry, by which the operators find it."""
    from pyinfer.torch_ops.registry import remember

    original: Any = cls.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        remember(self)

    cls.__init__ = __init__  # type: ignore[misc]
    cls._remembered = True  # type: ignore[attr-defined]
