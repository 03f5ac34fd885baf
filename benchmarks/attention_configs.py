"""Check and time every candidate configuration of the attention kernels, on a CUDA machine.

`python -m benchmarks.attention_configs [decode] [prefill] [--quick] [--no-peer]`, for whoever tunes `jit.attention.candidate_configs`.
One line a configuration: registers, blocks per multiprocessor, work items, relative error of sampled heads against float32, µs, TB/s of K
and V or TFLOP/s; FlashInfer beside it if installed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

QO_HEADS, KV_HEADS, PAGE = 32, 8, 16
# (batch, qo_len, kv_len, head_dim, causal)
CASES = {
    "decode": (
        (64, 1, 4096, 128, False),
        (1, 1, 1024, 128, False),
        (1, 1, 131072, 128, False),
        (16, 1, 8192, 128, False),
        (64, 1, 1024, 128, False),
        (64, 1, 4096, 64, False),
        (64, 1, 4096, 256, False),
    ),
    "prefill": (
        (1, 4096, 4096, 128, True),
        (1, 16384, 16384, 128, True),
        (8, 2048, 2048, 128, True),
        (32, 512, 512, 128, True),
        (1, 4096, 4096, 64, True),
        (1, 4096, 4096, 256, True),
    ),
}


class Problem(NamedTuple):
    """A batch on the GPU: tensors, host page table, and what a run costs."""

    q: Any
    k: Any
    v: Any
    qo_len: int
    indptr: np.ndarray
    indices: np.ndarray
    last_page_len: np.ndarray
    causal: bool
    bytes: float
    flops: float


def problem(batch: int, qo_len: int, kv_len: int, dim: int, causal: bool) -> Problem:
    """Random bf16 data; pages in random order."""
    import torch

    pages = -(-kv_len // PAGE)
    rng = np.random.default_rng()
    indices = rng.permutation(batch * pages).astype(np.int32)
    k, v = (torch.randn(batch * pages, PAGE, KV_HEADS, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(batch * qo_len, QO_HEADS, dim, device="cuda", dtype=torch.bfloat16)
    visible = qo_len * kv_len - (qo_len * (qo_len - 1) // 2 if causal else 0)
    return Problem(
        q, k, v, qo_len, np.arange(batch + 1, dtype=np.int32) * pages, indices, np.full(batch, kv_len - (pages - 1) * PAGE, np.int32), causal,
        4.0 * batch * kv_len * KV_HEADS * dim, 4.0 * batch * QO_HEADS * visible * dim,
    )  # fmt: skip


def relative_error(p: Problem, out: Any) -> float:
    """Largest relative error over the first and last request and head, against float32."""
    import torch

    worst = 0.0
    batch = len(p.last_page_len)
    for request in {0, batch - 1}:
        pages = torch.as_tensor(p.indices[p.indptr[request] : p.indptr[request + 1]].astype(np.int64), device="cuda")
        kv_len = (len(pages) - 1) * PAGE + int(p.last_page_len[request])
        rows = slice(request * p.qo_len, (request + 1) * p.qo_len)
        for head in (0, QO_HEADS - 1):
            kv_head = head // (QO_HEADS // KV_HEADS)
            k, v = (x[pages, :, kv_head].reshape(-1, x.shape[-1])[:kv_len].float() for x in (p.k, p.v))
            score = p.q[rows, head].float() @ k.T / k.shape[1] ** 0.5
            if p.causal:
                i = torch.arange(p.qo_len, device="cuda")[:, None] + kv_len - p.qo_len
                score.masked_fill_(torch.arange(kv_len, device="cuda") > i, -torch.inf)
            want = score.softmax(-1) @ v
            got = out[rows, head].float()
            worst = max(worst, float((got - want).norm() / want.norm()))
    return worst


def candidates(p: Problem) -> Iterator[tuple[str, Any, Callable[[], Any], Any]]:
    """(label, kernel, run, out) of every configuration that fits this GPU."""
    import torch

    from pyinfer.core.device import arch_number_of, num_sms
    from pyinfer.core.tensor import view
    from pyinfer.jit.attention import candidate_configs
    from pyinfer.jit.attention_launch import launch_attention, prepare_attention
    from pyinfer.schedulers.decode import decode_plan
    from pyinfer.schedulers.prefill import prefill_plan

    dim = p.q.shape[-1]
    stream = torch.cuda.current_stream().cuda_stream
    for config in candidate_configs(arch_number_of(0), dim, dim, p.qo_len * QO_HEADS // KV_HEADS):
        shape = dict(
            num_qo_heads=QO_HEADS, num_kv_heads=KV_HEADS, head_dim_qk=dim, page_size=PAGE, tile_q=config.tile_q, tile_kv=config.tile_kv,
            num_sms=num_sms(0), ctas_per_sm=config.ctas_per_sm,
        )  # fmt: skip
        if p.qo_len == 1:
            plan = decode_plan(p.indptr, p.indices, p.last_page_len, **shape)
        else:
            qo_indptr = np.arange(len(p.indptr), dtype=np.int32) * p.qo_len
            plan = prefill_plan(
                qo_indptr, p.indptr, kv_indices=p.indices, last_page_len=p.last_page_len, causal=p.causal, **shape
            )
        buffer = torch.from_numpy(plan.pack().copy()).cuda()
        workspace = torch.empty(plan.workspace_bytes + 16, dtype=torch.uint8, device="cuda")
        out = torch.full_like(p.q, torch.nan)
        q, k, v, o = view(p.q), view(p.k), view(p.v), view(out)
        ready = prepare_attention(0, plan, buffer.data_ptr(), q.dtype, False, config)
        kept = (buffer, workspace)

        def run(plan=plan, buffer=buffer, workspace=workspace, q=q, k=k, v=v, o=o, config=config, _kept=kept) -> None:
            launch_attention(
                0, stream, buffer.data_ptr(), plan, q, k, v, buffer.data_ptr() + 4 * plan.offsets.kv_indices, "NHD", o, None, workspace.data_ptr(),
                sm_scale=q.shape[-1] ** -0.5, config=config,
            )  # fmt: skip

        yield (
            f"{config.tag:28s} {ready.kernel.resources.registers:3d} regs {ready.kernel.blocks_per_sm()} blocks/SM {plan.n_work:5d} items",
            ready.kernel,
            run,
            out,
        )


def flashinfer_run(p: Problem) -> tuple[Callable[[], Any], Any] | None:
    """The peer's run and output, None if it is not installed."""
    try:
        import flashinfer
        import torch
    except ImportError:
        return None
    host = [torch.from_numpy(x) for x in (p.indptr, p.indices, p.last_page_len)]
    workspace = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    dim = p.q.shape[-1]
    out = torch.empty_like(p.q)
    if p.qo_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=True)
        wrapper.plan(
            host[0],
            host[1].cuda(),
            host[2],
            QO_HEADS,
            KV_HEADS,
            dim,
            PAGE,
            q_data_type=torch.bfloat16,
            kv_data_type=torch.bfloat16,
        )
    else:
        qo_indptr = torch.arange(len(p.indptr), dtype=torch.int32) * p.qo_len
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, backend="fa2")
        wrapper.plan(
            qo_indptr,
            host[0],
            host[1].cuda(),
            host[2],
            QO_HEADS,
            KV_HEADS,
            dim,
            PAGE,
            causal=p.causal,
            q_data_type=torch.bfloat16,
        )
    return lambda: wrapper.run(p.q, (p.k, p.v), out=out), out


