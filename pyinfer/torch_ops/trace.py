"""What torch.compile inlines in the place of a public function: the call of the registered operator, as generated source.

Dynamo looks at a function's attribute ``_torchdynamo_inline`` and traces that instead. So nothing is asked of an eager call, nothing of torch is needed to
set it, and whatever was imported first, the operators are registered when the first trace meets one (`_ready`). Dynamo traces bytecode; source with literal
names leaves no table behind that it would have to guard.
"""

from __future__ import annotations

import inspect
import linecache
from collections.abc import Callable
from typing import Any

from pyinfer.torch_ops.signature import Argument, parse
from pyinfer.torch_ops.table import Operator


def operator_name(public: str) -> str:
    """`pyinfer::` name of a function or of a method."""
    return public.replace(".", "_")


def _ready() -> bool:
    from pyinfer.torch_ops.registry import register

    register()
    return True


_ready._dynamo_marked_constant = True  # type: ignore[attr-defined]  # run while tracing, its result a constant


def _refuse(op: str, argument: str) -> None:
    if argument == "generator":
        fix = "Pass seed and offset: numbers, or tensors that a graph may update."
    else:
        fix = "Leave it out, or call outside the compiled region."
    raise TypeError(f"{op}: {argument} is not supported under torch.compile: got a value, wanted its default. {fix}")


def _tensor(x: Any) -> Any:
    import torch

    return x if isinstance(x, torch.Tensor) else None


def _number(x: Any) -> Any:
    import torch

    if x is None or isinstance(x, torch.Tensor):
        return None
    if not isinstance(x, int | float):
        got = type(x).__name__
        raise TypeError(
            f"torch.compile: a number is of an unsupported type: got {got}, wanted int, float or a tensor. Call .item() on it outside."
        )
    return x


def _int64(x: Any) -> Any:
    x = _number(x)
    return x if x is None or x < 2**63 else x - 2**64


def _indices(x: Any) -> Any:
    import torch

    return x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=torch.int64)


def _dtype(x: Any) -> Any:
    import torch

    return getattr(torch, x) if isinstance(x, str) else x


_rules: dict[str, Any] = {}


def _allocate(public: str, arguments: dict[str, Any]) -> Any:
    return _rules[public](arguments)


def _counter(target_probs: Any) -> Any:
    import torch

    return torch.zeros(target_probs.shape[0], dtype=torch.int32, device=target_probs.device)


def _planned(wrapper: Any) -> Any:
    """The dtype of a planned wrapper's output, or None for that of q. Traced, so that Dynamo guards it."""
    import torch

    inner = getattr(wrapper, "_inner", None)
    if inner is None:
        inner = getattr(wrapper, "_decode", None)
    ours = getattr(wrapper if inner is None else inner, "_out_dtype", None)
    return None if ours is None else getattr(torch, ours.name)


_HELPERS = {
    f.__name__: f for f in (_ready, _refuse, _tensor, _number, _int64, _indices, _dtype, _allocate, _counter, _planned)
}


def _flat_values(a: Argument, with_out: bool) -> list[str]:
    """Expressions for the registered operator's arguments, in the order of `signature.flat`."""
    x = a.name
    if a.kind in ("none", "varargs") or (a.kind in ("out", "flag") and not with_out):
        return []
    if a.kind == "number":
        return [f"_tensor({x})", f"_number({x})"]
    if a.kind == "integer":
        return [f"_tensor({x})", f"_int64({x})"]
    if a.kind == "cache":
        return [f"{x}[0] if isinstance({x}, tuple) else {x}", f"{x}[1] if isinstance({x}, tuple) else None"]
    if a.kind == "self":
        return ["id(self)", "_planned(self)"]
    return {"ints": [f"_indices({x})"], "dtype": [f"_dtype({x})"]}.get(a.kind, [x])


def _packed(op: Operator, results: list[str], flag: str) -> str:
    """The public function's result: None, a tensor or a tuple. `results`: expressions, the last one of them for the flag."""
    if op.packed:
        return op.packed
    everything = f"({', '.join(results)})"
    if not flag:
        return results[0] if len(results) == 1 else everything
    without = results[0] if len(results) == 2 else f"({', '.join(results[:-1])})"
    return f"{everything} if {flag} else {without}"


