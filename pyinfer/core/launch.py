"""Load a compiled kernel and launch it. The one place where a kernel is launched.

NOTE: measured on an H100 host, a launch costs 11.0 us of CPU time through CuPy (8 arguments), 6.4 through cuda.core, and
the driver alone most of the rest. Here the parameter struct and the launch configuration are packed with one
`struct.pack_into` each into buffers that belong to the calling thread, and one call, cuLaunchKernelEx, serves every kind
of launch (cluster, cooperative, programmatic dependent launch), inside CUDA graph capture too.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

from pyinfer.jit.spec import JitSpec

_ATTRIBUTE_SIZE = 72  # CUlaunchAttribute: id, 4 bytes of padding, a 64-byte union
_COOPERATIVE, _CLUSTER, _PDL = 2, 4, 6  # CUlaunchAttributeID
_CONFIG = struct.Struct("@IIIIIIIPPI0P")  # CUlaunchConfig: grid, block, smem, stream, attributes, their number
_STREAM, _STREAM_OFFSET = struct.Struct("@P"), 32
_MAX_DYNAMIC_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201


@functools.cache
def _driver() -> Any:
    import os

    library = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    library.cuLaunchKernelEx.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    library.cuLaunchKernelEx.restype = ctypes.c_int
    library.cuFuncSetAttribute.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    library.cuOccupancyMaxActiveBlocksPerMultiprocessor.argtypes = [
        ctypes.POINTER(ctypes.c_int),
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_size_t,
    ]
    return library


@functools.cache
def _launch_function() -> Any:
    """cuLaunchKernelEx for arguments that are ctypes objects already: a function of its own, without argtypes."""
    function = _driver()["cuLaunchKernelEx"]
    function.restype = ctypes.c_int
    return function


def error_text(code: int) -> str:
    """The driver's name and description of an error code."""
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(name))
    _driver().cuGetErrorString(code, ctypes.byref(text))
    return f"{(name.value or b'unknown').decode()} ({code}): {(text.value or b'').decode()}"


class _Buffers:
    """Launch buffers, which begin as copies of `params` and `config`, and their addresses (`_argument`: as objects that ctypes passes without conversion)."""

    __slots__ = (
        "argv",
        "argv_address",
        "argv_argument",
        "config",
        "config_address",
        "config_argument",
        "params",
        "stream",
    )

    def __init__(self, params: bytes, config: bytes) -> None:
        self.params = ctypes.create_string_buffer(params, len(params))
        self.argv = (ctypes.c_void_p * 1)(ctypes.addressof(self.params))
        self.argv_address = ctypes.addressof(self.argv)
        self.argv_argument = ctypes.c_void_p(self.argv_address)
        self.config = ctypes.create_string_buffer(config, _CONFIG.size)
        self.config_address = ctypes.addressof(self.config)
        self.config_argument = ctypes.c_void_p(self.config_address)
        self.stream = -1  # in `config`


class _Slot(threading.local):
    """A thread's own launch buffers: another thread may launch while the driver reads ours with the GIL released."""

    def __init__(self, params: bytes, config: bytes) -> None:
        self.own = _Buffers(params, config)


