"""A user's attention variant on the CPU: each function becomes a loop over a row, compiled by Numba to a C function that the kernels call by address."""

from __future__ import annotations

import functools
import math
import re
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llvmlite import ir
from numba import cfunc, config, njit, types
from numba.core.errors import NumbaError
from numba.extending import intrinsic

from pyinfer import _variant_operations, _variant_source
from pyinfer.core.errors import fail
from pyinfer.cpu.compile import FASTMATH, kernel
from pyinfer.cpu.softmax import exp2
from pyinfer.cpu.user_calls import LINEAR, LOGITS, MASK, OUTPUT, PARAMS, QUERY

if TYPE_CHECKING:
    from pyinfer.jit.spec import DeviceFunction

_SLOTS = {"logits": LOGITS, "mask": MASK, "query": QUERY, "output": OUTPUT}
_TOP = np.float32(250)
_HALF = np.float32(0.5)
_ONE = np.float32(1)
_TWO = np.float32(2)
_compiling = threading.Lock()


@kernel
def _exp2(x):
    """2^x for any x: softmax's ends at 126."""
    x = _TOP if x > _TOP else x
    root = exp2(x * _HALF)
    return root * root


@kernel
def _tanh2(x):
    return _ONE - _TWO / (_ONE + _exp2(x))


@kernel
def _tanh2_times(x, a):
    return a * _tanh2(x)


@kernel
def _log2(x):
    return np.float32(np.log2(x))


@kernel
def _sqrt(x):
    return np.sqrt(x)


@kernel
def _erf(x):
    return np.float32(math.erf(x))


@kernel
def _sin(x):
    return np.float32(math.sin(x))


@kernel
def _cos(x):
    return np.float32(math.cos(x))


@kernel
def _floor(x):
    return np.floor(x)


@kernel
def _ceil(x):
    return np.ceil(x)


@kernel
def _divide(a, b):
    return a / b


@kernel
def _power(a, b):
    return np.float32(a**b)


