"""The CUDA runtime as far as plan() uses it, on host memory: copies are made and recorded, nothing else happens.

With `tests.stub_driver` it runs the whole GPU path of a wrapper's plan() on CPU tensors, and tells what it copied and what it waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
from typing import Any

import pytest

from tests import stub_driver

H2D, D2H, D2D = 1, 2, 3
WAITS = ("deviceSynchronize", "streamSynchronize", "memcpy", "eventSynchronize")


class _Pinned(bytearray):
    """Page-locked memory that is not."""

    @property
    def ptr(self) -> int:
        return ctypes.addressof((ctypes.c_char * len(self)).from_buffer(self))


class _Event:
    ptr = 1

    def __init__(self, **options: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Runtime:
    """What went through the runtime: `calls`, a list of (name, direction of the copy or None)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int | None]] = []

    def copies(self) -> list[int | None]:
        """The directions of the copies since `clear`."""
        return [direction for name, direction in self.calls if name.startswith("memcpy")]

    def waits(self) -> list[str]:
        """What waits for the GPU, but for the event behind the second last upload."""
        return [name for name, _ in self.calls if name in WAITS and name != "eventSynchronize"]

    def clear(self) -> None:
        self.calls.clear()


def install(monkeypatch: Any) -> tuple[Runtime, list[tuple[Any, ...]]]:
    """Torch CPU tensors are tensors of cuda:0; returns the runtime's record and the list of launches."""
    cupy = pytest.importorskip("cupy")
    import torch

    from pyinfer.core import workspace

    launches = stub_driver.install(monkeypatch)
    runtime = Runtime()

    def copy(name: str) -> Any:
        def call(target: int, source: int, nbytes: int, direction: int, *stream: int) -> None:
            ctypes.memmove(target, source, nbytes)
            runtime.calls.append((name, direction))

        return call

    def noted(name: str) -> Any:
        return lambda *args: runtime.calls.append((name, None))

    for name in ("memcpy", "memcpyAsync"):
        monkeypatch.setattr(cupy.cuda.runtime, name, copy(name))
    for name in ("deviceSynchronize", "streamSynchronize", "eventSynchronize"):
        monkeypatch.setattr(cupy.cuda.runtime, name, noted(name))
    for name in ("eventRecord", "setDevice"):
        monkeypatch.setattr(cupy.cuda.runtime, name, lambda *args: None)
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", lambda nbytes: _Pinned(nbytes))
    monkeypatch.setattr(cupy.cuda, "Event", _Event)
    monkeypatch.setattr(cupy.cuda, "Device", lambda index: contextlib.nullcontext())

    def reserve(self: Any, nbytes: int, *, zero: bool = False) -> int:
        if nbytes > self.nbytes:
            self._retired.append(self._owner)
            self._owner = torch.zeros(nbytes, dtype=torch.uint8)
            self.ptr, self.nbytes = self._owner.data_ptr(), nbytes
        return self.ptr

    monkeypatch.setattr(workspace.DeviceBuffer, "reserve", reserve)
    return runtime, launches