class Kernel:
    """A loaded kernel of one device. Call it to launch: `kernel(stream, grid, values)`."""

    def __init__(self, spec: JitSpec, device: int, arch: str, resources: Any, function: Any) -> None:
        import cupy

        self.spec = spec
        self.device = device
        self.arch = arch
        self.resources = resources
        self._function = function  # keeps CuPy's module alive
        self._handle = int(function.ptr)
        self._slot = _Slot(bytes(spec.params.size), bytes(_CONFIG.size))
        self._pack = spec.params.packer.pack_into
        self._block = spec.block
        self._smem = spec.smem
        self._launch = _driver().cuLaunchKernelEx
        self._launch_arguments = _launch_function()
        self._get_device = cupy.cuda.runtime.getDevice
        fixed = []
        if spec.cluster:
            fixed.append(struct.pack("@II3I52x", _CLUSTER, 0, *spec.cluster))
        self._attributes, self._pdl_attributes = self._attribute_arrays(fixed)
        if spec.smem:  # static shared memory counts towards the 48 KiB that need no opt-in, so 48 KiB of dynamic memory already may
            _check(
                _driver().cuFuncSetAttribute(self._handle, _MAX_DYNAMIC_SMEM, spec.smem),
                f"{spec.name}: {spec.smem} bytes of shared memory",
            )

    def _attribute_arrays(self, fixed: list[bytes]) -> tuple[tuple[Any, int, int], tuple[Any, int, int]]:
        def build(items: list[bytes]) -> tuple[Any, int, int]:
            if not items:
                return None, 0, 0
            buffer = ctypes.create_string_buffer(b"".join(items), _ATTRIBUTE_SIZE * len(items))
            return buffer, ctypes.addressof(buffer), len(items)

        return build(fixed), build([*fixed, struct.pack("@III60x", _PDL, 0, 1)])

    def __call__(
        self, stream: int, grid: int | tuple[int, int, int], values: tuple[Any, ...], pdl: bool = False
    ) -> None:
        """Launch on `stream`.

        Parameters
        ----------
        stream
            Raw stream handle (`core.tensor.current_stream`).
        grid
            Blocks, as a number or (x, y, z). An empty grid launches nothing.
        values
            The parameter struct's fields in order, pointers as integers.
        pdl
            Let the launch overlap the tail of the kernel before it (the kernel must contain griddepcontrol.wait).
        """
        slot = self._slot.own
        self._pack(slot.params, 0, *values)
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        if not (x and y and z):
            return
        _, attributes, count = self._pdl_attributes if pdl else self._attributes
        _CONFIG.pack_into(slot.config, 0, x, y, z, *self._block, self._smem, stream, attributes, count)
        self._submit(slot)

    def bind(
        self, grid: int | tuple[int, int, int], values: tuple[Any, ...], pointers: int, pdl: bool = False
    ) -> BoundLaunch:
        """Pack a launch once whose grid and parameters stay, but for the first `pointers` fields: see `BoundLaunch`."""
        return BoundLaunch(self, grid, values, pointers, pdl)

    def _submit(self, slot: _Buffers) -> None:
        """Hand a thread's packed buffers to the driver, on this kernel's device."""
        if self._get_device() != self.device:
            import cupy

            with cupy.cuda.Device(self.device):
                code = self._launch(slot.config_address, self._handle, slot.argv_address, None)
        else:
            code = self._launch(slot.config_address, self._handle, slot.argv_address, None)
            if code == _INVALID_CONTEXT:  # a thread that has not touched this device yet
                import cupy

                cupy.cuda.runtime.setDevice(self.device)
                cupy.cuda.runtime.free(0)
                code = self._launch(slot.config_address, self._handle, slot.argv_address, None)
        if code:
            grid = _CONFIG.unpack_from(slot.config)[:3]
            _check(
                code,
                f"launching {self.spec.name} with grid {grid}, block {self._block}, {self._smem} bytes of shared memory",
            )

    def blocks_per_sm(self) -> int:
        """How many blocks of this kernel fit on one multiprocessor."""
        found = ctypes.c_int()
        bx, by, bz = self._block
        _check(
            _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(found), self._handle, bx * by * bz, self._smem
            ),
            self.spec.name,
        )
        return found.value

    def __repr__(self) -> str:
        return f"Kernel({self.spec.name}, {self.arch}, cuda:{self.device}, {self.resources.registers} registers)"


