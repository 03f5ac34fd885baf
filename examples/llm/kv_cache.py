"""The paged KV cache: one pool of pages, shared by all layers' page numbering, and a page table per request.

A page holds `page_size` tokens. A request reserves, when it is admitted, the pages its longest possible answer needs, and takes
them one by one as it grows: admission can therefore never leave a running request without a page, and no preemption is needed.
"""

from __future__ import annotations

from .backend import Array, NumpyBackend, TorchBackend
from .weights import LlamaConfig


class PagedKVCache:
    """Keys and values of every layer, in pages.

    Parameters
    ----------
    config : LlamaConfig
        Gives layers, kv heads and head dim.
    backend : NumpyBackend or TorchBackend
        Where the pages live.
    num_pages, page_size : int
        Size of the pool, and tokens a page.

    Attributes
    ----------
    layers : list of Array
        Per layer ``[num_pages, 2, page_size, num_kv_heads, head_dim]`` (NHD; axis 1: 0 keys, 1 values). Page p of every layer
        belongs to the same tokens, so one page table serves all layers.
    peak_pages : int
        Most pages in use at one time.
    """

    def __init__(
        self, config: LlamaConfig, backend: NumpyBackend | TorchBackend, num_pages: int, page_size: int
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(
                f"the KV cache needs at least one page of one token, got num_pages={num_pages}, page_size={page_size}"
            )
        self.num_pages, self.page_size = num_pages, page_size
        shape = (num_pages, 2, page_size, config.num_kv_heads, config.head_dim)
        self.layers: list[Array] = [backend.empty(shape) for _ in range(config.num_layers)]
        self._free = list(range(num_pages - 1, -1, -1))
        self._promised = 0  # reserved by running requests, still in _free
        self.peak_pages = 0

    @property
    def used_pages(self) -> int:
        """Pages that hold tokens now."""
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens fill."""
        return -(-num_tokens // self.page_size)

    def open(self, max_tokens: int) -> PageTable | None:
        """Reserve room for `max_tokens` tokens; None if it is not there now."""
        need = self.pages_for(max_tokens)
        if need > len(self._free) - self._promised:
            return None
        self._promised += need
        return PageTable(self, need)

    def _take(self) -> int:
        self._promised -= 1
        page = self._free.pop()
        self.peak_pages = max(self.peak_pages, self.used_pages)
        return page

    def _give_back(self, pages: list[int], promised: int) -> None:
        self._free.extend(reversed(pages))
        self._promised -= promised


class PageTable:
    """The pages of one request, in order. `length` counts the tokens they hold."""

    def __init__(self, pool: PagedKVCache, reserved: int) -> None:
        self._pool, self._reserved = pool, reserved
        self.pages: list[int] = []
        self.length = 0

    @property
    def last_page_len(self) -> int:
        """Tokens in the last page, 1..page_size (0: no tokens)."""
        return self.length - max(len(self.pages) - 1, 0) * self._pool.page_size

    def extend(self, num_tokens: int) -> None:
        """Make room for `num_tokens` more tokens; the reservation guarantees that it is there."""
        self.length += num_tokens
        need = self._pool.pages_for(self.length)
        if need > self._reserved:
            raise RuntimeError(f"a request outgrew its reservation: {need} pages needed, {self._reserved} reserved")
        while len(self.pages) < need:
            self.pages.append(self._pool._take())

    def close(self) -> None:
        """Give the pages and what is left of the reservation back."""
        self._pool._give_back(self.pages, self._reserved - len(self.pages))
        self.pages, self._reserved, self.length = [], 0, 0
