"""Specs of the kernels that pack booleans into bits."""

from __future__ import annotations

import functools

from pyinfer.core.params import ParamStruct, i32, i64, ptr
from pyinfer.jit.spec import JitModule, JitSpec

BLOCK = 256
BITS_PER_VECTOR_THREAD = 32

PACKBITS = ParamStruct(
    "PackBitsParams",
    ptr("x", "const uint8_t", "[count] booleans"),
    ptr("out", "uint8_t", "[bytes]"),
    ptr("indptr", "const int64_t", "[batch + 1] into x; segments only"),
    ptr("byte_indptr", "const int32_t", "[batch + 1] into out; segments only"),
    i64("stride", "of x, in elements"),
    i64("count"),
    i64("bytes"),
    i32("batch"),
)


@functools.cache
def gen_packbits(big: bool, segments: bool = False, vectors: bool = False) -> JitSpec:
    """The kernel of packbits or segment_packbits.

    Parameters
    ----------
    big
        Bit order: "big" or "little".
    segments
        Segments that begin at whole bytes.
    vectors
        x is contiguous and aligned to 16 bytes (not with segments).
    """
    kind = "segment_packbits" if segments else "packbits_vectors" if vectors else "packbits"
    constants = (("BLOCK", BLOCK), ("BIG", big), ("SEGMENTS", segments), ("VECTORS", vectors))
    name = f"{kind}_{'big' if big else 'little'}"
    return JitSpec(name, "quantization/packbits.cu.jinja", PACKBITS, constants, block=(BLOCK, 1, 1))


@functools.cache
def gen_quantization_module() -> JitModule:
    """Every kernel of the family."""
    kinds = ((False, False), (False, True), (True, False))
    return JitModule("quantization", tuple(gen_packbits(big, *kind) for big in (True, False) for kind in kinds))


def all_specs() -> list[JitSpec]:
    """What is worth building ahead, and what is compiled for every architecture by the tests."""
    return list(gen_quantization_module().specs)
