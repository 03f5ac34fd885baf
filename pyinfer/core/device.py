"""What is asked of a GPU, once: compute capability, number of multiprocessors, shared memory."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """Properties that schedulers and configs use.

    Attributes
    ----------
    capability
        Compute capability as a number (90 for 9.0).
    num_sms
        Multiprocessors.
    smem_per_block
        Largest shared memory of one block in bytes (opt-in limit).
    l2_bytes
        Size of the L2 cache.
    """

    index: int
    name: str
    capability: int
    num_sms: int
    smem_per_block: int
    l2_bytes: int


@functools.cache
def device_info(index: int) -> DeviceInfo:
    """Properties of CUDA device `index`."""
    from pyinfer.core.imagined import reached

    try:
        import cupy

        p = cupy.cuda.runtime.getDeviceProperties(index)
    except Exception:
        reached()  # `pyinfer.support` asks about GPUs that need not be there
        raise
    name = p["name"].decode() if isinstance(p["name"], bytes) else str(p["name"])
    return DeviceInfo(
        index,
        name,
        p["major"] * 10 + p["minor"],
        p["multiProcessorCount"],
        p["sharedMemPerBlockOptin"],
        p["l2CacheSize"],
    )


@functools.cache
def num_sms(index: int) -> int:
    """Multiprocessors of CUDA device `index`."""
    return device_info(index).num_sms


def current_device() -> int:
    """The calling thread's current CUDA device."""
    import cupy

    return cupy.cuda.runtime.getDevice()


@functools.cache
def arch_of(index: int) -> str:
    """The architecture built for device `index` (see `jit.env.arch_for_capability`)."""
    from pyinfer.jit import env

    return env.arch_for_capability(device_info(index).capability)


@functools.cache
def arch_number_of(index: int) -> int:
    """`arch_of` as a number: 90 for a Hopper GPU, 80 when `PYINFER_CUDA_ARCH_LIST=8.0+PTX` makes it run compute_80 code."""
    from pyinfer.jit import env

    return env.arch_number(arch_of(index))


def pdl_supported(index: int) -> bool:
    """Whether programmatic dependent launch works: code built for 9.0 or newer."""
    return arch_number_of(index) >= 90


def cuda_available() -> bool:
    """Whether CuPy, a driver and at least one GPU are there. Never raises."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount() > 0
    except Exception:  # no CuPy, no driver, no device: one answer
        return False
