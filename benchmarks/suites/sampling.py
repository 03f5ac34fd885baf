"""Sampling over a vocabulary of 128256: draws from probabilities, a pipeline from logits, softmax, top-k. Draws cannot be compared number by number:
each must lie in the allowed set.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import logits, probabilities

DEVICES = ("cuda", "cpu")
BATCHES = (1, 16, 64, 256)
VOCAB = 128256


def _allowed(probs: Any, top_k: int | None, top_p: float | None, min_p: float | None) -> Any:
    """bool [B, V]: the tokens that may be drawn. A token passes top-p if the likelier ones hold less than p (API.md §11); a rounding's slack is given."""
    import torch

    mask = probs > 0
    if top_k is not None:
        mask &= probs >= torch.topk(probs, top_k, dim=-1).values[:, -1:]
    if top_p is not None:
        base = torch.where(mask, probs, 0.0) if top_k is not None else probs
        base = base / base.sum(-1, keepdim=True)
        values, order = base.sort(-1, descending=True)
        before = values.double().cumsum(-1) - values
        mask &= torch.zeros_like(mask).scatter_(-1, order, before < top_p + 1e-4)
    if min_p is not None:
        mask &= probs >= min_p * probs.max(-1, keepdim=True).values * (1 - 1e-5)
    return mask


def run(ctx: Context) -> None:
    """Every sampler at every batch."""
    tiny = ctx.device == "cpu"
    for batch in (1, 3) if tiny else BATCHES[::3] if ctx.quick else BATCHES:
        _batch(ctx, batch, 200 if tiny else VOCAB)


def _batch(ctx: Context, batch: int, vocab: int) -> None:
    import torch

    probs, raw = probabilities(batch, vocab, ctx.device), logits(batch, vocab, ctx.device)
    k = min(40, vocab // 4)
    # operator, its options, the call, the limits that a draw must keep, the probabilities they refer to
    draws: list[tuple[str, str, Callable[[Any], Any], dict[str, Any], Any]] = [
        ("sampling_from_probs", "", lambda m: m.sampling_from_probs(probs), {}, probs),
        (
            "top_p_sampling_from_probs",
            "p=0.9",
            lambda m: m.top_p_sampling_from_probs(probs, 0.9),
            {"top_p": 0.9},
            probs,
        ),
        ("top_k_sampling_from_probs", f"k={k}", lambda m: m.top_k_sampling_from_probs(probs, k), {"top_k": k}, probs),
        (
            "top_k_top_p_sampling_from_probs",
            f"k={k} p=0.9",
            lambda m: m.top_k_top_p_sampling_from_probs(probs, k, 0.9),
            {"top_k": k, "top_p": 0.9},
            probs,
        ),
        (
            "min_p_sampling_from_probs",
            "p=0.1",
            lambda m: m.min_p_sampling_from_probs(probs, 0.1),
            {"min_p": 0.1},
            probs,
        ),
        ("sampling_from_logits", "", lambda m: m.sampling_from_logits(raw), {}, torch.softmax(raw, -1)),
    ]
    for op, options, call, limits, base in draws:
        case = Case(
            op,
            f"b{batch} v{vocab} {options}".strip(),
            bytes=4.0 * batch * vocab,
            tolerance=0.0,
            compare=_checker(base, limits),
        )
        if ctx.selected(case):
            ctx.measure(case, _variants(call, _torch_draw(probs, raw, op, k)))
    _pipeline(ctx, batch, vocab, raw, k)
    for largest in (k, min(2048, vocab // 2)):
        case = Case("top_k", f"b{batch} v{vocab} k={largest} sorted", bytes=4.0 * batch * vocab, tolerance=0.0)
        if ctx.selected(case):
            ctx.measure(case, _largest(raw, largest))
    case = Case("softmax", f"b{batch} v{vocab}", bytes=8.0 * batch * vocab, tolerance=1e-4)
    if ctx.selected(case):
        ctx.measure(case, _variants(lambda m: m.softmax(raw), lambda: torch.softmax(raw, -1)))


def _pipeline(ctx: Context, batch: int, vocab: int, raw: Any, k: int) -> None:
    """logits_processor: temperature, softmax, top-k, top-p, a draw. Fused by pyinfer; in torch one operation after another."""
    import torch

    case = Case(
        "LogitsPipe",
        f"b{batch} v{vocab} T=0.8 k={k} p=0.9",
        bytes=4.0 * batch * vocab,
        tolerance=0.0,
        compare=_checker(torch.softmax(raw / 0.8, -1), {"top_k": k, "top_p": 0.9}),
    )
    if not ctx.selected(case):
        return

    def ours() -> Any:
        from pyinfer.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK, TopP

        pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), Sample()])
        return lambda: pipe(raw, temperature=0.8, top_k=k, top_p=0.9)

    def plain() -> Any:
        values, order = torch.topk(torch.softmax(raw / 0.8, -1), k, dim=-1)
        values = values / values.sum(-1, keepdim=True)
        values = torch.where(values.cumsum(-1) - values < 0.9, values, 0.0)
        return order.gather(-1, torch.multinomial(values, 1)).squeeze(-1).int()

    ctx.measure(case, [("pyinfer", ours), ("torch", lambda: plain)])


