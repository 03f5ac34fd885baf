"""Small floats in CPU kernels: float16 travels as int16 arrays, bfloat16 as uint16 arrays, float32 as it is; fp8, read only, as uint8 (e4m3) and int8 (e5m2).

Numba has no bfloat16 and only slow scalar float16. Here the carrier's type says what the bits mean, so one kernel source serves all of them:
`to_f32(x)` and `from_f32(value, like)` are chosen by the carrier when the kernel is compiled, and are single conversions that LLVM vectorises
(float16: vcvtph2ps / vcvtps2ph; bfloat16: shifts and an add; fp8: by way of float16). Integer arrays that a kernel takes for numbers must therefore never
be of these types.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.errors import TypingError
from numba.extending import intrinsic, overload

from pyinfer.core.tensor import TensorView, _not_imagined, as_numpy

CARRIERS = {"float16": np.int16, "bfloat16": np.uint16, "float32": np.float32}
FP8_CARRIERS = {"float8_e4m3fn": np.uint8, "float8_e5m2": np.int8}  # what kernels read and never write

_F32 = ir.FloatType()
_F16 = ir.HalfType()
_I32 = ir.IntType(32)
_I16 = ir.IntType(16)


def storage(view: TensorView) -> np.ndarray:
    """The array a kernel takes for a CPU tensor: zero-copy, strides kept.

    Parameters
    ----------
    view
        A CPU tensor of dtype float16, bfloat16 or float32 (others, such as int32, come back as plain NumPy arrays).

    Returns
    -------
    np.ndarray
        int16 for float16, uint16 for bfloat16, the array itself otherwise.
    """
    array = as_numpy(view)
    carrier = CARRIERS.get(view.dtype.name)
    return array if carrier is None or array.dtype == carrier else array.view(carrier)


def flat(view: TensorView, carrier: Any = None) -> tuple[np.ndarray, int]:
    """A CPU tensor's memory as one contiguous 1-D array, whatever its strides, and the index of its first element there.

    Kernels index it with the view's own strides: Numba then knows that neighbours in the last axis are neighbours in memory and vectorises, which it does
    not for an array of unknown strides. Zero-copy; the caller keeps the tensor alive. 1 us, against 4 us through the framework's own NumPy bridge.

    Parameters
    ----------
    carrier
        Dtype of the array, of the tensor's item size; by default as `storage` has it.

    Returns
    -------
    tuple of np.ndarray and int
        The array, spanning exactly the memory between the tensor's lowest and highest element; and the offset
        of element (0, 0, ...), which is not zero only if a stride is negative.
    """
    _not_imagined(view)
    carrier = carrier or CARRIERS.get(view.dtype.name) or view.dtype.numpy
    size = view.dtype.itemsize
    low = high = 0
    for n, stride in zip(view.shape, view.strides, strict=True):
        if n == 0:
            return np.empty(0, carrier), 0
        if stride >= 0:
            high += (n - 1) * stride
        else:
            low += (n - 1) * stride
    buffer = (ctypes.c_char * ((high - low + 1) * size)).from_address(view.ptr + low * size)
    return np.frombuffer(buffer, carrier), -low  # type: ignore[call-overload]  # its stubs do not know ctypes arrays


def _has_half_conversions(context: Any) -> bool:
    """Whether the CPU converts float16 itself; without F16C LLVM would call compiler-rt, which Numba does not link."""
    triple, _, features = context.codegen().magic_tuple()
    return "+f16c" in features or triple.startswith(("aarch64", "arm64"))


def _half_to_float(builder: Any, x: Any) -> Any:
    return builder.fpext(builder.bitcast(x, _F16), _F32)


def _float_to_half(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.fptrunc(x, _F16), _I16)


def _half_to_float_soft(builder: Any, x: Any) -> Any:
    """For CPUs without the instruction: move the bits into place and let a multiplication by 2^112 renormalise."""
    bits = builder.zext(x, _I32)
    magnitude = builder.and_(bits, _I32(0x7FFF))
    shifted = builder.shl(magnitude, _I32(13))
    finite = builder.bitcast(builder.fmul(builder.bitcast(shifted, _F32), _F32(2.0**112)), _I32)
    special = builder.or_(shifted, _I32(0x7F800000))
    value = builder.select(builder.icmp_unsigned(">=", magnitude, _I32(0x7C00)), special, finite)
    sign = builder.shl(builder.and_(bits, _I32(0x8000)), _I32(16))
    return builder.bitcast(builder.or_(value, sign), _F32)


def _float_to_half_soft(builder: Any, x: Any) -> Any:
    """For CPUs without the instruction: round to nearest even on the bits; subnormals are rounded by adding 0.5."""
    bits = builder.bitcast(x, _I32)
    sign = builder.lshr(builder.and_(bits, _I32(0x80000000)), _I32(16))
    magnitude = builder.and_(bits, _I32(0x7FFFFFFF))
    odd = builder.and_(builder.lshr(magnitude, _I32(13)), _I32(1))
    rebias = _I32(((15 - 127) << 23) + 0xFFF & 0xFFFFFFFF)
    normal = builder.lshr(builder.add(builder.add(magnitude, rebias), odd), _I32(13))
    lifted = builder.bitcast(builder.fadd(builder.bitcast(magnitude, _F32), _F32(0.5)), _I32)
    subnormal = builder.sub(lifted, _I32(0x3F000000))
    is_nan = builder.icmp_unsigned(">", magnitude, _I32(0x7F800000))
    overflow = builder.select(is_nan, _I32(0x7E00), _I32(0x7C00))
    value = builder.select(builder.icmp_unsigned("<", magnitude, _I32(113 << 23)), subnormal, normal)
    value = builder.select(builder.icmp_unsigned(">=", magnitude, _I32(143 << 23)), overflow, value)
    return builder.trunc(builder.or_(value, sign), _I16)


def _e5m2_to_float(builder: Any, x: Any, half_to_float: Any) -> Any:
    """The upper half of a float16."""
    return half_to_float(builder, builder.shl(builder.zext(x, _I16), _I16(8)))


def _e4m3_to_float(builder: Any, x: Any, half_to_float: Any) -> Any:
    """In the place of a float16's bits the value is 2^8 too small (its exponent is biased by 7, not 15); 0x7f is a NaN, and there is no infinity."""
    wide = builder.zext(x, _I16)
    magnitude = builder.and_(wide, _I16(0x7F))
    sign = builder.shl(builder.and_(wide, _I16(0x80)), _I16(8))
    value = builder.or_(builder.shl(magnitude, _I16(7)), sign)
    value = builder.select(builder.icmp_unsigned("==", magnitude, _I16(0x7F)), _I16(0x7E00), value)
    return builder.fmul(half_to_float(builder, value), _F32(256.0))


