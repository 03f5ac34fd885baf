"""Time every option of the attention kernels beside the plain one, on a CUDA machine.

`python -m benchmarks.attention_options [decode] [prefill] [--quick]`. One line an option: registers, µs, TB/s of K and V or TFLOP/s, time against
plain. Values are checked by tests/test_attention_options.py, not here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.attention_configs import KV_HEADS, PAGE, QO_HEADS, Problem, problem

# (batch, qo_len, kv_len, head_dim, causal)
CASES = {"decode": ((64, 1, 4096, 128, False), (64, 1, 4096, 64, False)), "prefill": ((1, 4096, 4096, 128, True),)}


def variants(p: Problem) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Label -> (kv dtype, options, what the launch takes beside them)."""
    import torch

    from pyinfer.jit.attention_options import PLAIN, AttentionExtras, AttentionOptions

    rows, batch = p.qo_len, len(p.last_page_len)
    kv_len = (int(p.indptr[1]) - 1) * PAGE + int(p.last_page_len[0])
    row_bytes = -(-rows * kv_len // 8)
    bits = torch.randint(0, 256, (batch * row_bytes + 1,), dtype=torch.uint8, device="cuda")
    offsets = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * row_bytes
    sinks = torch.randn(QO_HEADS, device="cuda")
    mask = AttentionExtras(mask_ptr=bits.data_ptr(), mask_indptr_ptr=offsets.data_ptr())
    kept = (bits, offsets, sinks)
    bf16, rope = torch.bfloat16, (1.0, 1e4)
    return {
        "plain": (bf16, PLAIN, {"_kept": kept}),
        "soft cap": (bf16, PLAIN, {"logits_soft_cap": 30.0}),
        "alibi": (bf16, AttentionOptions(alibi=True), {}),
        "alibi, soft cap": (bf16, AttentionOptions(alibi=True), {"logits_soft_cap": 30.0}),
        "sinks": (bf16, AttentionOptions(sinks=True), {"extras": AttentionExtras(sinks_ptr=sinks.data_ptr())}),
        "mask": (bf16, AttentionOptions(mask=True), {"extras": mask}),
        "rope": (bf16, AttentionOptions(rope=rope), {}),
        "e4m3": (torch.float8_e4m3fn, PLAIN, {}),
        "e5m2": (torch.float8_e5m2, PLAIN, {}),
        "e4m3, rope": (torch.float8_e4m3fn, AttentionOptions(rope=rope), {}),
    }


def runner(p: Problem, kv_dtype: Any, options: Any, more: dict[str, Any]) -> tuple[Any, Callable[[], None]]:
    """(kernel, run) of one variant."""
    import torch

    from pyinfer.core.device import num_sms
    from pyinfer.core.tensor import view
    from pyinfer.jit.attention_launch import device_config, launch_attention, prepare_attention
    from pyinfer.schedulers.prefill import prefill_plan

    dim = p.q.shape[-1]
    keys, values = p.k.to(kv_dtype), p.v.to(kv_dtype)
    out = torch.full_like(p.q, torch.nan)
    q, k, v, o = view(p.q), view(keys), view(values), view(out)
    config = device_config(0, q.dtype, dim, dim, p.qo_len * QO_HEADS // KV_HEADS, k.dtype, options)
    plan = prefill_plan(
        np.arange(len(p.indptr), dtype=np.int32) * p.qo_len, p.indptr, kv_indices=p.indices, last_page_len=p.last_page_len, causal=p.causal,
        num_qo_heads=QO_HEADS, num_kv_heads=KV_HEADS, head_dim_qk=dim, page_size=PAGE, tile_q=config.tile_q, tile_kv=config.tile_kv,
        num_sms=num_sms(0), ctas_per_sm=config.ctas_per_sm,
    )  # fmt: skip
    buffer = torch.from_numpy(plan.pack().copy()).cuda()
    workspace = torch.empty(plan.workspace_bytes + 16, dtype=torch.uint8, device="cuda")
    kept = (buffer, workspace, keys, values, out, more)
    arguments = {name: value for name, value in more.items() if not name.startswith("_")}
    soft_cap = arguments.get("logits_soft_cap", 0.0) > 0
    kernel = prepare_attention(0, plan, buffer.data_ptr(), q.dtype, soft_cap, config, k.dtype, o.dtype, options).kernel
    stream = torch.cuda.current_stream().cuda_stream

    def run(_kept: Any = kept) -> None:
        launch_attention(
            0, stream, buffer.data_ptr(), plan, q, k, v, buffer.data_ptr() + 4 * plan.offsets.kv_indices, "NHD", o, None, workspace.data_ptr(),
            sm_scale=dim**-0.5, options=options, config=config, **arguments,
        )  # fmt: skip

    return kernel, run


def main(arguments: list[str]) -> None:
    """Run the chosen families."""
    import torch

    from benchmarks.timing import CudaTimer

    timer = CudaTimer("--quick" in arguments)
    print(torch.cuda.get_device_name(0))
    for family in [a for a in arguments if not a.startswith("-")] or list(CASES):
        for case in CASES[family]:
            p = problem(*case)
            print(f"\n{family} b{case[0]} q{case[1]} kv{case[2]} d{case[3]}", flush=True)
            cases = variants(p)
            found = [
                (label, kv_dtype, *runner(p, kv_dtype, options, more))
                for label, (kv_dtype, options, more) in cases.items()
            ]
            samples = timer.measure([run for *_, run in found])
            for (label, kv_dtype, kernel, _), s in zip(found, samples, strict=True):
                size = p.bytes * kv_dtype.itemsize / 2
                speed = (
                    f"{size / s.us / 1e6:6.3f} TB/s" if family == "decode" else f"{p.flops / s.us / 1e6:6.1f} TFLOP/s"
                )
                registers = kernel.resources.registers
                print(
                    f"  {label:18s} {registers:3d} regs  {s.us:8.1f} us  {speed}  {s.us / samples[0].us:5.2f} x plain",
                    flush=True,
                )
            del p, found, cases
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
