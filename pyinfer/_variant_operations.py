"""What a rewritten variant function is made of (`_variant_source`): arithmetic that is float32 and int32 throughout, the same on the CPU and in a kernel.

Why Python's operators are not left to Numba: it computes int32 + int32 in 64 bits, int32 * float32 and every literal such as 0.5 in float64, of which a
GPU does a small fraction of its float32 rate. Here a result is int32 if both operands are integers, else float32, as in C.

Each operation is a Numba intrinsic, so that one definition serves Numba and Numba-CUDA (whose calls of other Python functions would ask for a GPU).
The functions of FLOAT_FUNCTIONS and FLOAT_PAIR_FUNCTIONS are the backends' own: `common/variant_math.cuh` and `cpu/user_variant.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FLOAT_FUNCTIONS = ("_exp2", "_log2", "_sqrt", "_tanh2", "_erf", "_sin", "_cos", "_floor", "_ceil")
"""float32 -> float32. _tanh2(y) is tanh(y / (2 log2 e)), so that the factor joins others (as in _exp2 and _log2, which stand for exp and log)."""
FLOAT_PAIR_FUNCTIONS = ("_divide", "_power", "_tanh2_times")
"""(float32, float32) -> float32. _tanh2_times(y, a) is a * _tanh2(y), where a is the same for all scores."""

_FLAGS = ("contract",)

_COMPARISONS = {"_eq": "==", "_ne": "!=", "_lt": "<", "_le": "<=", "_gt": ">", "_ge": ">="}


def numba_types() -> dict[str, Any]:
    """Numba's type of every type that `jit.spec.DeviceFunction` names."""
    from numba import types

    f32, i32 = types.float32, types.int32
    return {"f32": f32, "i32": i32, "f32*": types.CPointer(f32), "i32*": types.CPointer(i32)}


