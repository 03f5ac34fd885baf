"""Continuous batching: every step admits what fits, runs one forward pass over all running requests, and retires what is done."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .backend import Array
from .decode_step import DecodeStep
from .kv_cache import PagedKVCache, PageTable
from .model import Batch, Llama
from .sampling import Sampler, SamplingParams


@dataclasses.dataclass(eq=False)
class Request:
    """One prompt and its growing answer. Times are `time.perf_counter` seconds."""

    number: int
    prompt: list[int]
    params: SamplingParams
    seed: int
    generated: list[int] = dataclasses.field(default_factory=list)
    finish_reason: str | None = None  # "stop": the model ended its answer; "length": max_new_tokens
    submitted_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0
    table: PageTable | None = None  # set while running

    def pending(self) -> list[int]:
        """Tokens whose keys and values are not in the cache yet: what is left of the prompt, then always the newest token."""
        done = self.table.length if self.table else 0
        return [self.generated[-1]] if self.generated else self.prompt[done:]


@dataclasses.dataclass
class Stats:
    """Counters over the engine's life. A step with prompt tokens in it counts as prefill, the others as decode."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    generated_tokens: int = 0


class Engine:
    """Schedules requests onto a model.

    Parameters
    ----------
    model : Llama
    cache : PagedKVCache
    max_batch : int
        Most requests that run at a time.
    seed : int
        For sampled requests; each derives its own from this and its number.
    stop_ids : iterable of int
        Tokens that end an answer.
    prefill_chunk : int
        Most prompt tokens in one step: a long prompt is spread over steps, so that it does not hold up the others' next token.
    fixed_steps : bool
        Run steps that only decode as `DecodeStep`: on a GPU a CUDA graph for each power of two of requests, captured when it is first needed.
    """

    def __init__(
        self,
        model: Llama,
        cache: PagedKVCache,
        *,
        max_batch: int = 8,
        seed: int = 0,
        stop_ids: Iterable[int] = (),
        prefill_chunk: int = 512,
        fixed_steps: bool = False,
    ) -> None:
        if max_batch < 1 or prefill_chunk < 1:
            raise ValueError(f"max_batch and prefill_chunk must be 1 or more, got {max_batch} and {prefill_chunk}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        self.model, self.cache, self.stats = model, cache, Stats()
        self._max_batch, self._prefill_chunk, self._stop_ids = max_batch, prefill_chunk, frozenset(stop_ids)
        self._sampler, self._seed = Sampler(model.backend), seed
        self._fixed_steps = fixed_steps
        self._steps: dict[int, DecodeStep] = {}  # by the number of requests they have room for
        self._numbers = itertools.count(1)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def submit(self, prompt: Sequence[int], params: SamplingParams | None = None) -> Request:
        """Queue a request.

        Raises
        ------
        ValueError
            If the prompt is empty, or prompt and longest answer could never fit the model's context or the whole KV cache.
        """
        params = params or SamplingParams()
        total = len(prompt) + params.max_new_tokens
        if not prompt:
            raise ValueError("the prompt is empty: a request needs at least one token")
        if total > self.model.config.context_length:
            raise ValueError(
                f"the request is longer than the model's context: {len(prompt)} prompt + {params.max_new_tokens} new tokens, "
                f"the context holds {self.model.config.context_length}. Shorten the prompt or lower max_new_tokens"
            )
        pages = self.cache.pages_for(total - 1)  # the last new token is never fed back, so it needs no room
        if pages > self.cache.num_pages:
            raise ValueError(
                f"the request can never fit the KV cache: {len(prompt)} prompt + {params.max_new_tokens} new tokens need {pages} pages of "
                f"{self.cache.page_size}, the pool has {self.cache.num_pages}. Raise num_pages or lower max_new_tokens"
            )
        number = next(self._numbers)
        # Every request has its own stream of random numbers, so that its answer does not depend on who else is running.
        seed = int(np.random.SeedSequence((self._seed, number)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        request = Request(number, list(prompt), params, seed, submitted_at=time.perf_counter())
        self.waiting.append(request)
        return request

    @property
    def idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not (self.running or self.waiting)

    def run(self) -> Iterator[tuple[Request, int]]:
        """Step until idle; yields every ``(request, new token)`` as it comes. Requests may be submitted in between."""
        while not self.idle:
            yield from self.step()

    def step(self) -> list[tuple[Request, int]]:
        """Admit, run one forward pass, sample, retire. Returns the new tokens; none while a long prompt is still being read."""
        started = time.perf_counter()
        self._admit()
        work = self._schedule()
        if not work:
            return []
        if self._fixed_steps and all(r.generated and not r.params.min_p for r, _ in work):
            samplers = [r for r, _ in work]
            tokens, prompt_tokens = self._decode(samplers), 0
        else:
            batch, samplers = self._pack(work)
            logits = self.model.forward(batch, self.cache)
            tokens = self._sample(logits, samplers) if samplers else []
            prompt_tokens = batch.tokens.size - batch.num_decode
            for step in self._steps.values():
                step.forget()

        now = time.perf_counter()
        self._count(prompt_tokens, len(tokens), now - started)
        for request, token in zip(samplers, tokens, strict=True):
            request.first_token_at = request.first_token_at or now
            request.generated.append(token)
            if token in self._stop_ids or len(request.generated) == request.params.max_new_tokens:
                self._retire(request, "stop" if token in self._stop_ids else "length", now)
        return list(zip(samplers, tokens, strict=True))

    def _admit(self) -> None:
        # First come, first served: a request that does not fit yet holds back those behind it, so that it cannot starve.
        while self.waiting and len(self.running) < self._max_batch:
            request = self.waiting[0]
            request.table = self.cache.open(len(request.prompt) + request.params.max_new_tokens - 1)
            if request.table is None:
                return
            self.running.append(self.waiting.popleft())

    def _schedule(self) -> list[tuple[Request, list[int]]]:
        """The tokens each running request contributes to this step; decoding requests first, as `Batch` wants them."""
        decoding = [(r, r.pending()) for r in self.running if r.generated]
        budget, prefilling = self._prefill_chunk, []
        for request in self.running:
            if not request.generated and budget:
                chunk = request.pending()[:budget]
                prefilling.append((request, chunk))
                budget -= len(chunk)
        return decoding + prefilling

    def _pack(self, work: list[tuple[Request, list[int]]]) -> tuple[Batch, list[Request]]:
        """Make room in the cache and lay the step out flat; also returns the requests that get a token from it, in row order."""
        tables: list[PageTable] = []
        samplers, rows, end = [], [], 0
        for request, chunk in work:
            assert request.table is not None
            end += len(chunk)
            if len(chunk) == len(request.pending()):  # the prompt is complete with this step
                samplers.append(request)
                rows.append(end - 1)
            request.table.extend(len(chunk))
            tables.append(request.table)
        indptr = lambda counts: np.cumsum([0, *counts], dtype=np.int32)  # noqa: E731
        batch = Batch(
            tokens=np.array([t for _, chunk in work for t in chunk], np.int32),
            qo_indptr=indptr(len(chunk) for _, chunk in work),
            kv_indptr=indptr(len(t.pages) for t in tables),
            kv_indices=np.array([p for t in tables for p in t.pages], np.int32),
            kv_last_page_len=np.array([t.last_page_len for t in tables], np.int32),
            logit_rows=np.array(rows, np.int32),
            num_decode=sum(bool(r.generated) for r, _ in work),
        )
        return batch, samplers

    def _decode(self, requests: list[Request]) -> list[int]:
        """A step in which every request only gets its next token."""
        for request in requests:
            assert request.table is not None
            request.table.extend(1)
        size = 1 << (len(requests) - 1).bit_length()
        if size not in self._steps:
            self._steps[size] = DecodeStep(self.model, self.cache, size)
        for other in self._steps:
            if other != size:
                self._steps[other].forget()
        return self._steps[size](requests)

    def _sample(self, logits: Array, requests: list[Request]) -> list[int]:
        return self._sampler(
            logits, [r.params for r in requests], [r.seed for r in requests], [len(r.generated) for r in requests]
        )

    def _count(self, prompt_tokens: int, new_tokens: int, seconds: float) -> None:
        self.stats.generated_tokens += new_tokens
        if prompt_tokens:
            self.stats.prefill_tokens += prompt_tokens
            self.stats.prefill_seconds += seconds
        else:
            self.stats.decode_tokens += new_tokens
            self.stats.decode_seconds += seconds

    def _retire(self, request: Request, reason: str, now: float) -> None:
        assert request.table is not None
        request.finish_reason, request.finished_at = reason, now
        request.table.close()
        request.table = None
        self.running.remove(request)

    def warm_up(self, params: Iterable[SamplingParams]) -> None:
        """Run tiny requests for each of `params`, so that every kernel is compiled and loaded, then forget that it happened."""
        stop_ids, self._stop_ids = self._stop_ids, frozenset()
        sizes = [1 << i for i in range((self._max_batch - 1).bit_length() + 1)] if self._fixed_steps else [1]
        for p in params:
            for size in sizes:
                for _ in range(min(size, self._max_batch)):
                    self.submit([0, 0], dataclasses.replace(p, max_new_tokens=2))  # one step prefills, the next decodes
                for _ in self.run():
                    pass
        self._stop_ids = stop_ids
        self.stats, self.cache.peak_pages, self._numbers = Stats(), 0, itertools.count(1)
