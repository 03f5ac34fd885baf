"""Views of tensors of any framework, made from attribute reads.

`cupy.from_dlpack` costs 25 us and stays off the hot path: torch and CuPy tensors are read through their attributes (about 1 us), NumPy arrays through
`__array_interface__`, everything else through `__dlpack__` once per call.
"""

from __future__ import annotations

import ctypes
import logging
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pyinfer.core.dtypes import INT32, DType, canonical_dtype
from pyinfer.core.errors import device_name, fail, fail_type

CPU = -1
_log = logging.getLogger("pyinfer")


class TensorView:
    """Pointer, shape, strides (in elements), dtype and device of somebody's tensor; keeps the tensor alive.

    `device` is -1 for the CPU and the ordinal for a CUDA device. `framework` is "torch", "cupy", "numpy" or "dlpack" (seen through NumPy or CuPy).
    """

    __slots__ = ("device", "dtype", "framework", "obj", "ptr", "shape", "strides")

    def __init__(
        self,
        obj: Any,
        ptr: int,
        shape: Sequence[int],
        strides: Sequence[int],
        dtype: DType,
        device: int,
        framework: str,
    ) -> None:
        self.obj = obj
        self.ptr = ptr
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.device = device
        self.framework = framework

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def is_cuda(self) -> bool:
        """Whether it lies on a CUDA device."""
        return self.device >= 0

    def is_contiguous(self) -> bool:
        """Whether the elements are dense in C order. Strides of size-1 axes do not count, nor do any without elements."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return 0 in self.shape
            expected *= size
        return True

    def __repr__(self) -> str:
        return f"TensorView({self.framework}, {self.dtype.name}, {tuple(self.shape)}, strides {tuple(self.strides)}, {device_name(self.device)})"


_torch_dtypes: dict[Any, DType] = {}


def _view_torch(x: Any, op: str, arg: str) -> TensorView:
    dtype = x.dtype
    ours = _torch_dtypes.get(dtype)
    if ours is None:
        ours = _torch_dtypes[dtype] = canonical_dtype(dtype, op, arg)
    device = x.get_device()  # -1 for the CPU; an int without building a torch.device
    if device < 0 and x.device.type != "cpu":
        fail(op, arg, "is on a device pyinfer does not run on", str(x.device), "a CPU or CUDA tensor")
    try:
        return TensorView(x, x.data_ptr(), x.shape, x.stride(), ours, device, "torch")
    except RuntimeError:  # sparse and quantised tensors have no strides
        if type(x).__name__ == "FakeTensor":
            fix = "Trace through Dynamo: torch.compile, or torch.export.export(..., strict=True)."
            fail(op, arg, "has no values", "a FakeTensor", "a tensor in memory", fix)
        fail(op, arg, "is no dense tensor", str(x.layout), "torch.strided", "Call .to_dense() on it.")


def _view_cupy(x: Any, op: str, arg: str) -> TensorView:
    dtype = canonical_dtype(x.dtype, op, arg)
    strides = _in_elements(x.strides, dtype.itemsize, op, arg)
    return TensorView(x, x.data.ptr, x.shape, strides, dtype, x.data.device_id, "cupy")


def _view_numpy(x: Any, op: str, arg: str) -> TensorView:
    dtype = canonical_dtype(x.dtype, op, arg)
    ptr = x.__array_interface__["data"][0]
    if ptr % dtype.itemsize and x.size:
        fail(
            op,
            arg,
            "is not aligned",
            f"address {ptr:#x}",
            f"a multiple of {dtype.itemsize}",
            "Copy it, e.g. with numpy.array.",
        )
    return TensorView(x, ptr, x.shape, _in_elements(x.strides, dtype.itemsize, op, arg), dtype, CPU, "numpy")


def _in_elements(strides: tuple[int, ...], size: int, op: str, arg: str) -> tuple[int, ...]:
    for s in strides:
        if s % size:  # a field of a structured array
            fail(
                op,
                arg,
                "has strides of no whole number of elements",
                f"{strides} bytes",
                f"multiples of {size}",
                "Copy it, e.g. with numpy.array.",
            )
    return tuple([s // size for s in strides])


def _view_dlpack(x: Any, op: str, arg: str) -> TensorView:
    kind = int(x.__dlpack_device__()[0])
    if kind not in (1, 2, 3, 13):  # kDLCPU, kDLCUDA, kDLCUDAHost, kDLCUDAManaged
        fail(op, arg, "is on a device pyinfer does not run on", f"DLPack device type {kind}", "a CPU or CUDA tensor")
    on_gpu = kind in (2, 13)
    try:
        array = _cupy_from_dlpack(x) if on_gpu else _numpy_from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:  # as exporters and importers please
        got, wanted = f"{type(x).__qualname__} ({error})", "a tensor of a dtype listed in core/dtypes.py"
        fail_type(op, arg, "cannot be read through DLPack", got, wanted)
    v = _view_cupy(array, op, arg) if on_gpu else _view_numpy(array, op, arg)
    v.framework = "dlpack"
    return v


def _cupy_from_dlpack(x: Any) -> Any:
    import cupy

    return cupy.from_dlpack(x)


class _DLTensor(ctypes.Structure):
    """The head of DLPack's struct of the same name."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_DLPACK_ONLY = {(4, 16): "bfloat16", (10, 8): "float8_e4m3fn", (12, 8): "float8_e5m2"}  # (type code, bits)


