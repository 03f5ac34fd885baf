"""Time the candidate configurations of the memory-bound operators beside FlashInfer's kernels, checked against float64.

`python3 tools/gpu/time_ops.py [silu|add|append|rope …]` (in common.sh's environment, after warm_flashinfer.sh wait): one line per
candidate: median microseconds, TB/s, percent of this run's copy bandwidth, FlashInfer's time over ours. The first is the operator's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import calls, peers
from benchmarks.inputs import Attention, randn
from benchmarks.timing import CudaTimer, measure_limits

SHAPES = ((128, 4096), (4096, 4096), (16384, 8192))
TOKENS = (1, 128, 4096, 16384)
Variant = tuple[str, Callable[[], Any]]


class Bench:
    """Prints one table."""

    def __init__(self) -> None:
        self.timer = CudaTimer()
        self.timer.seconds = 0.8
        self.copy = measure_limits(self.timer, quick=False)["copy_tb_s"]
        print(f"copy {self.copy:.2f} TB/s")

    def table(self, title: str, moved: float, variants: list[Variant], peer: Callable[[], Callable[[], Any]]) -> None:
        """Time the variants and the peer in turns."""
        runs = list(variants)
        try:
            runs.append(("flashinfer", peer()))
        except peers.Missing as problem:
            print(f"  (no flashinfer: {problem})")
        samples = self.timer.measure([run for _, run in runs])
        reference = samples[-1].us if runs[-1][0] == "flashinfer" else float("nan")
        best = min(s.us for s in samples[: len(variants)])
        print(f"{title}")
        for (name, _), s in zip(runs, samples, strict=True):
            rate = moved / s.us / 1e6
            mark = "*" if s.us == best else " "
            print(f" {mark}{name:<64}{s.us:>8.2f} us {rate:>5.2f} TB/s {100 * rate / self.copy:>4.0f}%  x{reference / s.us:.3f}")  # fmt: skip


def close(got: Any, want: Any, what: str) -> None:
    """One rounding to bfloat16, relative to the largest value of the row."""
    error = (got.double() - want).abs() / want.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    worst = float(error.max())
    if not worst <= 1.1 * 2.0**-8:
        raise SystemExit(f"{what}: WRONG, relative error {worst:.3e}")


def stream() -> int:
    """torch's current stream."""
    import torch

    return torch.cuda.current_stream().cuda_stream


