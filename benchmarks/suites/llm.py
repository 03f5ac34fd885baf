"""Tokens per second of examples/llm: SmolLM2-135M, eight prompts, greedy, continuous batching; prefill and decode steps apart."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Case, Context
from benchmarks.timing import Samples

DEVICES = ("cuda", "cpu")
PROMPTS = (
    "Explain what a paged key-value cache is.",
    "Name three rivers in Europe and the seas that they flow into.",
    "Write a short poem about snow.",
    "What is 17 times 23? Show the steps.",
    "Why is the sky blue?",
    "Give me a recipe for pancakes.",
    "Translate to French: the train leaves at noon.",
    "Who wrote Don Quixote, and when?",
)


def run(ctx: Context) -> None:
    """8 requests (4 on the CPU); on a GPU with steps launched one by one and as CUDA graphs, and one request as a CUDA graph."""
    cuda = ctx.device == "cuda"
    count, new = (2, 4) if ctx.quick else (8, 128) if cuda else (4, 48)
    for requests, graph in ((count, False), (count, True), (1, True)) if cuda else ((count, False),):
        how = " CUDA graph" if graph else ""
        case = Case(
            "llm",
            f"SmolLM2-135M {requests} request{'s' if requests > 1 else ''} × {new} tokens {'bfloat16' if cuda else 'float32'}{how}",
        )
        if ctx.selected(case):
            _measure(ctx, case, requests, new, graph)


def _measure(ctx: Context, case: Case, count: int, new: int, graph: bool) -> None:
    entry: dict[str, Any] = {"name": "pyinfer"}
    info: dict[str, Any] = {}
    try:
        stats = _generate(ctx.device, count, new, ctx.timer, graph)
        info = {
            "prefill_tokens_s": stats.prefill_tokens / stats.prefill_seconds,
            "decode_tokens_s": stats.decode_tokens / stats.decode_seconds,
        }
        info |= {"prefill_tokens": stats.prefill_tokens, "decode_tokens": stats.decode_tokens}
        step = stats.decode_seconds * 1e6 * count / stats.decode_tokens
        entry |= {"status": "ok", **ctx.figures(case, Samples.of([step]))}
        print(
            f"llm: prefill {info['prefill_tokens_s']:.0f} tokens/s, decode {info['decode_tokens_s']:.0f} tokens/s; below: µs of a decode step"
        )
    except (ImportError, FileNotFoundError) as problem:
        entry["status"] = f"missing: {problem}"
    except Exception as problem:
        entry["status"] = (
            f"error: {type(problem).__name__}: {str(problem).splitlines()[0][:200] if str(problem) else ''}"
        )
    ctx.keep(Case(case.op, case.spec, info=info), [entry])


def _generate(device: str, count: int, new: int, timer: Any, graph: bool) -> Any:
    """Load, warm up, answer the prompts; returns the engine's counters."""
    from examples.llm.backend import make_backend
    from examples.llm.engine import Engine
    from examples.llm.kv_cache import PagedKVCache
    from examples.llm.model import Llama
    from examples.llm.sampling import SamplingParams
    from examples.llm.tokenizer import Tokenizer
    from examples.llm.weights import find_gguf, iter_tensors, open_gguf, read_config

    reader, backend = open_gguf(find_gguf()), make_backend(device)
    config, tokenizer = read_config(reader), Tokenizer(reader)
    model = Llama(config, iter_tensors(reader), backend)
    # No stop tokens: every answer has the full length, so the batch stays full and the figure says what a step costs.
    engine = Engine(model, PagedKVCache(config, backend, 256, 16), max_batch=count, stop_ids=(), fixed_steps=graph)
    params = SamplingParams(new)
    engine.warm_up([params])
    for prompt in PROMPTS[:count]:
        engine.submit(tokenizer.encode(tokenizer.chat(prompt)), params)
    for _ in engine.run():
        pass
    timer.synchronize()
    return engine.stats