def _largest(raw: Any, k: int) -> list[tuple[str, Callable[[], Any]]]:
    """The values alone are compared: of equal ones torch may name others."""
    import torch

    def ours() -> Any:
        import pyinfer

        return lambda: pyinfer.top_k(raw, k, sorted=True)[0]

    return [("pyinfer", ours), ("torch", lambda: lambda: torch.topk(raw, k, dim=-1).values)]


def _variants(call: Callable[[Any], Any], plain: Callable[[], Any] | None) -> list[tuple[str, Callable[[], Any]]]:
    def ours() -> Any:
        import pyinfer.sampling

        return lambda: call(pyinfer.sampling)

    def flashinfer() -> Any:
        module = peers.flashinfer("sampling").sampling
        return lambda: call(module)

    return [("pyinfer", ours), ("flashinfer", flashinfer)] + ([("torch", lambda: plain)] if plain is not None else [])


def _torch_draw(probs: Any, raw: Any, op: str, k: int) -> Callable[[], Any] | None:
    """The same draw in plain torch, as serving code without a kernel library has it."""
    import torch

    def top_p(p: Any) -> Any:
        values, order = p.sort(-1, descending=True)
        values = torch.where(values.cumsum(-1) - values < 0.9, values, 0.0)
        return order.gather(-1, torch.multinomial(values, 1)).squeeze(-1).int()

    def top_k() -> Any:
        values, order = torch.topk(probs, k, dim=-1)
        return order.gather(-1, torch.multinomial(values, 1)).squeeze(-1).int()

    if op == "sampling_from_probs":
        return lambda: torch.multinomial(probs, 1).squeeze(-1).int()
    if op == "top_p_sampling_from_probs":
        return lambda: top_p(probs)
    if op == "top_k_sampling_from_probs":
        return top_k
    if op == "sampling_from_logits":
        return lambda: (raw - torch.empty_like(raw).exponential_().log_()).argmax(-1).int()
    return None


def _checker(base: Any, limits: dict[str, Any]) -> Callable[[Any, Any], float]:
    """Compares by the allowed set: the share of draws outside it."""
    state: dict[str, Any] = {}

    def compare(_: Any, ids: Any) -> float:
        if "mask" not in state:
            state["mask"] = _allowed(base, limits.get("top_k"), limits.get("top_p"), limits.get("min_p"))
        ids = ids[0] if isinstance(ids, tuple) else ids
        if tuple(ids.shape) != (base.shape[0],) or bool(((ids < 0) | (ids >= base.shape[1])).any()):
            return float("inf")
        return 1.0 - float(state["mask"].gather(-1, ids.long()[:, None]).float().mean())

    return compare
