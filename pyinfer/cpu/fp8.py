"""Writing 8-bit floats in CPU kernels: e4m3 as uint8 arrays, e5m2 as int8 arrays (the carriers of `cpu/storage.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from pyinfer.cpu.storage import FP8_CARRIERS, from_f32

LARGEST = {"float8_e4m3fn": np.float32(448.0), "float8_e5m2": np.float32(57344.0)}
"""Largest finite values."""

SCALE_FLOOR = np.float32(1e-12)
"""The least scale of a row: rows of zeros must not divide by zero."""

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I8 = ir.IntType(8)


def _float_to_fp8(builder: Any, x: Any, mantissa: int, bias: int, largest: int) -> Any:
    """Round to nearest even on the bits; subnormals by adding the power of two that brings their last place to a float's. Saturates; NaN is 0x7f."""
    bits = builder.bitcast(x, _I32)
    sign = builder.and_(builder.lshr(bits, _I32(24)), _I32(0x80))
    magnitude = builder.and_(bits, _I32(0x7FFFFFFF))
    shift = 23 - mantissa
    odd = builder.and_(builder.lshr(magnitude, _I32(shift)), _I32(1))
    rounded = builder.lshr(builder.add(builder.add(magnitude, _I32((1 << (shift - 1)) - 1)), odd), _I32(shift))
    normal = builder.sub(rounded, _I32((127 - bias) << mantissa))
    magic = 2.0 ** (24 - bias - mantissa)
    lifted = builder.bitcast(builder.fadd(builder.bitcast(magnitude, _F32), _F32(magic)), _I32)
    small = builder.sub(lifted, builder.bitcast(_F32(magic), _I32))
    is_small = builder.icmp_unsigned("<", magnitude, _I32((128 - bias) << 23))
    value = builder.select(is_small, small, normal)
    value = builder.select(builder.icmp_unsigned(">", value, _I32(largest)), _I32(largest), value)
    is_nan = builder.icmp_unsigned(">", magnitude, _I32(0x7F800000))
    return builder.trunc(builder.select(is_nan, _I32(0x7F), builder.or_(value, sign)), _I8)


@intrinsic
def _f32_to_e4m3(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _float_to_fp8(builder, args[0], 3, 7, 0x7E)

    return types.uint8(types.float32), codegen


@intrinsic
def _f32_to_e5m2(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _float_to_fp8(builder, args[0], 2, 15, 0x7B)

    return types.int8(types.float32), codegen


def saturate(value: Any, like: Any) -> Any:
    """`value` as an element of the array `like` (whose type alone counts): as `from_f32`, and into 8-bit floats to nearest even, what lies beyond the largest
    value becoming that value. For use inside kernels.
    """
    for name, carrier in FP8_CARRIERS.items():
        if like.dtype == carrier:  # plain Python: what runs under NUMBA_DISABLE_JIT
            import ml_dtypes

            clipped = np.clip(np.float32(value), -LARGEST[name], LARGEST[name])
            return clipped.astype(getattr(ml_dtypes, name)).view(carrier)
    return from_f32(value, like)


@overload(saturate)
def _saturate_overload(value, like):  # no annotations: Numba compares the signatures word for word
    carrier = like.dtype if isinstance(like, types.Array) else like
    if carrier == types.uint8:
        return lambda value, like: _f32_to_e4m3(types.float32(value))
    if carrier == types.int8:
        return lambda value, like: _f32_to_e5m2(types.float32(value))
    if carrier in (types.int16, types.uint16, types.float32):
        return lambda value, like: from_f32(value, like)
    raise TypingError(f"saturate makes 8-bit floats or what from_f32 makes, got {carrier}")
