"""The grid's CUDA cases, up to the launch, without a GPU: whatever can be selected has a plan, a kernel and parameters for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.cpu
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


@pytest.mark.compile
@pytest.mark.parametrize("dims", [(256, 256), (192, 128)], ids=str)
def test_the_kernel_that_stands_in_for_hoppers(dims):
    """Where a launch turns out to be one for the sm80 family, which prefers other tiles than those planned for."""
    from pyinfer.jit.attention import attention_config, gen_attention
    from pyinfer.jit.attention_config import smem_limits
    from pyinfer.jit.attention_options import AttentionOptions
    from pyinfer.jit.attention_sm90 import stand_in

    options = AttentionOptions(alibi=True, mask=True, sinks=True)
    preferred = attention_config(90, "float16", *dims, 300, None, options)
    config = stand_in(preferred, *dims, 128)
    assert (preferred.tile_q, config.tile_q) == (64, 128) and config.smem < smem_limits(90)[0]
    used = gen_attention(config, "float16", *dims, "plan", "softcap", None, "bfloat16", options).build("90a").resources
    assert used.spill_stores == used.spill_loads == used.stack == 0, used


@pytest.mark.compile
@pytest.mark.parametrize("arch", ["80", "89", "90a"])
def test_a_mask_with_rotation_and_a_cap_does_not_spill(arch):
    """It did, in tiles of 128 rows."""
    from pyinfer.jit.attention import attention_config, gen_attention
    from pyinfer.jit.attention_options import AttentionOptions
    from pyinfer.jit.env import arch_number

    options = AttentionOptions(mask=True, sinks=True, rope=(1.0, 1e4))
    config = attention_config(arch_number(arch), "bfloat16", 128, 128, 300, None, options)
    used = gen_attention(config, "bfloat16", 128, 128, "plan", "softcap", options=options).build(arch).resources
    assert used.spill_stores == used.spill_loads == used.stack == 0, used