def silu(bench: Bench) -> None:
    """silu_and_mul."""
    import torch

    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.activation import act_candidates, gen_act_and_mul

    for rows, width in SHAPES:
        x = randn((rows, 2 * width), "bfloat16", "cuda")
        out = torch.empty((rows, width), dtype=x.dtype, device="cuda")
        gate, up = x[:, :width].double(), x[:, width:].double()
        want = gate / (1 + (-gate).exp()) * up
        del gate, up
        variants: list[Variant] = []
        for c in act_candidates(width // 8):
            kernel = gen_act_and_mul("silu", "bfloat16", width, config=c).build_and_load(0)
            values = (x.data_ptr(), out.data_ptr(), 0, 2 * width, 0, width, rows, rows, c.chunks, width)
            grid = -(-rows // c.rows) * c.chunks

            def run(kernel: Any = kernel, grid: int = grid, values: Any = values) -> None:
                kernel(stream(), grid, values, pdl_supported(0))

            out.fill_(float("nan"))
            run()
            close(out, want, kernel.spec.name)
            variants.append((kernel.spec.name, run))
        bench.table(
            f"silu_and_mul {rows}x{width}",
            6.0 * rows * width,
            variants,
            lambda x=x: calls.silu_and_mul(peers.flashinfer("activation"), x),
        )


def add(bench: Bench) -> None:
    """fused_add_rmsnorm."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.norm import fused_add_candidates, gen_fused_add_rmsnorm

    for rows, hidden in SHAPES:
        x, residual, weight = (randn(s, "bfloat16", "cuda") for s in ((rows, hidden), (rows, hidden), (hidden,)))
        total = x.double() + residual.double()
        want = total / (total.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        variants: list[Variant] = []
        for c in fused_add_candidates(hidden // 8):
            kernel = gen_fused_add_rmsnorm("bfloat16", hidden, config=c).build_and_load(0)

            def launch(a: Any, b: Any, kernel: Any = kernel, c: Any = c, weight: Any = weight) -> None:
                pointers = (a.data_ptr(), b.data_ptr(), weight.data_ptr())
                n, h = a.shape
                values = (*pointers, 0, h, 0, h, n, n, h, 1.0 / h, 1e-6)
                kernel(stream(), -(-n // c.rows), values, pdl_supported(0))

            own_x, own_residual = x.clone(), residual.clone()
            launch(own_x, own_residual)
            close(own_x, want, kernel.spec.name)
            close(own_residual, total, kernel.spec.name + " (residual)")
            variants.append((kernel.spec.name, lambda launch=launch, a=own_x, b=own_residual: launch(a, b)))
        del total, want
        bench.table(
            f"fused_add_rmsnorm {rows}x{hidden}",
            8.0 * rows * hidden,
            variants,
            lambda x=x, r=residual, w=weight: calls.fused_add_rmsnorm(peers.flashinfer("norm"), x, r, w)[0],
        )


def append(bench: Bench) -> None:
    """append_paged_kv_cache: every candidate in the operator's own place."""
    import torch

    import pyinfer
    from pyinfer import _page
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.page import append_candidates, gen_append

    heads, dim = 8, 128
    original = _page._append_kernel
    for tokens in TOKENS:
        batch = min(tokens, 64)
        new = [tokens // batch + (i < tokens % batch) for i in range(batch)]
        a = Attention(new, [n + 37 for n in new], heads, heads, dim, 16, True, "bfloat16", "cuda")
        ints = lambda v: torch.tensor(v, dtype=torch.int32, device="cuda")  # noqa: E731
        where = ints([i for i, n in enumerate(new) for _ in range(n)])
        positions = ints([37 + j for n in new for j in range(n)])
        key, value = randn((tokens, heads, dim), "bfloat16", "cuda"), randn((tokens, heads, dim), "bfloat16", "cuda")
        arguments = (a, key, value, where, positions)
        # What must come out, by indexing on the host.
        wanted = [torch.full_like(c, 7.0).cpu() for c in (a.k, a.v)]
        indptr, indices = a.kv_indptr.cpu().tolist(), a.kv_indices.cpu().tolist()
        pages = [indices[indptr[i] + (37 + j) // 16] for i, n in enumerate(new) for j in range(n)]
        slots = [(37 + j) % 16 for n in new for j in range(n)]
        for target, source in zip(wanted, (key, value), strict=True):
            target[pages, slots] = source.cpu()
        want = torch.stack(wanted).cuda()
        variants: list[Variant] = []
        for config in append_candidates(heads * dim * 2 // 16):
            kernel = gen_append(16, heads, dim * 2 // 16, config=config).build_and_load(0)
            _page._append_kernel = lambda *_, k=kernel, c=config: (k, pdl_supported(0), c[0] * c[1])  # type: ignore[assignment]
            _page.append_calls.clear()
            run, result = calls.append(pyinfer, *arguments)
            if not result().equal(want):
                raise SystemExit(f"{kernel.spec.name}: WRONG")
            _page.append_calls.clear()

            def timed(run: Any = run, config: Any = config, kernel: Any = kernel, store: dict[Any, Any] = {}) -> None:  # noqa: B006
                """The candidate's own remembered calls, not another's."""
                _page._append_kernel = lambda *_: (kernel, pdl_supported(0), config[0] * config[1])  # type: ignore[assignment]
                _page.append_calls._found = store.setdefault(config, {})
                run()

            variants.append((kernel.spec.name, timed))
        bench.table(
            f"append_paged_kv_cache {tokens} tokens",
            4.0 * tokens * heads * dim * 2,
            variants,
            lambda arguments=arguments: calls.append(peers.flashinfer("page"), *arguments)[0],
        )
    _page._append_kernel = original
    _page.append_calls.clear()


def rope(bench: Bench) -> None:
    """apply_rope_pos_ids_inplace."""
    import torch

    import pyinfer

    for tokens in TOKENS:
        q, k = (randn((tokens, heads, 128), "bfloat16", "cuda") for heads in (32, 8))
        positions = torch.randperm(32768, device="cuda")[:tokens].to(torch.int32)
        angle = positions.double()[:, None, None] * 10000.0 ** (-torch.arange(64, device="cuda").double() / 64)
        x = torch.cat([q, k], dim=1).double()
        a, b = x[..., :64], x[..., 64:]
        want = torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)
        run, result = calls.rope(pyinfer, q, k, positions)
        close(result(), want, "apply_rope_pos_ids_inplace")
        bench.table(
            f"apply_rope_pos_ids_inplace {tokens} tokens 32/8x128",
            4.0 * tokens * 40 * 128 * 2 / 2,
            [("pyinfer", run)],
            lambda q=q, k=k, p=positions: calls.rope(peers.flashinfer("rope"), q, k, p)[0],
        )


def main() -> None:
    """Run what was named, everything by default."""
    operators = {"silu": silu, "add": add, "append": append, "rope": rope}
    bench = Bench()
    for name in sys.argv[1:] or operators:
        operators[name](bench)


if __name__ == "__main__":
    main()
