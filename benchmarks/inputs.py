"""Random inputs of the cases (never zeros: they run faster than data does)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def randn(shape: tuple[int, ...], dtype: str, device: str, scale: float = 1.0) -> torch.Tensor:
    """Normal random values."""
    import torch

    drawn = "float32" if device == "cpu" else "bfloat16" if dtype.startswith("float8") else dtype
    x = torch.randn(shape, dtype=getattr(torch, drawn), device=device)
    return (x.mul_(scale) if scale != 1.0 else x).to(getattr(torch, dtype))


def out_dtype_of(dtype: str) -> str:
    """Of the output of queries of this type: theirs, or of 8-bit ones bfloat16."""
    return "bfloat16" if dtype.startswith("float8") else dtype


@dataclass
class Attention:
    """A batch of requests with random queries, and keys and values in pages (page_size > 0) or ragged (page_size 0).

    Index arrays are on the host, where the plan wants them, except `kv_indices`, `block_table`, `kv_len_device` and the `*_device` ones, which
    kernels read. Pages are a random permutation: a cache in use is not in order.
    """

    qo_lens: list[int]
    kv_lens: list[int]
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    causal: bool
    dtype: str
    device: str
    kv_dtype: str = ""  # of keys and values, "" for dtype; an 8-bit one holds the rounded values, without a scale
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        import torch

        def indptr(lengths: list[int]) -> torch.Tensor:
            return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)

        heads, dim = self.num_kv_heads, self.head_dim
        self.qo_indptr = indptr(self.qo_lens)
        self.q = randn((sum(self.qo_lens), self.num_qo_heads, dim), self.dtype, self.device)
        if self.page_size:
            pages = [-(-n // self.page_size) for n in self.kv_lens]
            self.kv_indptr = indptr(pages)
            self.last_page_len = torch.tensor(
                [n - (p - 1) * self.page_size for n, p in zip(self.kv_lens, pages, strict=True)], dtype=torch.int32
            )
            self.kv_indices = torch.randperm(sum(pages), dtype=torch.int32).to(self.device)
            shape = (sum(pages), self.page_size, heads, dim)
        else:
            self.kv_indptr = indptr(self.kv_lens)
            shape = (sum(self.kv_lens), heads, dim)
        kv_dtype = self.kv_dtype or self.dtype
        self.k, self.v = randn(shape, kv_dtype, self.device), randn(shape, kv_dtype, self.device)

    @property
    def out_dtype(self) -> str:
        """Of the output."""
        return out_dtype_of(self.dtype)

    @property
    def flops(self) -> float:
        """Multiply-adds of QKᵀ and PV over the visible pairs, times two."""
        pairs = 0
        for qo, kv in zip(self.qo_lens, self.kv_lens, strict=True):
            pairs += qo * kv - (qo * (qo - 1) // 2 if self.causal else 0)
        return 4.0 * pairs * self.num_qo_heads * self.head_dim

    @property
    def kv_bytes(self) -> float:
        """Bytes of the keys and values, each read once."""
        return 2.0 * sum(self.kv_lens) * self.num_kv_heads * self.head_dim * self.k.element_size()

    @property
    def bytes(self) -> float:
        """`kv_bytes`, the queries and the output, each once."""
        size = self.q.element_size()
        return self.kv_bytes + float(self.q.numel()) * (size + (size if self.out_dtype == self.dtype else 2))

    def block_table(self) -> torch.Tensor:
        """int32 [B, most pages of a request] on the device: what FlashAttention takes for CSR pages."""
        import torch

        counts = self.kv_indptr.diff().tolist()
        table = torch.zeros((len(counts), max(counts)), dtype=torch.int32, device=self.device)
        for row, (start, count) in enumerate(zip(self.kv_indptr.tolist(), counts, strict=False)):
            table[row, :count] = self.kv_indices[start : start + count]
        return table

    def dense_kv(self, expand_heads: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, heads, kv, D] gathered from the pages or the ragged tensor; all requests must be of one length."""
        batch, length = len(self.kv_lens), self.kv_lens[0]
        assert all(n == length for n in self.kv_lens), "dense_kv: requests of one length only"

        def dense(x: torch.Tensor) -> torch.Tensor:
            rows = (
                x[self.kv_indices.long()].reshape(batch, -1, *x.shape[-2:])[:, :length]
                if self.page_size
                else x.view(batch, length, *x.shape[-2:])
            )
            rows = rows.transpose(1, 2)
            return rows.repeat_interleave(self.num_qo_heads // self.num_kv_heads, 1) if expand_heads else rows

        return dense(self.k), dense(self.v)


def probabilities(batch: int, vocab: int, device: str, temperature: float = 1.0) -> torch.Tensor:
    """float32 [batch, vocab]: the softmax of random logits with the spread of a language model's (a few likely tokens, a long tail)."""
    import torch

    return torch.softmax(logits(batch, vocab, device) / temperature, dim=-1)


def logits(batch: int, vocab: int, device: str) -> torch.Tensor:
    """float32 [batch, vocab] random logits: normal with standard deviation 3."""
    import torch

    return torch.randn((batch, vocab), dtype=torch.float32, device=device) * 3.0
