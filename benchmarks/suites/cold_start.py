"""The first call of each operator in a fresh process: with an empty kernel cache, and again from the disk cache the
first run left.

What a first call includes: importing the operator's modules, rendering, NVRTC, writing and loading the kernel,
planning where there is a plan, running, and waiting for the result. Not included, because every GPU program pays it
anyway: importing torch, NumPy and CuPy, creating the CUDA context, making the inputs, `import pyinfer` (a case of its
own). Processes that find the disk cache find Python's bytecode too, as an installed package's do. FlashInfer's
figures are those of tools/gpu/warm_flashinfer.sh in this session (its modules built side by side), its import excluded
likewise.

`python -m benchmarks.suites.cold_start OPERATOR cuda|cpu` is one such process; it prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks import calls, machine, peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import Attention, logits, probabilities, randn
from benchmarks.timing import Samples

DEVICES = ("cuda", "cpu")
REPEATS = 3  # processes that read the disk cache; the median counts


def _attention(device: str, page: int, qo: int) -> Attention:
    small = device == "cpu"
    return Attention(
        [qo] * 2,
        [max(qo, 64)] * 2,
        *((4, 2) if small else (32, 8)),
        64 if small else 128,
        page,
        qo > 1,
        "float32" if small else "bfloat16",
        device,
    )


def _norm(device: str) -> Callable[[Any], Any]:
    x, weight = randn((8, 512), "float16", device), randn((512,), "float16", device)
    return lambda m: m.rmsnorm(x, weight)


def _add_norm(device: str) -> Callable[[Any], Any]:
    x, residual, weight = (randn(s, "float16", device) for s in ((8, 512), (8, 512), (512,)))
    return lambda m: m.fused_add_rmsnorm(x, residual, weight)


def _activation(device: str) -> Callable[[Any], Any]:
    x = randn((8, 512), "float16", device)
    return lambda m: m.silu_and_mul(x)


def _rope(cached: bool) -> Callable[[str], Callable[[Any], Any]]:
    def make(device: str) -> Callable[[Any], Any]:
        import torch

        q, k, where = (
            randn((4, 8, 64), "float16", device),
            randn((4, 2, 64), "float16", device),
            torch.arange(4, dtype=torch.int32, device=device),
        )
        table = torch.rand((64, 64), device=device)
        if cached:
            return lambda m: m.apply_rope_with_cos_sin_cache_inplace(where, q.view(4, -1), k.view(4, -1), 64, table)
        return lambda m: m.apply_rope_pos_ids_inplace(q, k, where)

    return make


def _append(device: str) -> Callable[[Any], Any]:
    import torch

    a = _attention(device, 16, 4)
    key = randn((8, a.num_kv_heads, a.head_dim), a.dtype, device)
    indptr, lengths, kv_indptr, last = (
        x.to(device) for x in (a.qo_indptr, torch.tensor(a.kv_lens, dtype=torch.int32), a.kv_indptr, a.last_page_len)
    )

    def call(m: Any) -> None:
        where = m.get_batch_indices_positions(indptr, lengths, 8)
        m.append_paged_kv_cache(key, key, *where, (a.k, a.v), a.kv_indices, kv_indptr, last)

    return call


def _single(qo: int) -> Callable[[str], Callable[[Any], Any]]:
    def make(device: str) -> Callable[[Any], Any]:
        a = _attention(device, 0, qo)
        q, k, v = a.q[:qo], a.k[:64], a.v[:64]
        return (
            (lambda m: m.single_decode_with_kv_cache(q[0], k, v))
            if qo == 1
            else (lambda m: m.single_prefill_with_kv_cache(q, k, v, causal=True))
        )

    return make


def _batch(call: Callable[[Any, Attention], Any], page: int, qo: int) -> Callable[[str], Callable[[Any], Any]]:
    """Wrapper, plan() and run() together."""

    def make(device: str) -> Callable[[Any], Any]:
        a = _attention(device, page, qo)
        import pyinfer

        calls.workspace(pyinfer, device)  # the caller's, made beforehand
        return lambda m: call(m, a)()

    return make


def _wrapper(
    name: str,
    qo: int,
    arrange: Callable[[Attention], tuple[dict[str, Any], tuple[Any, ...], Callable[[Any, Any], Any]]],
) -> Any:
    """A wrapper that `calls` has no function for, by what `arrange` gives: options of its constructor, arguments of plan(), and its run()."""

    def make(device: str) -> Callable[[Any], Any]:
        import torch

        a = _attention(device, 16, qo)
        dtype, (own, planned, run) = getattr(torch, a.dtype), arrange(a)

        def call(m: Any) -> Any:
            wrapper = getattr(m, name)(**own)
            options = {} if name.startswith("BatchMLA") else {"q_data_type": dtype, "kv_data_type": dtype}
            wrapper.plan(*planned, **options)
            return run(wrapper, a)

        return call

    return make


def _heads(a: Attention) -> tuple[int, int, int]:
    return a.num_qo_heads, a.num_kv_heads, a.head_dim


def _table(a: Attention) -> tuple[Any, ...]:
    return a.kv_indptr, a.kv_indices, a.last_page_len


def _batch_attention(a: Attention) -> Any:
    import torch

    planned = (
        a.qo_indptr,
        a.kv_indptr,
        a.kv_indices,
        torch.tensor(a.kv_lens, dtype=torch.int32),
        *_heads(a),
        a.head_dim,
        16,
        True,
    )
    return {}, planned, lambda w, a: w.run(a.q, (a.k, a.v))


def _pod(a: Attention) -> Any:
    prefill = (a.q[:16], a.k[:4].reshape(-1, *a.k.shape[2:]), a.v[:4].reshape(-1, *a.v.shape[2:]))
    return {}, (*_table(a), *_heads(a), 16), lambda w, a: w.run(*prefill, a.q[:2], (a.k, a.v), causal_p=True)


def _batch_pod(a: Attention) -> Any:
    import torch

    decode = torch.arange(3, dtype=torch.int32)
    planned = (a.qo_indptr, *_table(a), decode, *_table(a), *_heads(a), 16)
    return {}, planned, lambda w, a: w.run(a.q, (a.k, a.v), a.q[:2], (a.k, a.v))


def _cascade(a: Attention) -> Any:
    import torch

    shared = [
        torch.tensor([0, len(a.kv_lens)], dtype=torch.int32),
        torch.tensor([0, 4], dtype=torch.int32),
        a.kv_indices[:4],
        a.last_page_len[:1],
    ]
    own = [torch.arange(len(a.kv_lens) + 1, dtype=torch.int32), *_table(a)]
    levels = [list(x) for x in zip(shared, own, strict=True)]
    return {"num_levels": 2}, (*levels, *_heads(a), 16), lambda w, a: w.run(a.q, (a.k, a.v))


def _sinks(a: Attention) -> Any:
    import torch

    sinks = torch.zeros(a.num_qo_heads, device=a.device)
    planned = (a.qo_indptr, *_table(a), *_heads(a)[:2], a.head_dim, 16)
    return {}, planned, lambda w, a: w.run(a.q, (a.k, a.v), sinks)


def _sparse(a: Attention) -> Any:
    import torch

    indptr, indices = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([0, 0, 1], dtype=torch.int32)
    k, v = (x[:4].reshape(-1, *x.shape[2:]) for x in (a.k, a.v))
    planned = (indptr, indices, 32, 64, 16, 32, *_heads(a))
    return {}, planned, lambda w, a: w.run(a.q, k, v)


def _mla(device: str) -> Callable[[Any], Any]:
    import torch

    a = _attention(device, 16, 1)
    q, cache = (randn(shape, a.dtype, device) for shape in ((2, 16, 576), (*a.k.shape[:2], 576)))
    lens = torch.tensor(a.kv_lens, dtype=torch.int32)
    calls.workspace(SimpleNamespace(__name__="pyinfer"), device)
    return lambda m: calls.mla(m, q, cache, a.qo_indptr, a.kv_indptr, a.kv_indices, lens, 0.1)()


def _sampler(name: str, *arguments: Any) -> Callable[[str], Callable[[Any], Any]]:
    def make(device: str) -> Callable[[Any], Any]:
        x = (logits if name in ("softmax", "sampling_from_logits") else probabilities)(2, 1000, device)
        return lambda m: getattr(m, name)(x, *arguments)

    return make


def _merge(device: str) -> Callable[[Any], Any]:
    v, s = randn((4, 8, 64), "float16", device), randn((4, 8), "float32", device)
    return lambda m: m.merge_state(v, s, v, s)


# operator → (what makes its inputs and returns the call, FlashInfer's module)
OPERATORS: dict[str, tuple[Callable[[str], Callable[[Any], Any]], str]] = {
    "rmsnorm": (_norm, "norm"),
    "fused_add_rmsnorm": (_add_norm, "norm"),
    "silu_and_mul": (_activation, "activation"),
    "apply_rope_pos_ids_inplace": (_rope(False), "rope"),
    "apply_rope_with_cos_sin_cache_inplace": (_rope(True), "rope"),
    "append_paged_kv_cache": (_append, "page"),
    "single_decode_with_kv_cache": (_single(1), ""),
    "single_prefill_with_kv_cache": (_single(16), ""),
    "BatchDecodeWithPagedKVCacheWrapper": (_batch(calls.decode, 16, 1), "decode"),
    "BatchPrefillWithPagedKVCacheWrapper": (_batch(calls.prefill, 16, 16), "prefill_fa2"),
    "BatchPrefillWithRaggedKVCacheWrapper": (_batch(calls.prefill, 0, 16), "prefill_fa2"),
    "BatchPrefillWithRaggedKVCacheWrapper of 512 tokens": (_batch(calls.prefill, 0, 512), "prefill_fa2"),
    "BatchAttention": (_wrapper("BatchAttention", 16, _batch_attention), ""),
    "PODWithPagedKVCacheWrapper": (_wrapper("PODWithPagedKVCacheWrapper", 16, _pod), ""),
    "BatchPODWithPagedKVCacheWrapper": (_wrapper("BatchPODWithPagedKVCacheWrapper", 16, _batch_pod), ""),
    "MultiLevelCascadeAttentionWrapper": (_wrapper("MultiLevelCascadeAttentionWrapper", 1, _cascade), ""),
    "BatchAttentionWithAttentionSinkWrapper": (_wrapper("BatchAttentionWithAttentionSinkWrapper", 16, _sinks), ""),
    "BlockSparseAttentionWrapper": (_wrapper("BlockSparseAttentionWrapper", 16, _sparse), ""),
    "BatchMLAPagedAttentionWrapper": (_mla, ""),
    "softmax": (_sampler("softmax"), "sampling"),
    "sampling_from_probs": (_sampler("sampling_from_probs"), "sampling"),
    "sampling_from_logits": (_sampler("sampling_from_logits"), "sampling"),
    "top_p_sampling_from_probs": (_sampler("top_p_sampling_from_probs", 0.9), "sampling"),
    "top_k_sampling_from_probs": (_sampler("top_k_sampling_from_probs", 40), "sampling"),
    "top_k_top_p_sampling_from_probs": (_sampler("top_k_top_p_sampling_from_probs", 40, 0.9), "sampling"),
    "min_p_sampling_from_probs": (_sampler("min_p_sampling_from_probs", 0.1), "sampling"),
    "merge_state": (_merge, ""),
}


def run(ctx: Context) -> None:
    """Import time, then every operator from both caches. On a GPU six processes at a time, or the machine would be held for minutes."""
    _import_time(ctx)
    wanted = [name for name in OPERATORS if ctx.selected(Case("cold", name))]
    if ctx.quick:
        wanted = wanted[:1]
    with ThreadPoolExecutor(6 if ctx.device == "cuda" else 1) as pool:
        measured = dict(zip(wanted, pool.map(lambda name: _measure(ctx, name), wanted), strict=True))
    built = peers.build_times() if "flashinfer" in ctx.wanted else {}
    for name in wanted:
        cold, warm, problem = measured[name]
        module = OPERATORS[name][1]
        info = {
            "kernels_compiled": cold.get("kernels", []),
            "compile_seconds": cold.get("compile_seconds"),
            "second_call_us": cold.get("second_us"),
        }
        for label, times in (("empty cache", [cold["first_us"]] if cold else []), ("disk cache", warm)):
            entry: dict[str, Any] = {"name": "pyinfer", "status": problem or "ok"}
            if times:
                entry |= ctx.figures(Case("cold", name), Samples.of(times))
            results = [entry]
            if "flashinfer" in ctx.wanted and label == "empty cache":
                if module in built:
                    seconds = built[module]["seconds"]
                    results.append(
                        {
                            "name": "flashinfer",
                            "status": "ok",
                            **ctx.figures(Case("cold", name), Samples.of([seconds * 1e6])),
                        }
                    )
                else:
                    results.append(
                        {
                            "name": "flashinfer",
                            "status": f"missing: its module {module or 'for this'} was not built in this session",
                        }
                    )
            ctx.keep(Case("cold", f"{name}, {label}", info=info if label == "empty cache" else {}), results)


def _import_time(ctx: Context) -> None:
    """`import pyinfer` in a fresh interpreter; FlashInfer's after torch, which it imports itself."""
    case = Case("cold", "import")
    if not ctx.selected(case):
        return
    times = {"pyinfer": [_child("import", ctx.device, {})["first_us"] for _ in range(1 if ctx.quick else 5)]}
    results: list[dict[str, Any]] = [
        {"name": "pyinfer", "status": "ok", **ctx.figures(case, Samples.of(times["pyinfer"]))}
    ]
    if "flashinfer" in ctx.wanted:
        seconds = [record["import_seconds"] for record in peers.build_times().values()]
        entry: dict[str, Any] = (
            {"name": "flashinfer", "status": "ok", **ctx.figures(case, Samples.of([s * 1e6 for s in seconds]))}
            if seconds
            else {"name": "flashinfer", "status": "missing: no module of it was built in this session"}
        )
        results.append(entry)
    ctx.keep(case, results)


