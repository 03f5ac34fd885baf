"""The peers: FlashInfer, FlashAttention-3 and FlashMLA (as vLLM ships them), torch SDPA, torch.compile, Triton. What is not there is
reported, never skipped in silence.

`python -m benchmarks.peers warm MODULE` builds one FlashInfer module by making the very call that is timed later
(tools/gpu/warm_flashinfer.sh starts one process each). `python -m benchmarks.peers list` prints the modules.

Environment: PYINFER_BENCH_SITE, the folder that setup.sh unpacked the peers into; PYINFER_BENCH_BUILT, a folder of
markers: with it set, a FlashInfer module that is not marked as built counts as missing, so that no measurement waits
minutes for nvcc.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import calls, inputs

NAMES = ("flashinfer", "fa3", "flashmla", "torch", "torch-compile", "triton")


class Missing(Exception):
    """A peer that cannot be measured here; the message says why."""


def _use_site() -> Path | None:
    site = os.environ.get("PYINFER_BENCH_SITE")
    if site and site not in sys.path and Path(site).is_dir():
        sys.path.append(site)  # behind everything: it must not hide the machine's own packages
    return Path(site) if site else None


@functools.cache
def _import_flashinfer() -> Any:
    _use_site()
    try:
        import flashinfer
    except Exception as error:  # a broken dependency raises anything
        raise Missing(f"flashinfer cannot be imported: {type(error).__name__}: {error}") from error
    return flashinfer


def flashinfer(module: str) -> Any:
    """The flashinfer package, if its JIT module (a key of MODULES) is built already or may be built now."""
    built = os.environ.get("PYINFER_BENCH_BUILT")
    if built and not (Path(built) / f"{module}.json").exists():
        raise Missing(f"flashinfer's module {module} is not built (tools/gpu/warm_flashinfer.sh start {module})")
    return _import_flashinfer()


@functools.cache
def _fa3_forward() -> tuple[Any, list[Any]]:
    site = _use_site()
    library = site / "vllm_flash_attn" / "_vllm_fa3_C.abi3.so" if site else None
    if library is None or not library.exists():
        raise Missing("FlashAttention-3 is not there (pack_vllm_kernels.sh DIR fa3, then setup.sh; PYINFER_BENCH_SITE)")
    import torch

    try:
        torch.ops.load_library(str(library))
        forward = torch.ops._vllm_fa3_C.fwd.default
    except Exception as error:  # built for another torch or CUDA
        raise Missing(f"FlashAttention-3 does not load: {type(error).__name__}: {error}") from error
    return forward, [argument.name for argument in forward._schema.arguments]


def fa3(a: inputs.Attention) -> calls.Run:
    """FlashAttention-3's forward over a batch: decode and prefill, pages or ragged.

    Its operator takes 38 positional arguments; they are filled by the names in its own schema, so a renamed or moved one fails here and not in a wrong result.
    """
    import torch

    forward, names = _fa3_forward()
    cumulative = a.qo_indptr.to(a.device)
    given: dict[str, Any] = {
        "q": a.q, "k": a.k, "v": a.v, "cu_seqlens_q": cumulative, "max_seqlen_q": max(a.qo_lens), "max_seqlen_k": max(a.kv_lens),
        "softmax_scale": a.head_dim**-0.5, "is_causal": a.causal, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0,
        "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "cp_world_size": 1, "cp_rank": 0,
        "out": torch.empty_like(a.q, dtype=getattr(torch, a.out_dtype)),
    }  # fmt: skip
    if a.page_size:
        given |= {
            "seqused_k": torch.tensor(a.kv_lens, dtype=torch.int32, device=a.device),
            "page_table": a.block_table(),
        }
    else:
        given["cu_seqlens_k"] = a.kv_indptr.to(a.device)
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise Missing(f"FlashAttention-3's operator has no argument {unknown}: another version than vLLM 0.26.0's")
    arguments = [given.get(name) for name in names]
    return lambda: forward(*arguments)[0]


def _flashmla_dense() -> Any:
    site = _use_site()
    library = site / "_flashmla_C.abi3.so" if site else None
    if library is None or not library.exists():
        raise Missing("FlashMLA is not there (pack_vllm_kernels.sh DIR flashmla, then setup.sh; PYINFER_BENCH_SITE)")
    import torch

    try:
        torch.ops.load_library(str(library))
        return torch.ops._flashmla_C.dense_decode_fwd
    except Exception as error:  # built for another torch or CUDA
        raise Missing(f"FlashMLA does not load: {type(error).__name__}: {error}") from error


def flashmla(
    q: Any, cache: Any, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len: Any, sm_scale: float
) -> calls.Run:
    """FlashMLA's dense decode, causal: q [tokens, heads, 576] with equally many tokens a request, cache [pages, 64, 576]."""
    import torch

    if cache.shape[1] != 64:
        raise Missing("FlashMLA reads pages of 64")
    dense = _flashmla_dense()
    batch = len(kv_len)
    lengths = (kv_indptr[1:] - kv_indptr[:-1]).tolist()
    table = torch.zeros((batch, max(lengths)), dtype=torch.int32, device=q.device)
    for b, n in enumerate(lengths):
        table[b, :n] = kv_indices[int(kv_indptr[b]) : int(kv_indptr[b]) + n]
    queries, pages, on_device = q.view(batch, -1, *q.shape[1:]), cache.unsqueeze(2), kv_len.to(q.device)
    schedule: list[Any] = [None, None]

    def run() -> Any:
        out, _, *schedule[:] = dense(queries, pages, 512, on_device, table, sm_scale, True, *schedule, None)
        return out

    return lambda: run().view(*q.shape[:2], 512)


