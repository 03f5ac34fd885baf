"""The grid's CUDA cases, up to the launch, without a GPU: whatever can be selected has a plan, a kernel and parameters for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu


@pytest.mark.parametrize(("arch", "step"), [(90, 1), (120, 4)])
def test_every_case_reaches_its_launch(arch, step):
    """On Hopper all of them, on an architecture with little shared memory some."""
    pytest.importorskip("torch")
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracle_dispatch", str(arch), str(step)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=240, env={**os.environ, "PYTHONPATH": "."},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (kernels,) = re.findall(r"0 failed, \d+ refused, (\d+) kernels", done.stdout)
    assert 100 // step < int(kernels) < 500  # a GPU compiles each for about a second
