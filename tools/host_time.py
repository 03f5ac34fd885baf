"""CPU time of one call of every plain operator, of plan() and of run(), without a GPU: CPU tensors, a driver that launches nothing (tests/stub_driver.py).

`python tools/host_time.py`: microseconds of this thread's CPU time per call, best of some rounds: of a call like one before, and of the full path.
The driver's own time (about 2 us on a GPU host) comes on top; the CPU allocator stands in for the CUDA one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
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


def wrappers(patch: Any) -> Iterator[tuple[str, float]]:
    """plan() like the last one, the first run() after it and run() like the last one, of the batch wrappers; copies go nowhere."""
    import cupy
    import torch

    import pyinfer
    from pyinfer.core import calls, tensormap
    from pyinfer.jit.spec import JitSpec
    from pyinfer.schedulers import lazy
    from tests import stub_driver, stub_runtime

    patch.undo()
    stub_runtime.install(patch)
    patch.setattr(JitSpec, "build_and_load", lambda self, device: stub_driver.StubKernel(self, None))
    patch.setattr(tensormap, "encode", lambda *layout: bytes(tensormap.BYTES))
    for name in ("memcpyAsync", "eventSynchronize"):
        patch.setattr(cupy.cuda.runtime, name, lambda *arguments: None)
    assert calls._tensor_guards() is not None
    lazy.wait()
    bf16, workspace = torch.bfloat16, torch.empty(1 << 24, dtype=torch.uint8)
    rows, last, pages = (
        torch.arange(65, dtype=torch.int32),
        torch.full((64,), 16, dtype=torch.int32),
        torch.zeros(4096, dtype=torch.int32),
    )
    q, out = torch.zeros(64, 4, 64, dtype=bf16), torch.zeros(64, 4, 64, dtype=bf16)
    cache, keys = torch.zeros(8, 2, 16, 1, 64, dtype=bf16), torch.zeros(64, 1, 64, dtype=bf16)
    starts, values = rows * 64, keys.clone()
    decode = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    ragged = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace)
    plans: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "decode, 64 requests of 64 host pages": (
            lambda: decode.plan(starts, pages, last, 4, 1, 64, 16, q_data_type=bf16),
            lambda: decode.run(q, cache, out=out),
        ),
        "ragged prefill, 64 requests of a token": (
            lambda: ragged.plan(rows, rows, 4, 1, 64, causal=True, q_data_type=bf16),
            lambda: ragged.run(q, keys, values, out=out),
        ),
    }  # fmt: skip
    for name, (plan, run) in plans.items():
        plan()
        yield f"plan() {name}", best(plan, calls=300)
        yield "... and the first run()", best(lambda plan=plan, run=run: (plan(), run()), calls=300)
        run()
        yield "run()", best(run, calls=1000)


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
        for name, microseconds in wrappers(patch):
            print(f"{name:<40} {microseconds:>7.2f}")
        scratch = torch.zeros(4, 256)
        print(f"{'torch add_ on the CPU, for scale':<40} {best(lambda: scratch.add_(1.0)):>7.2f}")


if __name__ == "__main__":
    main()
