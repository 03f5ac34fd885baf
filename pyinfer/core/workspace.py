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
        self._slots: list[_PinnedSlot | None] = [None, None]
        self._runtime: Any = None
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
        memory = self.memory
        runtime = self._runtime
        if runtime is None:
            import cupy

            runtime = self._runtime = cupy.cuda.runtime
        previous = runtime.getDevice()
        if previous != memory.device:
            runtime.setDevice(memory.device)
        try:
            size = data.size
            need = 4 * max(size, capacity)
            ptr = memory.ptr if 0 < need <= memory.nbytes else memory.reserve(max(need, 64))
            self._turn ^= 1
            slot = self._slots[self._turn]
            if slot is None or slot.size < size:
                slot = self._slots[self._turn] = _PinnedSlot(max(2 * size, 1024), slot)
            else:
                runtime.eventSynchronize(slot.event_ptr)  # two uploads ago: nearly always done
            slot.host[:size] = data
            runtime.memcpyAsync(ptr, slot.address, 4 * size, 1, stream)  # 1: host to device
            runtime.eventRecord(slot.event_ptr, stream)
        finally:
            if previous != memory.device:
                runtime.setDevice(previous)
        return ptr


class _PinnedSlot:
    """Page-locked host memory and the event behind the last copy out of it."""

    def __init__(self, size: int, old: _PinnedSlot | None) -> None:
        import cupy
        import numpy as np

        if old is not None:
            old.event.synchronize()  # its memory goes back to the pool
        self.size = size  # int32 elements
        memory = cupy.cuda.alloc_pinned_memory(4 * size)
        self.host = np.frombuffer(memory, np.int32, size)
        self.address = memory.ptr  # reading it off the array costs 2 us
        self.event: Any = cupy.cuda.Event(disable_timing=True)
        self.event_ptr = self.event.ptr


_shared: dict[tuple[int, str, str, int], DeviceBuffer] = {}


def shared_workspace(device: int, framework: str, tag: str = "single", stream: int = 0) -> DeviceBuffer:
    """The buffer that calls without a wrapper share: one per device and stream, whose launches the stream orders."""
    key = (device, framework, tag, stream)
    found = _shared.get(key)
    if found is None:
        found = _shared[key] = DeviceBuffer(device, framework)
    return found
