"""The GGUF file's own vocabulary, merges and chat template, run by the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .weights import metadata

if TYPE_CHECKING:
    import gguf

_CONTROL = 3  # GGUF token type: never produced from plain text by merging


class Tokenizer:
    """Byte-level BPE with ChatML prompts.

    Attributes
    ----------
    stop_ids : frozenset of int
        Tokens that end an answer: the file's end-of-sequence token and ``<|endoftext|>``.
    """

    def __init__(self, reader: gguf.GGUFReader) -> None:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers

        kind, split = metadata(reader, "tokenizer.ggml.model"), metadata(reader, "tokenizer.ggml.pre", "default")
        if (kind, split) != ("gpt2", "smollm"):
            raise ValueError(
                f"examples.llm knows the 'gpt2' tokenizer with 'smollm' pre-tokenisation, this file has {kind!r}, {split!r}"
            )
        tokens = metadata(reader, "tokenizer.ggml.tokens")
        merges = [tuple(m.split(" ", 1)) for m in metadata(reader, "tokenizer.ggml.merges")]
        self._bpe = tokenizers.Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
        # 'smollm' pre-tokenisation: each digit stands alone, then GPT-2's byte-level split.
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._bpe.decoder = decoders.ByteLevel()
        types = metadata(reader, "tokenizer.ggml.token_type")
        self._bpe.add_special_tokens(
            [
                tokenizers.AddedToken(t, special=True, normalized=False)
                for t, token_type in zip(tokens, types, strict=True)
                if token_type == _CONTROL
            ]
        )
        stops = {metadata(reader, "tokenizer.ggml.eos_token_id"), self._bpe.token_to_id("<|endoftext|>")}
        self.stop_ids = frozenset(stops - {None})
        self._template = metadata(reader, "tokenizer.chat_template")

    def encode(self, text: str) -> list[int]:
        """Text to token ids; control tokens such as ``<|im_start|>`` in the text are recognised."""
        return self._bpe.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids to text, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._bpe.decode(list(ids), skip_special_tokens=True)

    def chat(self, prompt: str) -> str:
        """One user message as the text the model was trained on, ready for the assistant's answer."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # the template comes from a file: do not trust it

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(self._template)
        return template.render(messages=[{"role": "user", "content": prompt}], add_generation_prompt=True)

    def stream(self) -> TextStream:
        """A decoder for one answer that is fed token by token."""
        return TextStream(self._bpe)


class TextStream:
    """Turns tokens into text as they come; a character split over several tokens is held back until it is whole."""

    def __init__(self, bpe) -> None:
        from tokenizers.decoders import DecodeStream

        self._bpe, self._stream = bpe, DecodeStream(skip_special_tokens=True)

    def push(self, token: int) -> str:
        """Text that this token completes, possibly empty."""
        return self._stream.step(self._bpe, token) or ""
