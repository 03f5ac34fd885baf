"""A decode step whose inputs stay where they are, so that a GPU can replay it as one CUDA graph.

Everything that changes from step to step changes on the device: a request's length and its place in the answer are counted up, the attention wrapper
schedules itself from the lengths (`replan`), the chosen tokens are the next step's input. The host only reads the tokens. It writes when a request joins,
leaves or takes a new page. On the CPU the same code runs as it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

import pyinfer

from .kv_cache import PagedKVCache
from .model import Llama, StepInputs

if TYPE_CHECKING:
    from .engine import Request


class DecodeStep:
    """One new token for each of up to `size` requests.

    Parameters
    ----------
    model : Llama
    cache : PagedKVCache
    size : int
        Requests that a step has room for. Rows of no request have length 0: nothing is appended for them, and their token goes nowhere.
    """

    def __init__(self, model: Llama, cache: PagedKVCache, size: int) -> None:
        c, backend = model.config, model.backend
        self._model, self._cache, self._backend, self.size = model, cache, backend, size
        self._room = min(
            cache.pages_for(c.context_length), cache.num_pages
        )  # page numbers that a request's row of the table holds
        int32, int64, float32 = (
            lambda n, dtype=dtype: np.zeros(n, dtype) for dtype in (np.int32, np.int64, np.float32)
        )
        self._host, self._here, self._send = backend.fixed(
            token=int32(size), running=int32(size), length=int32(size), pages=int32(size * self._room), page_indptr=int32(size + 1),
            last_page_len=int32(size), row=int32(size), top_k=int32(size), temperature=float32(size), top_p=float32(size), seed=int64(size),
            place=int64(size),
        )  # fmt: skip
        here = self._here
        self._attention = pyinfer.BatchDecodeWithPagedKVCacheWrapper(
            None, "NHD", use_cuda_graph=True, paged_kv_indptr_buffer=here["page_indptr"], paged_kv_indices_buffer=here["pages"],
            paged_kv_last_page_len_buffer=here["last_page_len"],
        )  # fmt: skip
        self._attention.plan(  # of empty requests: it fixes the shapes
            np.zeros(size + 1, np.int32), np.zeros(0, np.int32), np.zeros(size, np.int32),
            c.num_qo_heads, c.num_kv_heads, c.head_dim, cache.page_size, sm_scale=c.sm_scale, q_data_type=backend.dtype, kv_data_type=backend.dtype,
        )  # fmt: skip
        self._filled: tuple[tuple[int, int], ...] | None = None
        self._fill([])
        self._replay = backend.capture(self._run)

    def __call__(self, requests: Sequence[Request]) -> list[int]:
        """The requests' next tokens. Each table must have room for one more token, and count it already."""
        now = tuple((r.number, len(r.table.pages)) for r in requests if r.table)
        if now != self._filled:
            self._fill(requests)
            self._filled = now
        self._replay()
        return self._backend.download(self._here["token"])[: len(requests)].tolist()

    def forget(self) -> None:
        """The requests went on without this step: what the device has counted is out of date."""
        self._filled = None

    def _fill(self, requests: Sequence[Request]) -> None:
        """Write the state before the step: `_run` counts one up first."""
        host, vocab = self._host, self._model.config.vocab_size
        for array in host.values():
            array.fill(0)
        host["row"][:] = np.arange(self.size)
        host["page_indptr"][:] = np.arange(self.size + 1) * self._room
        host["temperature"].fill(1)
        host["top_k"].fill(1)
        host["top_p"].fill(1)
        for i, r in enumerate(requests):
            assert r.table is not None
            host["token"][i], host["running"][i], host["length"][i] = r.generated[-1], 1, r.table.length - 1
            host["pages"][i * self._room :][: len(r.table.pages)] = r.table.pages
            host["seed"][i], host["place"][i] = r.seed, len(r.generated)
            host["temperature"][i], host["top_k"][i], host["top_p"][i] = r.params.thresholds(vocab)[:3]
        self._send()

    def _run(self) -> None:
        """The step itself. It reads and writes tensors of fixed addresses only, and asks the host for nothing."""
        t = self._here
        t["length"] += t["running"]
        self._attention.replan(t["length"])
        position = t["length"] - 1
        inputs = StepInputs(t["token"], t["row"], position, position.clip(0), t["pages"], t["page_indptr"])
        logits = self._model.run_layers(inputs, self._cache, self._attention.run)
        logits /= t["temperature"][:, None]
        t["token"][:] = pyinfer.top_k_top_p_sampling_from_logits(
            logits, t["top_k"], t["top_p"], seed=t["seed"], offset=t["place"]
        )
        t["place"] += 1