@intrinsic
def _float_bits(typingctx: Any, cell: Any) -> Any:
    """The float32 in the low half of a cell."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.trunc(values[0], ir.IntType(32)), ir.FloatType())

    return types.float32(types.int64), codegen


def _pointer(dtype: Any) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        result = types.CPointer(dtype)

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            return builder.inttoptr(values[0], context.get_value_type(result))

        return result(types.int64), codegen

    return pointer


@functools.cache
def _namespace() -> dict[str, Any]:
    """What rewritten functions and row functions refer to."""
    own = {
        name: globals()[name]
        for name in (*_variant_operations.FLOAT_FUNCTIONS, *_variant_operations.FLOAT_PAIR_FUNCTIONS)
    }
    return {
        **_variant_operations.define(intrinsic),
        **own,
        "_float_bits": _float_bits,
        "_pointer_f32": _pointer(types.float32),
        "_pointer_i32": _pointer(types.int32),
        "_pointer_i64": _pointer(types.int64),
        "_HIDDEN": np.float32(-np.inf),
    }


@functools.cache
def _compiled(functions: tuple[DeviceFunction, ...]) -> Any:
    """The first of these functions, which may call the others, compiled."""
    first, others = functions[0], {f.symbol: f for f in functions[1:]}
    kinds = _variant_operations.numba_types()
    namespace = dict(_namespace())
    for name, _, _ in _variant_source.called(first.source):
        rest = tuple(f for f in functions[1:] if f.symbol != name)
        namespace[name] = _compiled((others[name], *rest))
    exec(compile(first.source, f"<{first.symbol}>", "exec"), namespace)
    signature = kinds[first.result](*(kinds[a] for a in first.arguments))
    options: dict[str, Any] = dict(nogil=True, error_model="numpy", fastmath=set(FASTMATH))
    try:
        return njit(signature, **options)(namespace[first.symbol])
    except NumbaError as error:
        reason = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
        told = next((line for line in reason if line and not line.startswith(("Failed", "During"))), "a typing error")
        fail("AttentionVariant", first.symbol, "cannot be compiled", told, "arithmetic on scalars", first.source)


_PLACE = {"batch": 0, "q_idx": 1, "head": 3, "kv_head": 4, "qo_len": 5, "kv_len": 6}


@functools.lru_cache(maxsize=256)
def row_function(
    hook: str, functions: tuple[DeviceFunction, ...], names: tuple[str, ...], params: tuple[tuple[str, str, str], ...]
) -> Any:
    """A hook as a row function (see `user_calls`), a Numba cfunc.

    Parameters
    ----------
    functions
        The rewritten function, and those it calls.
    names
        Its arguments.
    params
        (name, "f32" or "i32", index) of the variant's parameters; index is "" for a number, "head", "kv_head" or "batch" for an element, ":" for all.
    """
    if config.DISABLE_JIT:
        fix = "Unset NUMBA_DISABLE_JIT."
        fail("AttentionVariant", hook, "cannot run as plain Python", "NUMBA_DISABLE_JIT=1", "compiled functions", fix)
    body = ["    row = address"]
    for name, at in _PLACE.items():
        body.append(f"    {name} = _i32(place[{at}])")
    body.append("    q_pos = _sub(_add(kv_len, q_idx), qo_len)")
    body.append("    cells = _pointer_i64(params)")
    for i, (name, kind, index) in enumerate(params):
        if index == "":
            value = f"_float_bits(cells[{i}])" if kind == "f32" else f"_i32(cells[{i}])"
        else:
            value = f"_pointer_{kind}(cells[{i}])" + ("" if index == ":" else f"[{index}]")
        body.append(f"    p_{name} = {value}")
    own = {name for name, _, _ in params}
    item = "score" if hook in ("logits", "mask") else "value"
    passed = ", ".join(f"p_{n}" if n in own else n for n in names)
    body.append("    first = place[2]")
    body.append("    for j in range(begin, end):")
    if hook in ("logits", "mask"):
        body.append("        kv_idx = _i32(first + j)")
    else:
        body.append("        dim = _i32(j)")
    body.append(f"        {item} = row[j]")
    if hook == "mask":
        body.append(f"        row[j] = row[j] if function({passed}) != 0 else _HIDDEN")
    else:
        scales = ", before, after" if hook == "logits" else ""
        body.append(f"        row[j] = function({passed}{scales})")
    text = "\n".join(["def run(address, begin, end, place, params, before, after):", *body, ""])
    namespace = dict(_namespace())
    with _compiling:
        namespace["function"] = _compiled(functions)
        exec(compile(text, f"<{hook} row>", "exec"), namespace)
        i64, f32 = types.int64, types.float32
        signature = types.void(types.CPointer(f32), i64, i64, types.CPointer(i64), i64, f32, f32)
        return cfunc(signature, error_model="numpy", fastmath=set(FASTMATH))(namespace["run"])


def bind(rows: dict[str, Any], values: Sequence[tuple[str, Any]], softmax: bool) -> tuple[np.ndarray, tuple[Any, ...]]:
    """The kernels' `user` array, and what must live as long as it is used.

    Parameters
    ----------
    rows
        Hook -> `row_function`.
    values
        (type, value) of each parameter: a number, or an array, of "f32" or "i32".
    """
    cells = np.zeros(max(len(values), 1), np.int64)
    for i, (kind, value) in enumerate(values):
        if isinstance(value, np.ndarray):
            cells[i] = value.ctypes.data
        elif kind == "f32":
            cells[i] = int(np.float32(value).view(np.int32))
        else:
            cells[i] = value
    user = np.zeros(6, np.int64)
    for hook, function in rows.items():
        user[_SLOTS[hook]] = function.address
    user[PARAMS] = cells.ctypes.data
    user[LINEAR] = not softmax
    return user, (cells, rows, [v for _, v in values])
