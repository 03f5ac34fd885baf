"""Elementary functions for CPU kernels that LLVM vectorises.

Straight-line float32 code with no branch, no table and no call into libm: Numba's own math.exp and friends are scalar calls unless Intel's SVML is
installed, and a loop over them runs at a tenth of this speed. Written as LLVM IR because Numba's integer arithmetic on float bits widens to 64 bits.
Subnormal results are flushed to zero. Errors, in units of the last place of float32, are stated and tested (tests/test_vmath.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_LOG2E_HIGH = float(np.float32(math.log2(math.e)))
_LOG2E_LOW = float(np.float32(math.log2(math.e) - _LOG2E_HIGH))


def _call(builder: Any, name: str, result: Any, *args: Any) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in args])
    return builder.call(builder.module.globals.get(name) or ir.Function(builder.module, function_type, name), args)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "llvm.fma.f32", _F32, a, b, c)


def _polynomial(builder: Any, x: Any, coefficients: list[float]) -> Any:
    """Horner, coefficients from the highest power down."""
    value = _F32(coefficients[0])
    for c in coefficients[1:]:
        value = _fma(builder, value, x, _F32(c))
    return value


# 2^f on [-1/2, 1/2]: minimax fit of relative error 2e-9, the constant term held at 1 so that 2^0 is exact.
_EXP2 = [
    0.00015353361915638818,
    0.001339887441428992,
    0.009618437357651766,
    0.055503324711254076,
    0.24022647913629008,
    0.6931472028550665,
    1.0,
]


def _scale(builder: Any, value: Any, n: Any, x: Any, low: float, high: float) -> Any:
    """value * 2^n by adding n to the exponent; 0 for x < low, infinity for x >= high.

    Not by multiplying with powers of two: the fastmath flags of the calling kernel let LLVM reorder those products into an overflow.
    """
    integer = _call(builder, "llvm.fptosi.sat.i32.f32", _I32, n)  # saturating: a NaN is 0 here, not undefined
    bits = builder.add(builder.bitcast(value, _I32), builder.shl(integer, _I32(23)))
    scaled = builder.bitcast(bits, _F32)
    scaled = builder.select(builder.fcmp_ordered("<", x, _F32(low)), _F32(0.0), scaled)
    return builder.select(builder.fcmp_ordered(">=", x, _F32(high)), _F32(math.inf), scaled)


def _exp2(builder: Any, x: Any) -> Any:
    n = _call(builder, "llvm.rint.f32", _F32, x)
    return _scale(builder, _polynomial(builder, builder.fsub(x, n), _EXP2), n, x, -126.0, 128.0)


def _exp(builder: Any, x: Any) -> Any:
    n = _call(builder, "llvm.rint.f32", _F32, builder.fmul(x, _F32(_LOG2E_HIGH)))
    # x * log2(e) - n in one rounding, and the tail of log2(e): without it the error grows with |x|.
    f = _fma(builder, x, _F32(_LOG2E_HIGH), builder.fneg(n))
    f = _fma(builder, x, _F32(_LOG2E_LOW), f)
    return _scale(
        builder, _polynomial(builder, f, _EXP2), n, x, float(np.float32(-87.3365)), float(np.float32(88.72284))
    )


def _unary(name: str, emit: Callable[[Any, Any], Any], reference: Callable[[float], float], doc: str) -> Any:
    @intrinsic
    def call(typingctx, x):  # no annotations: Numba compares signatures word for word
        return types.float32(types.float32), lambda context, builder, signature, args: emit(builder, args[0])

    def function(x: Any) -> Any:
        return np.float32(reference(float(x)))

    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc

    @overload(function)
    def _overload(x):
        return lambda x: call(types.float32(x))

    return function


exp2 = _unary("exp2", _exp2, lambda x: math.inf if x >= 1024 else 2.0**x, "2^x to 1 ulp; results below 2^-126 are 0.")
exp = _unary("exp", _exp, lambda x: math.inf if x > 700 else math.exp(x), "e^x to 1.2 ulp; results below 2^-126 are 0.")

# sin and cos of t turns, |t| <= 1/4: minimax fits of absolute error 4e-9 and 3e-10, odd and even in t.
_SIN = [39.536706054366704, -76.5497822919845, 81.60100407318585, -41.341655031414994, 6.283185160089473]
_COS = [-25.006796724532705, 60.14820496283437, -85.45383071173471, 64.93935359615534, -19.739208624350947, 1.0]


@intrinsic
def sincos_turns(typingctx, phase):
    """(sin, cos) of an angle given as a 64-bit fraction of a turn: phase / 2^64 turns, wrapping around.

    No range reduction is needed and none of its errors arise: the integer wraps where the angle does. Absolute error below 2e-7.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        top = builder.trunc(builder.lshr(args[0], _I64(32)), _I32)
        # The nearest half turn: t in [-1/4, 1/4) turns from it, both functions change sign if it is odd.
        odd = builder.and_(builder.add(top, _I32(1 << 30)), _I32(1 << 31))
        t = builder.fmul(builder.sitofp(builder.sub(top, odd), _F32), _F32(2.0**-32))
        squared = builder.fmul(t, t)
        sine = builder.fmul(_polynomial(builder, squared, _SIN), t)
        cosine = _polynomial(builder, squared, _COS)
        pair = [builder.bitcast(builder.xor(builder.bitcast(v, _I32), odd), _F32) for v in (sine, cosine)]
        return context.make_tuple(builder, signature.return_type, pair)

    return types.UniTuple(types.float32, 2)(types.uint64), codegen


# t * polynomial(t) with t = 1 / (1 + 0.35 a) is Q(a) e^(a^2/2), Q the upper tail of the normal distribution: minimax fit of relative
# error 3e-8 on 0 <= a <= 13.5.
_TAIL = [-0.02912587674587826, 0.1438722895913063, -0.2555046733913668, 0.1589294114900047, -0.02293721884021006,
         0.10543296960786334, 0.11985242932178473, 0.13985908333331862, 0.1396215697529779]  # fmt: skip


def _normal_cdf(builder: Any, x: Any) -> Any:
    a = _call(builder, "llvm.fabs.f32", _F32, x)
    t = builder.fdiv(_F32(1.0), _fma(builder, a, _F32(0.35), _F32(1.0)))
    tail = builder.fmul(t, _polynomial(builder, t, _TAIL))
    tail = builder.fmul(tail, _exp(builder, builder.fmul(builder.fmul(a, a), _F32(-0.5))))
    return builder.select(builder.fcmp_ordered(">", x, _F32(0.0)), builder.fsub(_F32(1.0), tail), tail)


normal_cdf = _unary(
    "normal_cdf",
    _normal_cdf,
    lambda x: 0.5 * math.erfc(-x / math.sqrt(2.0)),
    "Phi(x) = (1 + erf(x / sqrt 2)) / 2, accurate in both tails.",
)
