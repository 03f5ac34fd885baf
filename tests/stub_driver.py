"""Operators' CUDA path on CPU tensors, with a driver that launches nothing: for tests of what is launched, and for the CPU time of a call."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

from pyinfer.core import calls, device, launch, tensor
from pyinfer.core.params import ParamStruct


class StubKernel(launch.Kernel):
    """A kernel whose launches end in `submitted`: (spec name, grid, parameter bytes, stream)."""

    def __init__(self, spec: Any, submitted: list[tuple[Any, ...]] | None) -> None:
        self.spec, self.device = spec, 0
        self._slot = launch._Slot(bytes(spec.params.size), bytes(launch._CONFIG.size))
        self._pack = spec.params.packer.pack_into
        self._block, self._smem, self._handle = spec.block, spec.smem, 0
        self._attributes, self._pdl_attributes = self._attribute_arrays([])
        self._get_device = int  # int() is 0, in C
        self.submitted = submitted
        # The cheapest foreign call of four pointers there is; the C function looks at none of them that matters.
        library = ctypes.CDLL("libm.so.6")
        self._launch = library.feclearexcept
        self._launch.argtypes = [ctypes.c_void_p] * 4
        self._launch.restype = ctypes.c_int
        if submitted is None:
            self._launch_arguments = library["feclearexcept"]
            self._launch_arguments.restype = ctypes.c_int
        else:
            self._launch_arguments = lambda *_: 1  # an "error": handled by _submit

    def _submit(self, slot: Any) -> None:
        super()._submit(slot)
        if self.submitted is not None:
            config = launch._CONFIG.unpack_from(slot.config)
            self.submitted.append((self.spec.name, config[:3], bytes(slot.params), config[7], config[9]))


def fields(params: ParamStruct, data: bytes) -> dict[str, Any]:
    """The values in a packed parameter struct."""
    values = params.packer.unpack(data)
    return dict(zip([f.name for f in params.fields], values, strict=True))


def install(monkeypatch: Any, record: bool = True) -> list[tuple[Any, ...]]:
    """Make torch CPU tensors look like tensors of cuda:0; returns the list of launches."""
    import torch

    submitted: list[tuple[Any, ...]] = []
    original = tensor._view_torch

    def view_torch(x: Any, op: str, arg: str) -> Any:
        v = original(x, op, arg)
        v.device = 0
        return v

    def build(self: Any, device: int) -> StubKernel:
        return StubKernel(self, submitted if record else None)

    from pyinfer.jit.spec import JitSpec

    monkeypatch.setattr(tensor, "_view_torch", view_torch)
    monkeypatch.setattr(tensor, "_viewers", {torch.Tensor: view_torch, torch.nn.Parameter: view_torch})
    monkeypatch.setattr(JitSpec, "build_and_load", build)
    monkeypatch.setattr(device, "pdl_supported", lambda index: True)
    monkeypatch.setattr(device, "device_info", lambda index: SimpleNamespace(num_sms=132, capability=90))
    monkeypatch.setattr(device, "num_sms", lambda index: 132)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    allocate = torch._C._dynamo.guards._empty_strided_cpu
    monkeypatch.setattr(calls, "_torch_direct_allocation", lambda index: allocate)
    return submitted


def names_of_launches(monkeypatch: Any) -> list[str]:
    """The names of the kernels that are launched from now on, also on a GPU; but for those of remembered calls, which go to the driver by themselves."""
    names: list[str] = []
    direct, bound, behind = launch.Kernel.__call__, launch.BoundLaunch.__call__, launch.BoundLaunch.behind_a_copy

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        names.append(self.spec.name)
        direct(self, *args, **kwargs)

    def call_bound(self: Any, *args: Any) -> None:
        names.append(self.kernel.spec.name)
        bound(self, *args)

    def call_behind(self: Any, *args: Any) -> None:
        names.append(self.kernel.spec.name)
        behind(self, *args)

    monkeypatch.setattr(launch.Kernel, "__call__", call)
    monkeypatch.setattr(launch.BoundLaunch, "behind_a_copy", call_behind)
    monkeypatch.setattr(launch.BoundLaunch, "__call__", call_bound)
    return names