def subsets(flags: list[str]) -> list[list[str]]:
    """Every choice of flags that are set: one registered operator each."""
    chosen: list[list[str]] = [[]]
    for flag in flags:
        chosen += [[*c, flag] for c in chosen]
    return chosen


def _literal(default: Any) -> Any:
    """A default as source can write it: members of an IntEnum are numbers there."""
    return int(default) if isinstance(default, int) and type(default) is not bool else default


def source(public: str, op: Operator, signature: inspect.Signature) -> str:
    """Source of the function to trace in the place of `public`: its arguments and defaults, without annotations."""
    arguments = parse(op.arguments)
    plain = [
        p.replace(annotation=inspect.Parameter.empty, default=_literal(p.default))
        for p in signature.parameters.values()
    ]
    head = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    lines = [f"def traced{head}:", "    import torch", "    _ready()"]
    for a in arguments:
        if a.kind == "none":
            lines += [f"    if {a.name} is not None:", f"        _refuse({public!r}, {a.name!r})"]
        elif a.kind == "varargs":
            lines += [f"    if {a.name}:", f"        _refuse({public!r}, {'*' + a.name!r})"]
        elif a.kind == "counter":
            lines += [f"    if {a.name} is None:", f"        {a.name} = _counter(target_probs)"]
    known = {a.name for a in arguments}
    for parameter in signature.parameters.values():
        if parameter.name not in known:  # newer than the table: not taken and ignored
            lines += [
                f"    if {parameter.name} is not {parameter.default!r}:",
                f"        _refuse({public!r}, {parameter.name!r})",
            ]
    name = operator_name(public)
    flags = [a.name for a in arguments if a.kind == "flag"]
    outs = [a.name for a in arguments if a.kind == "out"]
    if outs:  # a caller may give one of two outputs; the operator that writes takes all
        names = ", ".join(f"{a.name!r}: {a.name}" for a in arguments if a.kind not in ("self", "varargs"))
        planned = ", 'planned': _planned(self)" if arguments[0].kind == "self" else ""
        call = ", ".join(v for a in arguments for v in _flat_values(a, True))
        lines += [
            f"    if {' or '.join(f'{x} is not None' for x in outs)}:",
            f"        made = _allocate({public!r}, {{{names}{planned}}})",
        ]
        for i, x in enumerate(outs):
            lines += [f"        if {x} is None and len(made) > {i}:", f"            {x} = made[{i}]"]
        lines.append(f"        torch.ops.pyinfer.{name}_out.default({call})")
        lines.append(f"        return {_packed(op, outs, flags[0] if flags else '')}")
    call = ", ".join(v for a in arguments for v in _flat_values(a, False))
    if not op.returns:
        return "\n".join([*lines, f"    torch.ops.pyinfer.{name}.default({call})", ""])
    for chosen in subsets(flags):
        count = op.returns + len(chosen)
        condition = " and ".join(f if f in chosen else f"not {f}" for f in flags)
        made = f"torch.ops.pyinfer.{name}{''.join(f'_{f}' for f in chosen)}.default({call})"
        indent = "    "
        if condition:
            lines.append(f"    if {condition}:")
            indent = "        "
        lines.append(f"{indent}made = {f'({made},)' if count == 1 else made}")
    results = [f"made[{i}]" for i in range(op.returns + bool(flags))]
    return "\n".join([*lines, f"    return {_packed(op, results, flags[0] if flags else '')}", ""])


def traced(public: str, op: Operator, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function to trace in the place of `function`."""
    text = source(public, op, inspect.signature(function))
    file = f"<pyinfer.torch_ops {public}>"
    _rules[public] = op.rule
    names: dict[str, Any] = {**_HELPERS, "__name__": __name__}
    exec(compile(text, file, "exec"), names)
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)  # tracebacks show the line
    return names["traced"]
