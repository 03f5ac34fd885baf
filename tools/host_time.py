"""CPU time of one call of every plain operator, without a GPU: torch CPU tensors, a driver that launches nothing (tests/stub_driver.py).

`python tools/host_time.py`: microseconds of this thread's CPU time per call, best of some rounds: of a call like one before, and of the full path.
The driver's own time (about 2 us on a GPU host) comes on top; the CPU allocator stands in for the CUDA one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def best(call: Callable[[], Any], rounds: int = 7, calls: int = 3000) -> float:
    """Microseconds of CPU time per call."""
    times = []
    for _ in range(rounds):
        start = time.thread_time()
        for _ in range(calls):
            call()
        times.append((time.thread_time() - start) / calls * 1e6)
    return min(times)


def main() -> None:
    """Print the table."""
    import pytest
    import torch

    import pyinfer
    from pyinfer.core.calls import MISS, Calls
    from tests import stub_driver

    bf16, ints = torch.bfloat16, lambda *v: torch.tensor(v, dtype=torch.int32)
    x, r, w, out = torch.zeros(4, 256, dtype=bf16), torch.zeros(4, 256, dtype=bf16), torch.zeros(256, dtype=bf16), torch.zeros(4, 256, dtype=bf16)  # fmt: skip
    wide = torch.zeros(4, 512, dtype=bf16)
    q, k, positions = torch.zeros(4, 32, 128, dtype=bf16), torch.zeros(4, 8, 128, dtype=bf16), ints(0, 1, 2, 3)
    cache = (torch.zeros(12, 16, 8, 128, dtype=bf16), torch.zeros(12, 16, 8, 128, dtype=bf16))
    both = torch.zeros(12, 2, 16, 8, 128, dtype=bf16)
    indptr, last, pages = ints(0, 3, 6, 9, 12), ints(8, 8, 8, 8), torch.arange(12, dtype=torch.int32)
    index = (positions, positions, pages, indptr, last)
    table = torch.zeros(64, 128)
    flat_q, flat_k = q.view(4, -1), k.view(4, -1)
    cases: dict[str, Callable[[], Any]] = {
        "rmsnorm, out=": lambda: pyinfer.rmsnorm(x, w, 1e-6, out=out),
        "rmsnorm": lambda: pyinfer.rmsnorm(x, w),
        "fused_add_rmsnorm": lambda: pyinfer.fused_add_rmsnorm(x, r, w),
        "silu_and_mul, out=": lambda: pyinfer.silu_and_mul(wide, out=out),
        "silu_and_mul": lambda: pyinfer.silu_and_mul(wide),
        "apply_rope_pos_ids_inplace": lambda: pyinfer.apply_rope_pos_ids_inplace(q, k, positions),
        "apply_rope_pos_ids": lambda: pyinfer.apply_rope_pos_ids(q, k, positions),
        "apply_rope_with_cos_sin_cache_inplace": lambda: pyinfer.apply_rope_with_cos_sin_cache_inplace(
            positions, flat_q, flat_k, 128, table
        ),
        "append_paged_kv_cache, a pair": lambda: pyinfer.append_paged_kv_cache(k, k, positions, positions, cache, *index[2:]),
        "append_paged_kv_cache, one tensor": lambda: pyinfer.append_paged_kv_cache(k, k, positions, positions, both, *index[2:]),
        "get_batch_indices_positions": lambda: pyinfer.get_batch_indices_positions(indptr, last, 4),
        "get_seq_lens": lambda: pyinfer.get_seq_lens(indptr, last, 16),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        stub_driver.install(patch, record=False)
        known = {}
        for name, call in cases.items():
            call()
            known[name] = best(call)
        patch.setattr(Calls, "run", lambda *arguments: MISS)
        patch.setattr(
            Calls,
            "launch",
            lambda self, s, t, like, kernel, grid, values, n, pdl, *rest, **more: kernel(77, grid, values, pdl),
        )
        print(f"{'us of CPU time per call':<40} {'known':>7} {'full path':>10}")
        for name, call in cases.items():
            call()
            print(f"{name:<40} {known[name]:>7.2f} {best(call, 5, 1000):>10.2f}")
        scratch = torch.zeros(4, 256)
        print(f"{'torch add_ on the CPU, for scale':<40} {best(lambda: scratch.add_(1.0)):>7.2f}")


if __name__ == "__main__":
    main()
