"""Every case of the GPU's grid as far as its launch, without a GPU: python -m tests.oracle_dispatch ARCH [STEP]

Torch CPU tensors stand for the GPU's, kernels are recorded instead of built. Prints what is refused or fails, and how many kernels there are; the exit code is
the number of failures, at most 100. A process of its own, because the package's caches fill with stubs.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import numpy as np
import pytest

from tests import oracle_cases, oracle_grid, stub_driver


def install(monkeypatch: pytest.MonkeyPatch, arch: int) -> tuple[set[str], list[Any]]:
    """Stand in for the GPU; returns the names of the kernels that are asked for and the launches, as they come."""
    import torch

    import pyinfer
    from pyinfer.core import device, tensor, tensormap, workspace
    from pyinfer.jit.spec import JitSpec

    for name in oracle_grid.NAMES.values():
        getattr(pyinfer, name)  # imports the modules that take `empty` by name
    stub_driver.install(monkeypatch)
    kernels: set[str] = set()
    launches: list[Any] = []

    def build(self: Any, index: int) -> Any:
        kernels.add(self.name)
        return stub_driver.StubKernel(self, launches)

    dtypes = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "int32")}

    def empty(like: Any, shape: Any, dtype: Any = None) -> Any:
        return torch.empty(tuple(shape), dtype=dtypes[(dtype or like.dtype).name])

    real = tensor.empty
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("pyinfer") and getattr(module, "empty", None) is real:
            monkeypatch.setattr(module, "empty", empty)
    monkeypatch.setattr(JitSpec, "build_and_load", build)
    monkeypatch.setattr(workspace.DeviceBuffer, "reserve", lambda self, nbytes, zero=False: 1 << 20)
    monkeypatch.setattr(workspace.PlanBuffer, "upload", lambda self, data, stream, capacity=0: 1 << 20)
    monkeypatch.setattr(device, "arch_number_of", lambda index: arch)
    monkeypatch.setattr(tensormap, "_encoder", lambda: lambda *args: 0)
    # What the CPU has to look at stays NumPy's; a tensor would count as the GPU's.
    host = oracle_cases.Draw.metadata
    monkeypatch.setattr(
        oracle_cases.Draw, "metadata", lambda self, x: x if self.case.index == "device" else host(self, x)
    )
    monkeypatch.setattr(oracle_cases.Draw, "workspace", lambda self: None)
    monkeypatch.setattr(
        oracle_cases.Draw, "expect", lambda self, q, *args, **options: oracle_cases.Exact(q, q, q, q, q)
    )
    return kernels, launches


def main(arch: int, step: int = 1) -> int:
    failed = refused = 0
    monkeypatch = pytest.MonkeyPatch()
    kernels, launches = install(monkeypatch, arch)
    for i, case in enumerate(oracle_grid.cases("cuda", True)[::step]):
        case = case._replace(framework="torch", scales="numbers" if case.scales == "tensors" else case.scales)
        for empty in (False, True):
            launches.clear()
            try:
                draw = oracle_cases.Draw(case, np.random.default_rng(i), "cpu", empty=empty)
                oracle_cases.RUNNERS[case.op](draw).run()
                assert launches, "nothing was launched"
            except Exception as error:
                if case.backend == "fa3" and oracle_cases.refused(error):
                    refused += 1
                    continue
                failed += 1
                print(f"{case} empty={empty}: {type(error).__name__}: {error}")
                if failed == 1:
                    traceback.print_exc()
    print(f"arch {arch}: {failed} failed, {refused} refused, {len(kernels)} kernels")
    return min(failed, 100)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
