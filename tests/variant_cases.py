"""Variants with their float64 twins: the examples of the notebook, and some that use all there is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyinfer import AttentionVariant

STEP = 3


def softcap_alibi(score, q_pos, kv_idx, slope, cap):
    return cap * math.tanh((score - slope * (q_pos - kv_idx)) / cap)


def dilated(q_pos, kv_idx, width):
    distance = q_pos - kv_idx
    return abs(distance) < width and distance % STEP == 0


def same_document(q_pos, kv_idx, batch, doc, first):
    begin = first + 0 * batch
    return doc[begin + q_pos] == doc[begin + kv_idx] if q_pos >= 0 else kv_idx == 0


def learned_bias(score, head, q_pos, kv_idx, bias, buckets):
    distance = min(max(q_pos - kv_idx, 0), buckets - 1)
    return score + bias[head * buckets + distance]


def sigmoid(score, offset):
    return 1 / (1 + math.exp(-(score + offset)))


def stretch(value, dim, head, gain):
    return value * gain + 0.125 * (dim % 2) - head / 16


def clipped(x: float, low: float, high: float) -> float:
    return max(low, min(x, high))


def is_far(a: int, b: int) -> bool:
    return abs(a - b) > 40


def busy(score, batch, q_idx, kv_idx, kv_head, qo_len, kv_len, weight):
    total = clipped(score, -3, 3.5)
    for i in range(3):
        if (kv_idx + i) % 4 == 1 or is_far(q_idx, kv_idx):
            total += weight / (1 + i)
    n = 0
    while n < kv_head + 1:
        n += 1
        total -= 0.25
    a, b = batch // 2, (qo_len - kv_len) % 7
    return total + (a if kv_len > 20 else -b) * 2.0**-3 + (not kv_idx < 5) - (kv_idx & 3) / 8


def shifted(value, dim, q_pos, shift):
    return value + shift * (dim % 4 == 3) + 0.01 * q_pos


@dataclass
class Example:
    """A variant, how its arguments are drawn, and its twin: args -> the functions of `reference.variants.variant_attention`."""

    variant: AttentionVariant
    draw: Callable[..., list[Any]]
    twin: Callable[..., dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)


def _documents(rng: np.random.Generator, lens: Any) -> tuple[np.ndarray, np.ndarray]:
    doc = np.concatenate([np.sort(rng.integers(0, 4, n)) for n in lens] or [np.zeros(0, int)]).astype(np.int32)
    return np.concatenate([doc, np.zeros(1, np.int32)]), np.cumsum([0, *lens])[:-1].astype(np.int32)


def _learned(args: list[Any]) -> dict[str, Any]:
    bias, buckets = args
    table = bias.reshape(-1, buckets)
    return {"logits": lambda s, at: s + table[at.head][np.clip(at.position - at.j, 0, buckets - 1)]}


def _busy(args: list[Any]) -> dict[str, Any]:
    weight = args[0]

    def logits(s: np.ndarray, at: Any) -> np.ndarray:
        total = np.clip(s, -3, 3.5)
        for i in range(3):
            chosen = ((at.j + i) % 4 == 1) | (np.abs(at.i - at.j) > 40)
            total = total + chosen * weight / (1 + i)
        total = total - 0.25 * (at.kv_head + 1)
        a, b = at.request // 2, (at.n - at.m) % 7
        return total + (a if at.m > 20 else -b) / 8 + (at.j >= 5) - (at.j & 3) / 8

    return {"logits": logits}


def _same_document(args: list[Any]) -> dict[str, Any]:
    doc, first = args

    def mask(at: Any) -> np.ndarray:
        begin = first[at.request]
        own = doc[begin + np.maximum(at.position, 0)]
        return np.where(at.position >= 0, own == doc[begin + at.j], at.j == 0)

    return {"mask": mask}


def normal(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal(n).astype(np.float32)


EXAMPLES: dict[str, Example] = {
    "softcap_alibi": Example(
        AttentionVariant("softcap_alibi", logits=softcap_alibi, params={"slope": "float32[head]", "cap": "float32"}),
        lambda rng, heads, lens: [np.abs(normal(rng, heads)) / 8, 2.5],
        lambda args: {
            "logits": lambda s, at: args[1] * np.tanh((s - args[0][at.head] * (at.position - at.j)) / args[1])
        },
    ),
    "dilated": Example(
        AttentionVariant("dilated", mask=dilated, params={"width": "int32"}),
        lambda rng, heads, lens: [50],
        lambda args: {"mask": lambda at: (np.abs(at.position - at.j) < args[0]) & ((at.position - at.j) % STEP == 0)},
    ),
    "document": Example(
        AttentionVariant("document", mask=same_document, params={"doc": "int32[:]", "first": "int32[batch]"}),
        lambda rng, heads, lens: list(_documents(rng, lens)),
        _same_document,
        {"causal": True},
    ),
    "learned_bias": Example(
        AttentionVariant("learned_bias", logits=learned_bias, params={"bias": "float32[:]", "buckets": "int32"}),
        lambda rng, heads, lens: [normal(rng, heads * 16), 16],
        _learned,
        {"causal": True},
    ),
    "sigmoid": Example(
        AttentionVariant("sigmoid", logits=sigmoid, params={"offset": "float32"}, use_softmax=False),
        lambda rng, heads, lens: [-2.0],
        lambda args: {"logits": lambda s, at: 1 / (1 + np.exp(-(s + args[0]))), "softmax": False},
        {"causal": True},
    ),
    "query_output": Example(
        AttentionVariant(
            "query_output", query=stretch, output=shifted, params={"gain": "float32[head]", "shift": "float32"}
        ),
        lambda rng, heads, lens: [normal(rng, heads), 0.5],
        lambda args: {
            "query": lambda x, at: x * args[0][at.head] + 0.125 * (at.dim[:, : x.shape[1]] % 2) - at.head / 16,
            "output": lambda x, at: x + args[1] * (at.dim[:, : x.shape[1]] % 4 == 3) + 0.01 * at.position,
        },
    ),
    "busy": Example(
        AttentionVariant("busy", logits=busy, params={"weight": "float32"}),
        lambda rng, heads, lens: [0.75],
        _busy,
        {"soft_cap": 4.0, "window_left": 60},
    ),
    "linear": Example(
        AttentionVariant("linear", use_softmax=False),
        lambda rng, heads, lens: [],
        lambda args: {"softmax": False},
        {"v_scale": 0.5},
    ),
}
