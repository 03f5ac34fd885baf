"""Element types: one singleton per type, shared by host code, C++ templates and the CPU backend."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False, slots=True)
class DType:
    """An element type. Singletons: compare with `is`.

    Attributes
    ----------
    name
        The field's name for it, as torch spells it ("float16", "bfloat16", "float8_e4m3fn", ...).
    itemsize
        Bytes per element.
    ctype
        Its name in cuda_src/common/types.cuh.
    short
        A short form for kernel names ("f16", "bf16", "e4m3", ...).
    """

    name: str
    itemsize: int
    ctype: str
    short: str

    @property
    def numpy(self) -> np.dtype:
        """The NumPy dtype (ml_dtypes for bfloat16 and fp8)."""
        return _numpy_dtype(self.name)

    def __repr__(self) -> str:
        return self.name

    def __reduce__(self) -> tuple[Any, ...]:  # singletons survive pickling
        return (canonical_dtype, (self.name,))


FLOAT16 = DType("float16", 2, "f16", "f16")
BFLOAT16 = DType("bfloat16", 2, "bf16", "bf16")
FLOAT32 = DType("float32", 4, "float", "f32")
FLOAT64 = DType("float64", 8, "double", "f64")
FLOAT8_E4M3 = DType("float8_e4m3fn", 1, "e4m3", "e4m3")
FLOAT8_E5M2 = DType("float8_e5m2", 1, "e5m2", "e5m2")
INT8 = DType("int8", 1, "int8_t", "i8")
UINT8 = DType("uint8", 1, "uint8_t", "u8")
INT16 = DType("int16", 2, "int16_t", "i16")
UINT16 = DType("uint16", 2, "uint16_t", "u16")
INT32 = DType("int32", 4, "int32_t", "i32")
UINT32 = DType("uint32", 4, "uint32_t", "u32")
INT64 = DType("int64", 8, "int64_t", "i64")
UINT64 = DType("uint64", 8, "uint64_t", "u64")
BOOL = DType("bool", 1, "uint8_t", "bool")

ALL = (
    FLOAT16,
    BFLOAT16,
    FLOAT32,
    FLOAT64,
    FLOAT8_E4M3,
    FLOAT8_E5M2,
    INT8,
    UINT8,
    INT16,
    UINT16,
    INT32,
    UINT32,
    INT64,
    UINT64,
    BOOL,
)
_BY_NAME: dict[str, DType] = {d.name: d for d in ALL}
_BY_NAME |= {
    "half": FLOAT16,
    "float": FLOAT32,
    "double": FLOAT64,
    "int": INT32,
    "long": INT64,
    "float8_e4m3": FLOAT8_E4M3,
}
_BY_NAME |= {d.short: d for d in ALL}
_BY_OBJECT: dict[object, DType] = {}  # torch.dtype, np.dtype, ... -> DType


@functools.cache
def _numpy_dtype(name: str) -> np.dtype:
    import numpy as np

    if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def canonical_dtype(x: object, op: str = "dtype", arg: str = "dtype") -> DType:
    """The DType for a torch/NumPy/CuPy dtype, a scalar type, a name or a DType.

    Raises
    ------
    TypeError
        If `x` names no element type known here.
    """
    if type(x) is DType:
        return x
    try:
        return _BY_OBJECT[x]
    except KeyError:
        pass
    except TypeError:  # unhashable
        x = str(x)
    name = x if isinstance(x, str) else (getattr(x, "name", None) or getattr(x, "__name__", None) or str(x))
    # Bytes in the other order would be read as other numbers.
    found = _BY_NAME.get(name.removeprefix("torch.")) if getattr(x, "isnative", True) else None
    if found is None:
        from pyinfer.core.errors import fail_type

        fail_type(op, arg, "is no element type known here", repr(x), "one of " + ", ".join(d.name for d in ALL))
    _BY_OBJECT[x] = found
    return found
