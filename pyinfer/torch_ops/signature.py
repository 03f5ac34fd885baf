"""What the table says of an operator's arguments, and what torch's dispatcher makes of each.

An operator's arguments are written as in a torch schema, with kinds of our own where FlashInfer's interface takes what a schema cannot::

    "input, weight, float eps, out out, bool? enable_pdl"

No kind is a tensor; ``?`` may be None, ``!`` is written to. The kinds of our own, and the arguments they become:

==============  =================================================================================================================
``out``         where to write, or None: two operators, `name`, which returns new tensors, and `name_out`, which writes to those given
``flag``        a bool that decides how many tensors come back: two operators, `name` and `name_<flag>`
``number``      None, a number or a tensor: `Tensor? x_tensor, float? x`
``integer``     the same with `SymInt? x`; Python integers of 64 bits without a sign go over as int64
``cache``       a tensor, or a tuple of two: `Tensor x, Tensor? x_v`
``counter``     int32 to add to, or None, for which the traced function makes one of zeros: `Tensor(a!) x`
``ints``        a tensor or a list of integers: `Tensor x`
``dtype``       a torch dtype or its name: `ScalarType? x`
``none``        must be None under torch.compile (a generator: pass seed and offset)
``varargs``     must be empty
``self``        the wrapper: `int wrapper`, by which the registered operator finds it again, and `ScalarType? planned`, the planned output's dtype
==============  =================================================================================================================
"""

from __future__ import annotations

from typing import Any, NamedTuple

SCALARS = ("float", "int", "bool", "str")


class Argument(NamedTuple):
    """An argument of a public function."""

    name: str
    kind: str
    optional: bool
    written: bool


def parse(text: str) -> tuple[Argument, ...]:
    """Arguments from their text in the table."""
    arguments = []
    for part in text.split(","):
        kind, _, name = part.strip().rpartition(" ")
        optional, written = "?" in kind, "!" in kind
        arguments.append(Argument(name, kind.rstrip("!?") or "Tensor", optional, written))
    return tuple(arguments)


def flat(arguments: tuple[Argument, ...], with_out: bool) -> list[tuple[str, str]]:
    """(schema type, name) of the registered operator's arguments; `with_out`: of the one that writes to given outputs."""
    made: list[tuple[str, str]] = []
    letters = iter("abcdefgh")

    def tensor(name: str, written: bool, optional: bool) -> None:
        made.append((f"Tensor{f'({next(letters)}!)' if written else ''}{'?' if optional else ''}", name))

    for a in arguments:
        name, none = a.name, "?" if a.optional else ""
        if a.kind in ("Tensor", "ints", "counter"):
            tensor(name, a.written or a.kind == "counter", a.optional)
        elif a.kind == "out":
            if with_out:
                tensor(name, True, name == "lse")  # without return_lse there is none
        elif a.kind == "flag":
            if with_out:
                made.append(("bool", name))
        elif a.kind == "cache":
            tensor(name, a.written, False)
            tensor(f"{name}_v", a.written, True)
        elif a.kind in ("number", "integer"):
            tensor(f"{name}_tensor", False, True)
            made.append(("float?" if a.kind == "number" else "SymInt?", name))
        elif a.kind == "dtype":
            made.append(("ScalarType?", name))
        elif a.kind == "self":
            made += [("int", "wrapper"), ("ScalarType?", "planned")]
        elif a.kind in SCALARS:
            made.append((("SymInt" if a.kind == "int" else a.kind) + none, name))
        elif a.kind not in ("none", "varargs"):
            raise ValueError(f"torch_ops: {a.name} is of an unknown kind: got {a.kind}, wanted one of signature.py's.")
    return made


def schema(name: str, arguments: tuple[Argument, ...], with_out: bool, returns: int) -> str:
    """The text for `torch.library.Library.define`. `returns`: how many tensors come back."""
    result = {0: "()", 1: "Tensor"}.get(returns) or f"({', '.join(['Tensor'] * returns)})"
    return f"{name}({', '.join(' '.join(part) for part in flat(arguments, with_out))}) -> {result}"


def public_arguments(arguments: tuple[Argument, ...], values: dict[str, Any]) -> dict[str, Any]:
    """The public function's arguments by name, from those of the registered operator. Outputs and flags that are not among these are left out."""
    made: dict[str, Any] = {}
    for a in arguments:
        name = a.name
        if a.kind in ("number", "integer"):
            tensor = values[f"{name}_tensor"]
            made[name] = values[name] if tensor is None else tensor
        elif a.kind == "cache":
            second = values[f"{name}_v"]
            made[name] = values[name] if second is None else (values[name], second)
        elif name in values:
            made[name] = values[name]
    return made