def _measure(ctx: Context, name: str) -> tuple[dict[str, Any], list[float], str]:
    """The cold process's record, the first-call times of processes that find the disk cache, and what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        # NVRTC (12.9 and newer) and the driver keep results of their own, which an earlier process may have left.
        own = {"PYINFER_WORKSPACE_BASE": "", "NUMBA_CACHE_DIR": "numba", "CUDA_CACHE_PATH": "nv"}
        environment = {variable: str(Path(folder) / name) for variable, name in own.items()}
        try:
            cold = _child(name, ctx.device, environment)
            return (
                cold,
                [_child(name, ctx.device, environment)["first_us"] for _ in range(1 if ctx.quick else REPEATS)],
                "",
            )
        except RuntimeError as error:
            return {}, [], f"error: {error}"


def _child(name: str, device: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.suites.cold_start", name, device]
    environment = {**os.environ, **environment}
    # Bytecode is part of what pip installs: of a checkout the first process writes it, were it not for this switch of tools/gpu.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1][:200])
    return json.loads(done.stdout.strip().splitlines()[-1])


def child(name: str, device: str) -> dict[str, Any]:
    """One process: prepare what is not counted, time the first call and the second."""
    if name == "import":
        begin = time.perf_counter()
        import pyinfer

        return {"first_us": (time.perf_counter() - begin) * 1e6}
    import torch

    if device == "cuda":
        import cupy

        torch.zeros(1, device="cuda")
        cupy.cuda.runtime.free(0)
    call = OPERATORS[name][0](device)
    import pyinfer

    def timed() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call(pyinfer)
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) * 1e6

    first, second = timed(), timed()
    record: dict[str, Any] = {"first_us": first, "second_us": second}
    launch = sys.modules.get("pyinfer.core.launch")
    if launch is not None and device == "cuda":
        record["kernels"] = sorted(spec.name for spec, _ in launch._loaded)
    return record


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], sys.argv[2])))
