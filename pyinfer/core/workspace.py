"""Device memory that the library owns: workspaces, and the buffers plans are copied into."""

from __future__ import annotations

import sys
from typing import Any


class DeviceBuffer:
    """Bytes on one device from the framework's own allocator, so that its memory accounting and stream ordering see them.

    Grows, at least twofold, and never shrinks. The memory it grew out of is kept: launches under way and captured CUDA
    graphs may still use it, and nothing is synchronised.

    Parameters
    ----------
    device
        CUDA ordinal.
    framework
        "torch", or anything else for CuPy's memory pool.
    """

    def __init__(self, device: int, framework: str = "cupy") -> None:
        self.device = device
        self.framework = framework
        self.nbytes = 0
        self.ptr = 0
        self._owner: Any = None
        self._retired: list[Any] = []

    def reserve(self, nbytes: int, *, zero: bool = False) -> int:
        """Make it at least `nbytes` large (with `zero`, new memory is zeroed in stream order) and return the pointer."""
        if nbytes > self.nbytes:
            nbytes = -(-max(nbytes, 2 * self.nbytes) // 512) * 512
            self._retired.append(self._owner)
            if self.framework == "torch":
                torch = sys.modules["torch"]
                make = torch.zeros if zero else torch.empty
                self._owner = make(nbytes, dtype=torch.uint8, device=f"cuda:{self.device}")
                self.ptr = self._owner.data_ptr()
            else:
                import cupy

                with cupy.cuda.Device(self.device):
                    self._owner = (cupy.zeros if zero else cupy.empty)(nbytes, dtype="uint8")
                self.ptr = self._owner.data.ptr
            self.nbytes = nbytes
        return self.ptr

    def release(self) -> None:
        """Give the memory back to the framework."""
        self.nbytes = self.ptr = 0
        self._owner = None
        self._retired.clear()


class PlanBuffer:
    """A device buffer of int32 that a plan is copied into with one asynchronous copy.

    Two pinned host buffers take turns, each guarded by an event, so that a plan made while the last copy is under way neither waits nor overwrites it.
    """

    def __init__(self, device: int, framework: str = "cupy") -> None:
        self.memory = DeviceBuffer(device, framework)
        self._slots: list[Any] = [None, None]
        self._turn = 0

    @property
    def ptr(self) -> int:
        """Device pointer, 0 before the first upload."""
        return self.memory.ptr

    def upload(self, data: Any, stream: int, *, capacity: int = 0) -> int:
        """Copy an int32 NumPy array to the device on `stream`; returns the device pointer.

        Parameters
        ----------
        data
            int32 array, contiguous.
        stream
            Raw stream handle.
        capacity
            Reserve at least this many int32, so that the pointer survives later, larger plans (CUDA graphs).
        """
        import cupy
        import numpy as np

        runtime = cupy.cuda.runtime
        nbytes = data.nbytes
        with cupy.cuda.Device(self.memory.device):
            ptr = self.memory.reserve(max(nbytes, 4 * capacity, 64))
            self._turn ^= 1
            slot = self._slots[self._turn]
            if slot is None or slot[0].nbytes < nbytes:
                if slot is not None:
                    slot[1].synchronize()  # the copy out of the pinned buffer that is about to go
                room = max(2 * nbytes, 4096)
                host = np.frombuffer(cupy.cuda.alloc_pinned_memory(room), np.int32, room // 4)
                slot = self._slots[self._turn] = (host, cupy.cuda.Event(disable_timing=True))
            host, event = slot
            event.synchronize()
            host[: data.size] = data
            runtime.memcpyAsync(ptr, host.ctypes.data, nbytes, runtime.memcpyHostToDevice, stream)
            event.record(cupy.cuda.ExternalStream(stream))
        return ptr


_shared: dict[tuple[int, str, str, int], DeviceBuffer] = {}


def shared_workspace(device: int, framework: str, tag: str = "single", stream: int = 0) -> DeviceBuffer:
    """The buffer that calls without a wrapper share: one per device and stream, whose launches the stream orders."""
    key = (device, framework, tag, stream)
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = DeviceBuffer(device, framework)
    return found