class BoundLaunch:
    """A launch that is checked and packed once: `bound(stream, *pointers)` only writes the leading pointer fields and submits (about 1 us before the driver).

    What operators keep for calls that look like one before: same shapes, strides, dtypes and scalars, other addresses.
    """

    __slots__ = ("_device", "_get_device", "_handle", "_launch", "_pack_pointers", "_slot", "_submit", "kernel")

    def __init__(
        self,
        kernel: Kernel,
        grid: int | tuple[int, int, int],
        values: tuple[Any, ...],
        pointers: int,
        pdl: bool,
    ) -> None:
        if any(f.kind != "ptr" for f in kernel.spec.params.fields[:pointers]):
            raise ValueError(
                f"{kernel.spec.name}: only leading pointer fields can change in a bound launch, got {pointers}"
            )
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        _, attributes, count = kernel._pdl_attributes if pdl else kernel._attributes
        config = _CONFIG.pack(x, y, z, *kernel._block, kernel._smem, 0, attributes, count)
        self.kernel = kernel
        self._slot = _Slot(kernel.spec.params.pack(*values), config)
        self._pack_pointers = _pointer_packer(pointers)
        self._handle = ctypes.c_void_p(kernel._handle)
        self._device, self._get_device = kernel.device, kernel._get_device
        empty = not (x and y and z)
        self._launch = _launch_nothing if empty else kernel._launch_arguments
        self._submit = _launch_nothing if empty else kernel._submit

    def __call__(self, stream: int, *pointers: int) -> None:
        """Launch on `stream` with these values of the leading pointer fields."""
        slot = self._slot.own
        self._pack_pointers(slot.params, 0, *pointers)
        if slot.stream != stream:
            _STREAM.pack_into(slot.config, _STREAM_OFFSET, stream)
            slot.stream = stream
        if self._get_device() != self._device or self._launch(
            slot.config_argument, self._handle, slot.argv_argument, None
        ):
            self._submit(slot)  # another device is current, or an error to deal with: all over again

    def pack_with(self, pack: Callable[..., Any]) -> None:
        """Write the leading fields by `pack(buffer, 0, *pointers)`: for parameters that follow from the pointers (tensor maps)."""
        self._pack_pointers = pack

    def behind_a_copy(self, stream: int, *pointers: int) -> None:
        """The same launch, once, without programmatic dependent launch: that waits for the kernel before, and a copy stands in between."""
        slot = self._slot.own
        self._pack_pointers(slot.params, 0, *pointers)
        config = _CONFIG.unpack_from(slot.config)
        _, attributes, count = self.kernel._attributes
        _CONFIG.pack_into(slot.config, 0, *config[:7], stream, attributes, count)
        self._submit(slot)
        _CONFIG.pack_into(slot.config, 0, *config[:7], stream, *config[8:])
        slot.stream = stream

    def parts(self) -> tuple[Any, ...]:
        """What a call consists of, for functions that do it themselves (`core.calls`).

        The thread's buffers, packers of pointers and of the stream and the stream's place, the query of the current device, launch function, kernel, and
        what deals with errors.
        """
        return (
            self._slot,
            self._pack_pointers,
            _STREAM.pack_into,
            _STREAM_OFFSET,
            self._get_device,
            self._launch,
            self._handle,
            self._submit,
        )


@functools.cache
def _pointer_packer(pointers: int) -> Any:
    return struct.Struct(f"@{pointers}P").pack_into


def _launch_nothing(*_: Any) -> int:
    """An empty grid launches nothing."""
    return 0


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"CUDA driver error in {what}: {error_text(code)}")


_load_lock = threading.Lock()
_loaded: dict[tuple[JitSpec, int], Kernel] = {}


def load(spec: JitSpec, device: int | None = None) -> Kernel:
    """The kernel of a spec on a device, built and loaded on first use."""
    import cupy

    from pyinfer.core.device import arch_of

    if device is None:
        device = cupy.cuda.runtime.getDevice()
    found = _loaded.get((spec, device))
    if found is not None:
        return found
    arch = arch_of(device)
    artifact = spec.build(arch)
    with _load_lock:
        found = _loaded.get((spec, device))
        if found is None:
            with cupy.cuda.Device(device):
                cupy.cuda.runtime.free(0)  # makes the primary context current
                module = cupy.cuda.function.Module()
                module.load(artifact.code)
                function = module.get_function(spec.name)
                found = _loaded[spec, device] = Kernel(spec, device, arch, artifact.resources, function)
    return found