def _numpy_from_dlpack(x: Any) -> Any:
    """`numpy.from_dlpack`, and for the types that NumPy itself does not have the same by hand."""
    import numpy as np

    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError):
        capsule = x.__dlpack__()
        get = ctypes.pythonapi.PyCapsule_GetPointer
        get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
        t = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_DLTensor)).contents
        name = _DLPACK_ONLY.get((t.code, t.bits))
        if name is None or t.lanes != 1:
            raise
    dtype = canonical_dtype(name).numpy
    shape = tuple(t.shape[: t.ndim])
    if not t.data or 0 in shape:
        return np.empty(shape, dtype)
    strides = t.strides[: t.ndim] if t.strides else [math.prod(shape[i + 1 :]) for i in range(t.ndim)]
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    memory = (ctypes.c_char * (extent * dtype.itemsize)).from_address(t.data + t.byte_offset)
    memory.capsule = capsule  # type: ignore[attr-defined] # unconsumed, it owns the tensor
    return np.ndarray(shape, dtype, memory, strides=[s * dtype.itemsize for s in strides])


_viewers: dict[type, Callable[[Any, str, str], TensorView]] = {}


def _classify(cls: type, x: Any) -> Callable[[Any, str, str], TensorView] | None:
    for base in cls.__mro__:
        root = base.__module__.partition(".")[0]
        if root == "numpy" and base.__name__ == "MaskedArray":
            return None  # its mask would be ignored without a word
        if root == "torch" and base.__name__ == "Tensor":
            return _view_torch
        if root == "cupy" and base.__name__ == "ndarray":
            return _view_cupy
        if root == "numpy" and base.__name__ == "ndarray":
            return _view_numpy
    return _view_dlpack if hasattr(x, "__dlpack__") and hasattr(x, "__dlpack_device__") else None


def view(x: Any, op: str = "view", arg: str = "tensor") -> TensorView:
    """View a tensor of any framework.

    Parameters
    ----------
    x
        A torch.Tensor, cupy.ndarray, numpy.ndarray or any object with `__dlpack__` and `__dlpack_device__`.
    op, arg
        Names for the error message.

    Raises
    ------
    TypeError
        If `x` is no tensor, or of a dtype that pyinfer does not have.
    ValueError
        If it lies on another kind of device, or its memory is not strided in whole elements.
    """
    cls = type(x)
    viewer = _viewers.get(cls)
    if viewer is None:
        found = _classify(cls, x)
        if found is None:
            fail_type(
                op,
                arg,
                "is no tensor",
                f"{cls.__module__}.{cls.__qualname__}",
                "a torch, CuPy or NumPy array, or any object with __dlpack__",
                "Convert it, e.g. with numpy.asarray or torch.tensor.",
            )
        viewer = _viewers[cls] = found
    return viewer(x, op, arg)


def is_tensor(x: Any) -> bool:
    """Whether `view` would take `x`."""
    return type(x) in _viewers or _classify(type(x), x) is not None


def _torch_dtype(dtype: DType) -> Any:
    return getattr(sys.modules["torch"], dtype.name)


def empty(like: TensorView, shape: Sequence[int], dtype: DType | None = None) -> Any:
    """An uninitialised, contiguous tensor in the framework and on the device of `like`."""
    dtype = dtype or like.dtype
    if like.framework == "torch":
        obj = like.obj
        if dtype is like.dtype:
            return obj.new_empty(shape)
        return obj.new_empty(shape, dtype=_torch_dtype(dtype))
    if like.framework == "imagined":
        return type(like.obj)(shape, dtype, like.device)
    if like.device >= 0:
        import cupy

        with cupy.cuda.Device(like.device):
            return cupy.empty(shape, dtype=dtype.numpy)
    import numpy as np

    return np.empty(shape, dtype=dtype.numpy)


def zeros(like: TensorView, shape: Sequence[int], dtype: DType | None = None) -> Any:
    """A zeroed, contiguous tensor in the framework and on the device of `like`."""
    dtype = dtype or like.dtype
    if like.framework == "torch":
        return like.obj.new_zeros(shape, dtype=_torch_dtype(dtype))
    if like.framework == "imagined":
        return type(like.obj)(shape, dtype, like.device)
    if like.device >= 0:
        import cupy

        with cupy.cuda.Device(like.device):
            return cupy.zeros(shape, dtype=dtype.numpy)
    import numpy as np

    return np.zeros(shape, dtype=dtype.numpy)