def main(arguments: list[str]) -> None:
    """Run the chosen families."""
    import torch

    from benchmarks.timing import CudaTimer

    quick = "--quick" in arguments
    families = [a for a in arguments if not a.startswith("-")] or ["decode", "prefill"]
    timer = CudaTimer(quick)
    print(torch.cuda.get_device_name(0))
    for family in families:
        for case in CASES[family]:
            p = problem(*case)
            print(
                f"\n{family} b{case[0]} q{case[1]} kv{case[2]} d{case[3]} {'causal' if case[4] else 'full'}", flush=True
            )
            found = list(candidates(p))
            runs = [run for _, _, run, _ in found]
            labels = [label for label, _, _, _ in found]
            peer = flashinfer_run(p) if "--no-peer" not in arguments else None
            outs = [out for _, _, _, out in found]
            if peer:
                runs.append(peer[0])
                labels.append("flashinfer")
                outs.append(peer[1])
            for run in runs:
                run()
            torch.cuda.synchronize()
            errors = [relative_error(p, out) for out in outs]
            for label, error, s in zip(labels, errors, timer.measure(runs), strict=True):
                speed = (
                    f"{p.bytes / s.us / 1e6:6.3f} TB/s"
                    if family == "decode"
                    else f"{p.flops / s.us / 1e6:6.1f} TFLOP/s"
                )
                print(f"  {label:62s} err {error:.1e}  {s.us:8.1f} us  {speed}", flush=True)
            del p, found, runs, outs, peer
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
