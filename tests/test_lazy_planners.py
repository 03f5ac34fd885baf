"""Planners run interpreted until they are compiled: same plans, no Numba in the way of a first call."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from pyinfer.schedulers import lazy
from pyinfer.schedulers.decode import decode_plan
from pyinfer.schedulers.prefill import prefill_plan

SHAPE = {"num_qo_heads": 8, "num_kv_heads": 2, "head_dim_qk": 64, "tile_kv": 64, "num_sms": 20}


def plans(rng):
    """Some plans of drawn batches, as bytes."""
    batch = int(rng.integers(1, 9))
    pages = rng.integers(0, 40, batch)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    last = np.where(pages > 0, rng.integers(1, 17, batch), 0).astype(np.int32)
    indices = rng.integers(0, 1000, int(indptr[-1])).astype(np.int32)
    window = int(rng.choice([-1, 5, 200]))
    yield decode_plan(indptr, indices, last, page_size=16, tile_q=16, window_left=window, **SHAPE)
    qo = np.concatenate([[0], np.cumsum(rng.integers(0, 90, batch))]).astype(np.int32)
    kv = np.concatenate([[0], np.cumsum(rng.integers(0, 700, batch))]).astype(np.int32)
    yield prefill_plan(qo, kv, page_size=0, tile_q=64, causal=bool(rng.integers(2)), window_left=window, **SHAPE)


@pytest.mark.cpu
@pytest.mark.parametrize("case", range(20))
def test_interpreted_equals_compiled(rng, monkeypatch, case):
    assert lazy.wait() is not lazy._plain()
    seed = int(rng.integers(1 << 31))
    compiled = [p.pack().tobytes() for p in plans(np.random.default_rng(seed))]
    monkeypatch.setattr(lazy, "_compiled", None)
    monkeypatch.setattr(lazy, "_forked", True)  # no thread: the interpreted form stays
    monkeypatch.setattr(lazy, "_thread", None)
    assert lazy.kernels() is lazy._plain()
    assert [p.pack().tobytes() for p in plans(np.random.default_rng(seed))] == compiled


@pytest.mark.cpu
def test_interpreted_planners_report_bad_metadata(monkeypatch):
    monkeypatch.setattr(lazy, "_compiled", None)
    monkeypatch.setattr(lazy, "_forked", True)
    monkeypatch.setattr(lazy, "_thread", None)
    with pytest.raises(ValueError, match="paged_kv_indptr decreases: got 1 at entry 2 after 2"):
        decode_plan(
            np.array([0, 2, 1], np.int32), np.zeros(2, np.int32), np.ones(2, np.int32), page_size=16, tile_q=16, **SHAPE
        )


CODE = """
import sys, numpy as np, time
from pyinfer.schedulers.decode import decode_plan
from pyinfer.schedulers import lazy
def plan():
    indptr, indices, last = np.arange(65, dtype=np.int32), np.arange(64, dtype=np.int32), np.ones(64, np.int32)
    shape = dict(num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, page_size=16, tile_q=16, tile_kv=64, num_sms=132)
    return decode_plan(indptr, indices, last, **shape)
first = plan()
assert lazy.kernels() is lazy._plain() or lazy._compiled is not None
"""


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", CODE + code], env={**os.environ, **env}, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.cpu
def test_the_first_plan_does_not_wait_for_numba(tmp_path):
    out = run(
        "print('numba.core.typing.templates' in sys.modules and lazy._compiled is not None)\nlazy.wait()\n"
        "assert plan().pack().tobytes() == first.pack().tobytes()\nprint(lazy._compiled is not None)",
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert out.split() == ["False", "True"]


@pytest.mark.cpu
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_while_compiling_goes_on_interpreted(tmp_path):
    out = run(
        "import os\npid = os.fork()\nif pid == 0:\n    same = plan().pack().tobytes() == first.pack().tobytes()\n"
        "    os._exit(0 if same and lazy.kernels() is lazy._plain() else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
        NUMBA_CACHE_DIR=str(tmp_path),
    )  # fmt: skip
    assert out.split() == ["0"]