def _not_imagined(v: TensorView) -> None:
    """End a call of `pyinfer.support` (core/imagined.py) in front of memory that is not there."""
    if v.framework == "imagined":
        from pyinfer.core.imagined import Reached

        raise Reached


def as_numpy(x: Any) -> Any:
    """A zero-copy NumPy array over a CPU tensor or a view of one (bfloat16 and fp8 as ml_dtypes types)."""
    v = x if type(x) is TensorView else view(x)
    if v.device >= 0:
        fail("as_numpy", "tensor", "is on a GPU", device_name(v.device), "a CPU tensor", "Copy it to the host first.")
    obj = v.obj
    if v.framework != "torch":
        _not_imagined(v)
        return obj
    torch = sys.modules["torch"]
    obj = obj.detach()
    if v.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        carrier = torch.int16 if v.dtype.itemsize == 2 else torch.uint8
        return obj.view(carrier).numpy().view(v.dtype.numpy)
    return obj.numpy()


def on_host(x: Any, op: str, arg: str) -> bool:
    """Whether integers lie on the host: lists, NumPy arrays, CPU tensors. TypeError for what is none of these and no tensor."""
    if _viewers.get(type(x)) is _view_torch:
        return x.get_device() < 0
    return isinstance(x, list | tuple) or view(x, op, arg).device < 0


def plain_int32(x: Any) -> Any:
    """The array of what plan() is given nearly always, a contiguous one-axis int32 array or torch CPU tensor, without building a view; else None."""
    if _viewers.get(type(x)) is _view_torch:
        if x.get_device() >= 0 or _torch_dtypes.get(x.dtype) is not INT32 or x.dim() != 1 or not x.is_contiguous():
            return None
        return x.numpy()
    if type(x).__module__ != "numpy" or type(x).__name__ != "ndarray":
        return None
    return x if x.ndim == 1 and x.dtype.char == "i" and x.dtype.isnative and x.flags.c_contiguous else None


def host_ints(x: Any, op: str, arg: str, dtype: Any = None, *, strict: bool = False) -> Any:
    """Integers as a contiguous one-axis host array.

    Lists, NumPy arrays and CPU tensors never synchronise. A device tensor costs one blocking copy, logged at DEBUG, and is refused under `strict`.

    Parameters
    ----------
    dtype
        NumPy integer dtype of the result, int32 by default.
    """
    import numpy as np

    if dtype is None:
        array = plain_int32(x)
        if array is not None:
            return array
    dtype = np.dtype(np.int32 if dtype is None else dtype)
    if isinstance(x, np.ndarray):
        array = np.asarray(x)  # a subclass may index differently
    elif isinstance(x, list | tuple):
        try:
            array = np.asarray(x) if len(x) else np.zeros(0, dtype)
        except (ValueError, OverflowError) as error:  # lists of different lengths, numbers beyond 64 bits
            fail(op, arg, "is no list of integers", str(error), "a flat list of integers")
    else:
        v = view(x, op, arg)
        if v.device < 0:
            array = as_numpy(v)
        else:
            if strict:
                fail(
                    op,
                    arg,
                    "is on the GPU under strict=True",
                    device_name(v.device),
                    "host metadata (NumPy, a list or a CPU tensor)",
                    "Keep the page table's host copy and pass that.",
                )
            _log.debug("%s: copying %s from the device; this synchronises. Pass host metadata to avoid it.", op, arg)
            array = v.obj.cpu().numpy() if v.framework == "torch" else _cupy_to_host(v)
    if array.ndim != 1:
        fail(op, arg, "has the wrong number of axes", f"{array.ndim} (shape {array.shape})", 1)
    if array.dtype == dtype and array.flags.c_contiguous:
        return array
    if array.dtype.kind not in "iu":
        fail_type(op, arg, "holds no integers that fit 64 bits", array.dtype, "int32 or int64")
    if array.size and not np.can_cast(array.dtype, dtype):
        limit, low, high = np.iinfo(dtype), int(array.min()), int(array.max())
        if high > limit.max or low < limit.min:
            fail(op, arg, f"does not fit {dtype}", f"values from {low} to {high}", f"{limit.min} to {limit.max}")
    return np.ascontiguousarray(array, dtype=dtype)


def _cupy_to_host(v: TensorView) -> Any:
    import cupy

    return cupy.asnumpy(v.obj if v.framework == "cupy" else cupy.from_dlpack(v.obj))


def current_stream(v: TensorView) -> int:
    """The raw handle of the caller's current stream on the tensor's device, in the tensor's own framework."""
    if v.framework == "torch":
        return sys.modules["torch"]._C._cuda_getCurrentRawStream(v.device)
    _not_imagined(v)
    import cupy

    if cupy.cuda.runtime.getDevice() == v.device:
        return cupy.cuda.get_current_stream().ptr
    return cupy.cuda.get_current_stream(v.device).ptr


def to_list(x: Any) -> list[Any]:
    """A small tensor as a Python list (tests and messages)."""
    v = view(x)
    if v.device < 0:
        return as_numpy(v).tolist()
    return v.obj.tolist()
