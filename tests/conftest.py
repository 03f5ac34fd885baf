"""One suite, two devices: `pytest` runs on the CPU backend, `pytest --device cuda` the same tests on a GPU.

Markers: `gpu` needs a GPU (skipped on the CPU), `cpu` concerns the CPU backend alone (skipped with --device cuda),
`compile` only compiles (runs in the CPU suite), `slow` may take more than ten seconds.
"""

from __future__ import annotations

import os
import zlib

import numpy as np
import pytest

from tests import compiled, error_sites
from tests.arrays import Backend

GPU_MISSING = "needs a GPU: run with --device cuda"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the operators run")
    parser.addoption(
        "--seed", type=int, default=None, help="seed of the rng fixture (default: fresh every run, shown on failure)"
    )


def pytest_configure(config: pytest.Config) -> None:
    error_sites.install()
    if config.getoption("--device") == "cuda":
        from pyinfer.core.device import cuda_available

        if not cuda_available():
            raise pytest.UsageError("--device cuda: CuPy finds no GPU here. `pyinfer doctor` says why.")
    if compiled.wanted():
        compiled.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_gpu = config.getoption("--device") == "cuda"
    for item in items:
        if "gpu" in item.keywords and not on_gpu:
            item.add_marker(pytest.mark.skip(reason=GPU_MISSING))
        if ("cpu" in item.keywords or "compile" in item.keywords) and on_gpu:
            item.add_marker(pytest.mark.skip(reason="runs in the CPU suite"))
        if compiled.wanted() and getattr(item, "originalname", "") in compiled.TORCH_BUGS:
            item.add_marker(pytest.mark.skip(reason=compiled.TORCH_BUGS[item.originalname]))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """'cpu' or 'cuda'."""
    return pytestconfig.getoption("--device")


_session_seed = int.from_bytes(os.urandom(4), "little")


def pytest_report_header(config: pytest.Config) -> str:
    seed = config.getoption("--seed")
    return f"pyinfer: device {config.getoption('--device')}, inputs drawn with --seed {_session_seed if seed is None else seed}"


@pytest.fixture
def rng(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> np.random.Generator:
    """A generator of its own for every test: the session's seed and the test's name decide it."""
    seed = pytestconfig.getoption("--seed")
    seed = _session_seed if seed is None else seed
    return np.random.default_rng([seed, zlib.crc32(request.node.nodeid.encode())])


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest, device: str) -> Backend:
    """Makes and reads tensors: torch on the device, or the device's own array library (NumPy, CuPy)."""
    return Backend(request.param if request.param == "torch" else ("cupy" if device == "cuda" else "numpy"), device)


@pytest.fixture
def backend_arrays(device: str) -> Backend:
    """Makes and reads torch tensors on the device (for tests that need one framework only)."""
    return Backend("torch", device)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Out of memory on a GPU skips; nothing else does."""
    outcome = yield
    error = outcome.excinfo
    if (
        error is not None
        and item.config.getoption("--device") == "cuda"
        and type(error[1]).__name__ == "OutOfMemoryError"
    ):
        pytest.skip(f"out of GPU memory: {error[1]}")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """With PYINFER_REQUIRE_ALL=1, as in tox, no test may skip because a package is missing."""
    report = (yield).get_result()
    if report.skipped and os.environ.get("PYINFER_REQUIRE_ALL") == "1" and "could not import" in str(report.longrepr):
        report.outcome = "failed"
