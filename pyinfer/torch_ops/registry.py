"""Registration with torch.library: schemas, what runs, fakes. Runs once, when the first trace needs it or somebody calls `register`."""

from __future__ import annotations

import importlib
import threading
import weakref
from collections.abc import Callable
from typing import Any

from pyinfer.torch_ops import eager
from pyinfer.torch_ops.signature import flat, parse, public_arguments, schema
from pyinfer.torch_ops.table import FUNCTIONS, METHODS, Operator
from pyinfer.torch_ops.trace import operator_name, subsets

NAMESPACE = "pyinfer"
_lock = threading.Lock()
_library: Any = None
_wrappers: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def remember(wrapper: Any) -> None:
    """Make a wrapper known to the operators by its address (Dynamo guards that; whoever takes over the address takes over the entry)."""
    _wrappers[id(wrapper)] = wrapper


def _wrapper(address: int) -> Any:
    wrapper = _wrappers.get(address)
    if wrapper is None:
        raise RuntimeError(
            "torch.compile: the wrapper of a compiled run() is not known: got a copy or one that is gone, wanted one made by its constructor. "
            "Keep the wrapper alive as long as the compiled function."
        )
    return wrapper


def register() -> None:
    """Register all operators as `torch.ops.pyinfer.*`. Further calls do nothing."""
    global _library
    if _library is not None:
        return
    import torch

    with _lock:
        if _library is not None:
            return
        library = torch.library.Library(NAMESPACE, "DEF")
        for table in (FUNCTIONS, METHODS):
            for family, rows in table.items():
                for public, op in rows.items():
                    _define(torch, library, family, public, op)
        _library = library


def _define(torch: Any, library: Any, family: str, public: str, op: Operator) -> None:
    arguments = parse(op.arguments)
    name = operator_name(public)
    flags = [a.name for a in arguments if a.kind == "flag"]
    tags = _tags(torch, op)
    names = [n for _, n in flat(arguments, False)]
    for chosen in subsets(flags):
        fixed = {flag: flag in chosen for flag in flags}
        full = name + "".join(f"_{flag}" for flag in chosen)
        text = schema(full, arguments, False, op.returns + len(chosen))
        run = _implementation(family, public, op, arguments, names, fixed)
        _register(torch, library, text, run, _fake(op, arguments, names, fixed), tags)
    if any(a.kind == "out" for a in arguments):
        names = [n for _, n in flat(arguments, True)]
        run = _implementation(family, public, op, arguments, names, None)
        _register(torch, library, schema(f"{name}_out", arguments, True, 0), run, _nothing, tags)


def _tags(torch: Any, op: Operator) -> tuple[Any, ...]:
    # Inputs come with the strides that the fakes saw: a last axis of stride 1 stays one.
    tags = [torch.Tag.pt2_compliant_tag, getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order)]
    if op.random:
        tags.append(torch.Tag.nondeterministic_seeded)
    if op.waits and hasattr(torch.Tag, "cudagraph_unsafe"):
        tags.append(torch.Tag.cudagraph_unsafe)
    return tuple(tags)


def _register(
    torch: Any, library: Any, text: str, run: Callable[..., Any], fake: Callable[..., Any], tags: Any
) -> None:
    name = text.partition("(")[0]
    library.define(text, tags=tags)
    library.impl(name, run, "CompositeExplicitAutograd")
    library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # results have no gradient, as in eager calls
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


def _nothing(*args: Any) -> None:
    return None


def _implementation(
    family: str, public: str, op: Operator, arguments: Any, names: list[str], fixed: dict[str, bool] | None
) -> Callable[..., Any]:
    """The eager call behind a registered operator. `fixed`: values of the flags in its name; None: it writes to given outputs.

    From source, as the traced functions are: it runs in every call of compiled code.
    """
    importlib.import_module(f"pyinfer.{family}")
    given = []
    for a in arguments:
        x = a.name
        if a.kind in ("number", "integer"):
            given.append(f"{x}={x} if {x}_tensor is None else {x}_tensor")
        elif a.kind == "cache":
            given.append(f"{x}={x} if {x}_v is None else ({x}, {x}_v)")
        elif a.kind == "self":
            given.append("self=_wrapper(wrapper)")
        elif a.kind == "flag":
            given.append(f"{x}={x if fixed is None else fixed[x]}")
        elif x in names:
            given.append(f"{x}={x}")
    call = f"_eager({', '.join(given)})"
    counters = [a.name for a in arguments if a.kind == "counter"]
    if fixed is None or not op.returns:
        body = call
    elif counters:
        body = f"return _but_for({call}, ({', '.join(counters)},))"
    elif op.packed:
        body = f"return tuple(_flattened({call}))"
    elif op.waits:
        body = f"return _aligned({call})"
    else:
        body = f"return {call}"
    scope: dict[str, Any] = {"_eager": eager[public], "_wrapper": _wrapper}
    scope |= {"_but_for": _but_for, "_flattened": _flattened, "_aligned": _aligned}
    exec(f"def run({', '.join(names)}):\n    {body}\n", scope)
    return scope["run"]


def _but_for(made: tuple[Any, ...], counters: tuple[Any, ...]) -> Any:
    """Results without the counters, which came in: an operator must not return them."""
    left = [x for x in made if not any(x is c for c in counters)]
    return left[0] if len(left) == 1 else tuple(left)


def _aligned(made: Any) -> Any:
    """Results at addresses as inductor takes for granted: parts of a tensor may begin anywhere."""
    if isinstance(made, tuple):
        return tuple([_aligned(x) for x in made])
    return made if made.data_ptr() % 16 == 0 else made.clone()


def _flattened(made: Any) -> list[Any]:
    if not isinstance(made, tuple):
        return [made]
    return [x for part in made for x in _flattened(part)]


def _fake(op: Operator, arguments: Any, names: list[str], fixed: dict[str, bool]) -> Callable[..., Any]:
    def fake(*args: Any) -> Any:
        values = dict(zip(names, args, strict=True))
        tensors = op.rule({**public_arguments(arguments, values), "planned": values.get("planned"), **fixed})
        if not tensors:
            return None
        return tensors[0] if len(tensors) == 1 else tuple(tensors)

    return fake