def torch_sdpa(a: inputs.Attention, backend: str) -> tuple[calls.Run, calls.Run]:
    """torch's scaled_dot_product_attention (backend "cudnn" or "flash") over [B, H, L, D], KV heads repeated beforehand, outside the timing."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if a.page_size:
        raise Missing("torch's attention reads no pages")
    k, v = (x.contiguous() for x in a.dense_kv(expand_heads=True))
    batch = len(a.qo_lens)
    q = a.q.view(batch, a.qo_lens[0], a.num_qo_heads, a.head_dim).transpose(1, 2).contiguous()
    choice = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]

    def run() -> torch.Tensor:
        with sdpa_kernel(choice):
            return F.scaled_dot_product_attention(q, k, v, is_causal=a.causal)

    return run, lambda: run().transpose(1, 2).reshape(a.q.shape)  # compared with ours in our layout


# Small calls of exactly the kinds the suites make: dtype, head_dim, page table and options decide which module FlashInfer builds.
def _attention(
    page_size: int, qo: int, kv: int, heads: tuple[int, int] = (32, 8), causal: bool = True
) -> inputs.Attention:
    return inputs.Attention([qo] * 2, [kv] * 2, *heads, 128, page_size, causal, "bfloat16", "cuda")


def _warm_prefill(backend: str) -> None:
    module = _import_flashinfer()
    calls.prefill(module, _attention(0, 64, 64), backend=backend)()
    calls.prefill(module, _attention(0, 64, 64, causal=False), backend=backend)()
    calls.prefill(module, _attention(16, 64, 64), backend=backend)()
    if backend == "fa2":
        calls.decode(module, _attention(16, 1, 64, causal=False), use_tensor_cores=True, backend="fa2")()


def _warm_decode() -> None:
    for heads in ((32, 8), (32, 32)):
        calls.decode(_import_flashinfer(), _attention(16, 1, 64, heads, causal=False), use_tensor_cores=False)()


def _warm_norm() -> None:
    x = inputs.randn((4, 4096), "bfloat16", "cuda")
    calls.rmsnorm(_import_flashinfer(), x, x[0])()
    calls.fused_add_rmsnorm(_import_flashinfer(), x, x, x[0])[0]()


def _warm_rope() -> None:
    import torch

    q, k, positions = (
        inputs.randn((4, 32, 128), "bfloat16", "cuda"),
        inputs.randn((4, 8, 128), "bfloat16", "cuda"),
        torch.arange(4, dtype=torch.int32, device="cuda"),
    )
    calls.rope(_import_flashinfer(), q, k, positions)[0]()
    calls.rope_cached(_import_flashinfer(), q, k, positions, torch.rand((64, 128), device="cuda"))[0]()


def _warm_page() -> None:
    import torch

    a = _attention(16, 4, 64)
    module = _import_flashinfer()
    where = module.get_batch_indices_positions(
        a.qo_indptr.cuda(), torch.tensor(a.kv_lens, dtype=torch.int32, device="cuda"), 8
    )
    calls.append(
        module, a, inputs.randn((8, 8, 128), "bfloat16", "cuda"), inputs.randn((8, 8, 128), "bfloat16", "cuda"), *where
    )[0]()


def _warm_sampling() -> None:
    module = _import_flashinfer()
    p = inputs.probabilities(2, 1024, "cuda")
    module.sampling.sampling_from_probs(p)
    module.sampling.softmax(p)


def _warm_activation() -> None:
    calls.silu_and_mul(_import_flashinfer(), inputs.randn((4, 8192), "bfloat16", "cuda"))()


def _warm_mla() -> None:
    import torch

    q, cache = inputs.randn((2, 128, 576), "bfloat16", "cuda"), inputs.randn((2, 64, 576), "bfloat16", "cuda")
    ones = torch.arange(3, dtype=torch.int32)
    calls.mla(
        _import_flashinfer(),
        q,
        cache,
        ones,
        ones,
        ones[:2],
        torch.full((2,), 64, dtype=torch.int32),
        0.1,
        backend="fa3",
    )()


MODULES: dict[str, Callable[[], None]] = {
    "decode": _warm_decode,
    "prefill_fa2": lambda: _warm_prefill("fa2"),
    "prefill_fa3": lambda: _warm_prefill("fa3"),
    "norm": _warm_norm,
    "activation": _warm_activation,
    "sampling": _warm_sampling,
    "rope": _warm_rope,
    "page": _warm_page,
    "mla_fa3": _warm_mla,
}


def warm(module: str) -> float:
    """Build a FlashInfer module by calling it; writes its marker and returns the seconds of the first call (import, torch and context excluded)."""
    import torch

    torch.zeros(1, device="cuda")
    begin = time.perf_counter()
    version = _import_flashinfer().__version__
    imported = time.perf_counter()
    MODULES[module]()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - imported
    folder = os.environ.get("PYINFER_BENCH_BUILT")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        record = {
            "module": module,
            "version": version,
            "seconds": round(seconds, 1),
            "import_seconds": round(imported - begin, 2),
            "max_jobs": os.environ.get("MAX_JOBS", ""),
        }
        (Path(folder) / f"{module}.json").write_text(json.dumps(record) + "\n")
    return seconds


def build_times() -> dict[str, dict[str, Any]]:
    """What `warm` wrote: module → record."""
    folder = os.environ.get("PYINFER_BENCH_BUILT")
    return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))} if folder else {}


def version(name: str) -> str:
    """A peer's version, or 'missing: …'."""
    try:
        if name == "flashinfer":
            return str(_import_flashinfer().__version__)
        if name == "fa3":
            _fa3_forward()
            return "vLLM 0.26.0's build"
        if name == "flashmla":
            _flashmla_dense()
            return "vLLM 0.26.0's build"
        if name == "triton":
            import triton

            return str(triton.__version__)
        import torch

        return f"torch {torch.__version__}" + (
            f", cuDNN {torch.backends.cudnn.version()}" if name == "torch" and torch.cuda.is_available() else ""
        )
    except (Missing, ImportError) as error:
        return f"missing: {error}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["warm"] and len(sys.argv) == 3 and sys.argv[2] in MODULES:
        print(f"{sys.argv[2]}: first call {warm(sys.argv[2]):.1f} s")
    else:
        print("usage: python -m benchmarks.peers warm " + "|".join(MODULES))
        sys.exit(0 if sys.argv[1:2] == ["list"] else 2)