def define(intrinsic: Callable[..., Any]) -> dict[str, Any]:
    """The operations, made with a target's `intrinsic` decorator."""
    from llvmlite import ir
    from numba import types

    f32, i32, boolean = types.float32, types.int32, types.boolean
    word, single = ir.IntType(32), ir.FloatType()

    def is_int(t: Any) -> bool:
        return isinstance(t, types.Integer | types.Boolean)

    def is_number(*args: Any) -> bool:
        return all(is_int(t) or isinstance(t, types.Float) for t in args)

    def common(*args: Any) -> Any:
        return i32 if all(map(is_int, args)) else f32

    def operation(
        arity: int, of: Callable[..., Any], emit: Callable[..., Any], given: Callable[..., Any] = common
    ) -> Any:
        """An intrinsic of numbers: operands become `given(types)`, the result has type `of(types)`, `emit(builder, integers, *values)` makes it."""

        def typed(args: tuple[Any, ...]) -> Any:
            if not is_number(*args):
                return None
            operand = given(*args)

            def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                cast = [context.cast(builder, v, t, operand) for v, t in zip(values, signature.args, strict=True)]
                return emit(builder, operand is i32, *cast)

            return of(*args)(*args), codegen

        if arity == 1:

            @intrinsic
            def unary(typingctx: Any, a: Any) -> Any:
                return typed((a,))

            return unary

        @intrinsic
        def binary(typingctx: Any, a: Any, b: Any) -> Any:
            return typed((a, b))

        return binary

    def always(result: Any) -> Callable[..., Any]:
        return lambda *args: result

    def arithmetic(integer: str, real: str) -> Any:
        def emit(builder: Any, integers: bool, a: Any, b: Any) -> Any:
            if integers:
                return getattr(builder, integer)(a, b)
            return getattr(builder, real)(a, b, flags=_FLAGS)

        return operation(2, common, emit)

    def quotient(builder: Any, a: Any, b: Any) -> tuple[Any, Any]:
        """(a // b, a % b) of integers, rounded down; 0 and a for b == 0, where the hardware would trap."""
        zero, one = ir.Constant(word, 0), ir.Constant(word, 1)
        is_zero = builder.icmp_signed("==", b, zero)
        is_minus_one = builder.icmp_signed("==", b, ir.Constant(word, -1))  # the one divisor that can overflow
        divisor = builder.select(builder.or_(is_zero, is_minus_one), one, b)
        q = builder.sdiv(a, divisor)
        r = builder.sub(a, builder.mul(q, divisor))
        down = builder.and_(builder.icmp_signed("!=", r, zero), builder.icmp_signed("<", builder.xor(r, divisor), zero))
        q = builder.select(down, builder.sub(q, one), q)
        r = builder.select(down, builder.add(r, divisor), r)
        q = builder.select(is_minus_one, builder.sub(zero, a), q)
        return builder.select(is_zero, zero, q), builder.select(is_zero, a, r)

    def floor(builder: Any, x: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.floor", [single]), [x])

    def floordiv(builder: Any, integers: bool, a: Any, b: Any) -> Any:
        return quotient(builder, a, b)[0] if integers else floor(builder, builder.fdiv(a, b))

    def mod(builder: Any, integers: bool, a: Any, b: Any) -> Any:
        if integers:
            return quotient(builder, a, b)[1]
        return builder.fsub(a, builder.fmul(floor(builder, builder.fdiv(a, b)), b))

    def compare(symbol: str) -> Any:
        def emit(builder: Any, integers: bool, a: Any, b: Any) -> Any:
            if integers:
                return builder.icmp_signed(symbol, a, b)
            return (builder.fcmp_unordered if symbol == "!=" else builder.fcmp_ordered)(symbol, a, b)

        return operation(2, always(boolean), emit)

    def choose(symbol: str) -> Any:
        def emit(builder: Any, integers: bool, a: Any, b: Any) -> Any:
            test = builder.icmp_signed(symbol, b, a) if integers else builder.fcmp_ordered(symbol, b, a)
            return builder.select(test, b, a)

        return operation(2, common, emit)

    def negate(builder: Any, integers: bool, a: Any) -> Any:
        return builder.neg(a) if integers else builder.fsub(ir.Constant(single, -0.0), a)  # NVVM IR has no fneg

    def absolute(builder: Any, integers: bool, a: Any) -> Any:
        if integers:
            return builder.select(builder.icmp_signed("<", a, ir.Constant(word, 0)), builder.neg(a), a)
        negative = builder.fcmp_ordered("<", a, ir.Constant(single, 0.0))
        return builder.select(negative, builder.fsub(ir.Constant(single, -0.0), a), a)  # NVVM IR has no llvm.fabs

    def bitwise(name: str) -> Any:
        """Of two booleans a boolean, else of two integers an integer."""

        def result(*args: Any) -> Any:
            return boolean if all(isinstance(t, types.Boolean) for t in args) else i32

        @intrinsic
        def bits(typingctx: Any, a: Any, b: Any) -> Any:
            if not (is_int(a) and is_int(b)):
                return None
            to = result(a, b)

            def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                cast = [context.cast(builder, v, t, to) for v, t in zip(values, signature.args, strict=True)]
                return getattr(builder, name)(*cast)

            return to(a, b), codegen

        return bits

    def shift(name: str) -> Any:
        return operation(2, always(i32), lambda builder, integers, a, b: getattr(builder, name)(a, b), always(i32))

    def truth(builder: Any, integers: bool, a: Any) -> Any:
        if integers:
            return builder.icmp_signed("!=", a, ir.Constant(word, 0))
        return builder.fcmp_unordered("!=", a, ir.Constant(single, 0.0))

    def is_nan(builder: Any, integers: bool, a: Any) -> Any:
        return builder.fcmp_unordered("uno", a, a)

    def is_infinite(builder: Any, integers: bool, a: Any) -> Any:
        return builder.fcmp_ordered("==", absolute(builder, False, a), ir.Constant(single, float("inf")))

    def same(builder: Any, integers: bool, a: Any) -> Any:
        return a

    @intrinsic
    def load(typingctx: Any, pointer: Any, index: Any) -> Any:
        """pointer[index], without the test for negative indices that an array would have."""
        if not isinstance(pointer, types.CPointer) or not isinstance(index, types.Integer):
            return None

        def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            at = context.cast(builder, values[1], signature.args[1], types.int64)
            element = context.get_data_type(pointer.dtype)
            base = builder.bitcast(values[0], element.as_pointer())
            return builder.load(builder.gep(base, [at], source_etype=element), typ=element)

        return pointer.dtype(pointer, index), codegen

    return {
        "_add": arithmetic("add", "fadd"),
        "_sub": arithmetic("sub", "fsub"),
        "_mul": arithmetic("mul", "fmul"),
        "_floordiv": operation(2, common, floordiv),
        "_mod": operation(2, common, mod),
        **{name: compare(symbol) for name, symbol in _COMPARISONS.items()},
        "_min": choose("<"),
        "_max": choose(">"),
        "_neg": operation(1, common, negate),
        "_abs": operation(1, common, absolute),
        "_and": bitwise("and_"),
        "_or": bitwise("or_"),
        "_xor": bitwise("xor"),
        "_shl": shift("shl"),
        "_shr": shift("ashr"),
        "_f32": operation(1, always(f32), same, always(f32)),
        "_i32": operation(1, always(i32), same, always(i32)),
        "_bool": operation(1, always(boolean), truth),
        "_isnan": operation(1, always(boolean), is_nan, always(f32)),
        "_isinf": operation(1, always(boolean), is_infinite, always(f32)),
        "_load": load,
    }


def define_cuda(intrinsic: Callable[..., Any], declare: Callable[..., Any]) -> dict[str, Any]:
    """`define`, and the float functions, which are externals that `common/variant_math.cuh` holds.

    Parameters
    ----------
    declare
        Numba-CUDA's `declare_device`.
    """
    found = define(intrinsic)
    for name in FLOAT_FUNCTIONS:
        found[name] = declare(f"pyinfer{name}", "float32(float32)", abi="c")
    for name in FLOAT_PAIR_FUNCTIONS:
        found[name] = declare(f"pyinfer{name}", "float32(float32, float32)", abi="c")
    return found
