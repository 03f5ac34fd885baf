"""The Llama forward pass over one flat batch of tokens from many requests.

A step's batch mixes requests that decode (one new token each) and requests that prefill (many). All their tokens lie end to end in one
array, decoding requests first, so linear layers, norms, RoPE, the activation and the cache append run once over everything; only
attention is called twice a layer, each wrapper on its slice. The wrappers are planned once a step and run once a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

import pyinfer

from .backend import Array, NumpyBackend, TorchBackend
from .kv_cache import PagedKVCache
from .weights import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Batch:
    """One step's work, as host int32 arrays. T tokens of B requests; the first `num_decode` requests have one token each.

    Attributes
    ----------
    tokens : np.ndarray
        [T] token ids.
    qo_indptr : np.ndarray
        [B+1] request b's tokens are ``tokens[qo_indptr[b]:qo_indptr[b+1]]``; they are its newest.
    kv_indptr, kv_indices, kv_last_page_len : np.ndarray
        [B+1], [pages], [B] page table in CSR form; it already has room for the new tokens.
    logit_rows : np.ndarray
        [R] rows of `tokens` whose next-token logits are wanted.
    num_decode : int
        Requests that decode.
    """

    tokens: np.ndarray
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    kv_indices: np.ndarray
    kv_last_page_len: np.ndarray
    logit_rows: np.ndarray
    num_decode: int


class StepInputs(NamedTuple):
    """What the layers read, on the device, int32: per token its id, request, position and position for the rotation, and the requests' page table.

    A token that is nobody's has position -1, which keeps it out of the cache, and is turned as if at 0.
    """

    token: Array
    request: Array
    position: Array
    turn: Array
    kv_indices: Array
    kv_indptr: Array


class Attention:
    """Both paged attention wrappers behind one `plan` (per step) and one `run` (per layer)."""

    def __init__(self, config: LlamaConfig, backend: NumpyBackend | TorchBackend) -> None:
        self._config, self._backend = config, backend
        self._decode = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")  # None: pyinfer sizes its own workspace
        self._prefill = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, "NHD")

    def plan(self, batch: Batch, page_size: int) -> None:
        """Schedule the step from host metadata; nothing here waits for the device."""
        c, n = self._config, batch.num_decode
        self._num_decode, self._num_tokens = n, batch.tokens.size
        common = {"sm_scale": c.sm_scale, "q_data_type": self._backend.dtype, "kv_data_type": self._backend.dtype}
        cut = int(batch.kv_indptr[n])  # pages of the decoding requests
        if n:
            self._decode.plan(
                batch.kv_indptr[: n + 1], batch.kv_indices[:cut], batch.kv_last_page_len[:n],
                c.num_qo_heads, c.num_kv_heads, c.head_dim, page_size, **common,
            )  # fmt: skip
        if n < batch.qo_indptr.size - 1:
            self._prefill.plan(
                batch.qo_indptr[n:] - n, batch.kv_indptr[n:] - cut, batch.kv_indices[cut:], batch.kv_last_page_len[n:],
                c.num_qo_heads, c.num_kv_heads, c.head_dim, page_size, causal=True, **common,
            )  # fmt: skip

    def run(self, q: Array, kv_layer: Array) -> Array:
        """Attention of one layer: q and the result [T, num_qo_heads, head_dim], `kv_layer` all pages of the layer."""
        n = self._num_decode
        out = self._backend.empty((self._num_tokens, self._config.num_qo_heads, self._config.head_dim))
        if n:
            self._decode.run(q[:n], kv_layer, out=out[:n])
        if n < self._num_tokens:
            self._prefill.run(q[n:], kv_layer, out=out[n:])
        return out


@dataclasses.dataclass(frozen=True)
class Layer:
    """Weights of one layer; the projections that share an input are fused into one matrix."""

    attn_norm: Array  # [hidden]
    qkv: Array  # [(Hq + 2 Hkv) * D, hidden]: query, key, value rows; q and k in the file's interleaved-RoPE order
    attn_out: Array  # [hidden, Hq * D]
    ffn_norm: Array  # [hidden]
    gate_up: Array  # [2 * intermediate, hidden]: gate rows first, as silu_and_mul wants them
    down: Array  # [hidden, intermediate]


def rotation_table(config: LlamaConfig) -> np.ndarray:
    """float32 [context_length, head_dim]: of every position the cosines of all angles, then the sines."""
    frequency = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    angle = np.arange(config.context_length)[:, None] * frequency
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


class Llama:
    """A Llama-family decoder on pyinfer's operators.

    Parameters
    ----------
    config : LlamaConfig
    tensors : iterable of (name, float32 array)
        As `weights.iter_tensors` yields them.
    backend : NumpyBackend or TorchBackend
    """

    def __init__(
        self, config: LlamaConfig, tensors: Iterable[tuple[str, np.ndarray]], backend: NumpyBackend | TorchBackend
    ) -> None:
        self.config, self.backend = config, backend
        host = dict(tensors)

        def put(*names: str) -> Array:
            arrays = [host.pop(name) for name in names]
            return backend.weight(arrays[0] if len(arrays) == 1 else np.concatenate(arrays))

        self.embedding = put("token_embd.weight")
        # Without a matrix of its own the output layer is tied to the embedding (so in SmolLM2).
        self.head = put("output.weight") if "output.weight" in host else self.embedding
        self.final_norm = put("output_norm.weight")
        self.layers = [
            Layer(
                attn_norm=put(f"blk.{i}.attn_norm.weight"),
                qkv=put(f"blk.{i}.attn_q.weight", f"blk.{i}.attn_k.weight", f"blk.{i}.attn_v.weight"),
                attn_out=put(f"blk.{i}.attn_output.weight"),
                ffn_norm=put(f"blk.{i}.ffn_norm.weight"),
                gate_up=put(f"blk.{i}.ffn_gate.weight", f"blk.{i}.ffn_up.weight"),
                down=put(f"blk.{i}.ffn_down.weight"),
            )
            for i in range(config.num_layers)
        ]
        self._attention = Attention(config, backend)
        (self._angles,) = backend.upload(rotation_table(config))

    def forward(self, batch: Batch, cache: PagedKVCache) -> Array:
        """Run every layer over the batch, appending its keys and values to the cache.

        Returns
        -------
        Array
            [R, vocab] float32 logits of ``batch.logit_rows``.
        """
        self._attention.plan(batch, cache.page_size)
        tokens, qo_indptr, kv_indptr, kv_indices, last_page_len, logit_rows = self.backend.upload(
            batch.tokens, batch.qo_indptr, batch.kv_indptr, batch.kv_indices, batch.kv_last_page_len, batch.logit_rows
        )
        seq_lens = pyinfer.get_seq_lens(kv_indptr, last_page_len, cache.page_size)
        request, position = pyinfer.get_batch_indices_positions(qo_indptr, seq_lens, batch.tokens.size)
        inputs = StepInputs(tokens, request, position, position, kv_indices, kv_indptr)
        return self.run_layers(inputs, cache, self._attention.run, logit_rows)

    def run_layers(
        self,
        inputs: StepInputs,
        cache: PagedKVCache,
        attention: Callable[[Array, Array], Array],
        logit_rows: Array | None = None,
    ) -> Array:
        """The forward pass over tokens on the device; `attention(q, kv_layer)` is planned. Logits of `logit_rows`, or of all rows."""
        c, linear = self.config, self.backend.linear
        tokens, request, position, turn, kv_indices, kv_indptr = inputs
        num_tokens = tokens.shape[0]
        x = self.backend.take(self.embedding, tokens)  # the residual stream, from here on updated in place
        h = pyinfer.rmsnorm(x, self.layers[0].attn_norm, c.rms_eps)
        for i, (layer, kv) in enumerate(zip(self.layers, cache.layers, strict=True)):
            qkv = linear(h, layer.qkv).reshape(num_tokens, c.num_qo_heads + 2 * c.num_kv_heads, c.head_dim)
            q, k = qkv[:, : c.num_qo_heads], qkv[:, c.num_qo_heads : -c.num_kv_heads]  # views: no copy is made
            v = qkv[:, -c.num_kv_heads :]
            # is_neox=False: a GGUF file keeps the pairs that rotate together next to each other (see weights.iter_tensors).
            pyinfer.rope_append_paged_kv_cache(
                q, k, v, self._angles, turn, kv, kv_indices, kv_indptr, request, position, is_neox=False, q_out=q
            )
            h = linear(attention(q, kv).reshape(num_tokens, -1), layer.attn_out)

            pyinfer.fused_add_rmsnorm(h, x, layer.ffn_norm, c.rms_eps)  # x += h; h = norm(x)
            h = linear(pyinfer.silu_and_mul(linear(h, layer.gate_up)), layer.down)

            norm = self.layers[i + 1].attn_norm if i + 1 < c.num_layers else self.final_norm
            pyinfer.fused_add_rmsnorm(h, x, norm, c.rms_eps)
        return self.backend.logits(h if logit_rows is None else self.backend.take(h, logit_rows), self.head)