def _bfloat_to_float(builder: Any, x: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(x, _I32), _I32(16)), _F32)


def _float_to_bfloat(builder: Any, x: Any) -> Any:
    """Round to nearest even by adding 0x7fff plus the bit that stays last; a NaN is made quiet, for the addition could carry it into infinity.

    avx512_bf16's vcvtneps2bf16 is not used: it flushes subnormals.
    """
    bits = builder.bitcast(x, _I32)
    odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
    rounded = builder.lshr(builder.add(builder.add(bits, _I32(0x7FFF)), odd), _I32(16))
    quiet = builder.or_(builder.lshr(bits, _I32(16)), _I32(0x40))
    is_nan = builder.icmp_unsigned(">", builder.and_(bits, _I32(0x7FFFFFFF)), _I32(0x7F800000))
    return builder.trunc(builder.select(is_nan, quiet, rounded), _I16)


@intrinsic
def _f16_to_f32(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        convert = _half_to_float if _has_half_conversions(context) else _half_to_float_soft
        return convert(builder, args[0])

    return types.float32(types.int16), codegen


@intrinsic
def _f32_to_f16(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        convert = _float_to_half if _has_half_conversions(context) else _float_to_half_soft
        return convert(builder, args[0])

    return types.int16(types.float32), codegen


@intrinsic
def _f16_to_f32_soft(typingctx: Any, x: Any) -> Any:
    """As on a CPU without F16C (tests)."""
    return types.float32(types.int16), lambda context, builder, signature, args: _half_to_float_soft(builder, args[0])


@intrinsic
def _f32_to_f16_soft(typingctx: Any, x: Any) -> Any:
    """As on a CPU without F16C (tests)."""
    return types.int16(types.float32), lambda context, builder, signature, args: _float_to_half_soft(builder, args[0])


@intrinsic
def _e4m3_to_f32(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = _half_to_float if _has_half_conversions(context) else _half_to_float_soft
        return _e4m3_to_float(builder, args[0], half)

    return types.float32(types.uint8), codegen


@intrinsic
def _e5m2_to_f32(typingctx: Any, x: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = _half_to_float if _has_half_conversions(context) else _half_to_float_soft
        return _e5m2_to_float(builder, args[0], half)

    return types.float32(types.int8), codegen


@intrinsic
def _bf16_to_f32(typingctx: Any, x: Any) -> Any:
    return types.float32(types.uint16), lambda context, builder, signature, args: _bfloat_to_float(builder, args[0])


@intrinsic
def _f32_to_bf16(typingctx: Any, x: Any) -> Any:
    return types.uint16(types.float32), lambda context, builder, signature, args: _float_to_bfloat(builder, args[0])


def to_f32(x: Any) -> Any:
    """The float32 value of a stored element: int16 holds float16 bits, uint16 bfloat16, uint8 e4m3, int8 e5m2, float32 is itself. For use inside kernels."""
    dtype = np.asarray(x).dtype  # plain Python: what runs under NUMBA_DISABLE_JIT
    for name, carrier in FP8_CARRIERS.items():
        if dtype == carrier:
            import ml_dtypes

            return np.float32(np.asarray(x).view(getattr(ml_dtypes, name)))
    if dtype == np.int16:
        return np.float32(np.int16(x).view(np.float16))
    if dtype == np.uint16:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return np.float32(x)


def from_f32(value: Any, like: Any) -> Any:
    """`value` rounded to nearest even, as an element of the array `like` (whose type alone counts). For use inside kernels."""
    value = np.float32(value)
    if like.dtype == np.int16:
        return np.float16(value).view(np.int16)
    if like.dtype == np.uint16:
        import ml_dtypes

        return value.astype(ml_dtypes.bfloat16).view(np.uint16)
    return value


@overload(to_f32)
def _to_f32_overload(x):  # no annotations: Numba compares the signatures word for word
    if x == types.int16:
        return lambda x: _f16_to_f32(x)
    if x == types.uint16:
        return lambda x: _bf16_to_f32(x)
    if x == types.float32:
        return lambda x: x
    if x == types.uint8:
        return lambda x: _e4m3_to_f32(x)
    if x == types.int8:
        return lambda x: _e5m2_to_f32(x)
    raise TypingError(f"to_f32 takes int16 (float16), uint16 (bfloat16), uint8 (e4m3), int8 (e5m2) or float32, got {x}")


@overload(from_f32)
def _from_f32_overload(value, like):
    carrier = like.dtype if isinstance(like, types.Array) else like
    if carrier == types.int16:
        return lambda value, like: _f32_to_f16(types.float32(value))
    if carrier == types.uint16:
        return lambda value, like: _f32_to_bf16(types.float32(value))
    if carrier == types.float32:
        return lambda value, like: types.float32(value)
    raise TypingError(f"from_f32 makes int16 (float16 bits), uint16 (bfloat16 bits) or float32, got {carrier}")
