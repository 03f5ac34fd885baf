"""Sampling over a vocabulary of 128256 under every filter, from rows of three kinds; a pipeline from logits, softmax, top-k. Draws cannot be compared number
by number: each must lie in the allowed set.

torch is sort (or topk) and multinomial. FlashInfer draws by top-k and top-p in the joint order only: its other order, top-k first, needs its top-k module,
which takes minutes to build.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import peers
from benchmarks.harness import Case, Context
from benchmarks.inputs import logits

DEVICES = ("cuda", "cpu")
BATCHES = (1, 64, 512)
KINDS = ("peaked", "natural", "flat")
VOCAB = 128256
K, P, M = 40, 0.9, 0.1


def distribution(kind: str, batch: int, vocab: int, device: str) -> Any:
    """float32 probabilities [batch, vocab]: "peaked" (a few tokens hold most), "natural" (Zipf-Mandelbrot over shuffled ids, as text has it), "flat"."""
    import torch

    noise = torch.randn(batch, vocab, device=device)
    if kind == "natural":
        rank = torch.argsort(torch.argsort(noise, dim=-1), dim=-1).float()
        noise = -1.1 * torch.log(rank + 2.7) + 0.3 * torch.randn(batch, vocab, device=device)
    return torch.softmax(noise * {"peaked": 6.0, "natural": 1.0, "flat": 0.1}[kind], -1)


def _allowed(
    probs: Any, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None, joint: bool = False
) -> Any:
    """bool [B, V]: the tokens that may be drawn. A token passes top-p if the likelier ones hold less than p (API.md §11); a rounding's slack is given."""
    import torch

    mask = probs > 0
    if top_k is not None:
        mask &= probs >= torch.topk(probs, top_k, dim=-1).values[:, -1:]
    if top_p is not None:
        base = torch.where(mask, probs, 0.0) if top_k is not None and not joint else probs
        base = base / base.sum(-1, keepdim=True)
        values, order = base.sort(-1, descending=True)
        before = values.double().cumsum(-1) - values
        mask &= torch.zeros_like(mask).scatter_(-1, order, before < top_p + 1e-4)
    if min_p is not None:
        mask &= probs >= min_p * probs.max(-1, keepdim=True).values * (1 - 1e-5)
    return mask


def run(ctx: Context) -> None:
    """Every sampler at every batch, from every kind of row."""
    tiny = ctx.device == "cpu"
    for batch in (1, 3) if tiny else BATCHES[::2] if ctx.quick else BATCHES:
        vocab = 200 if tiny else VOCAB
        for kind in KINDS:
            _draws(ctx, kind, batch, vocab)
        _from_logits(ctx, batch, vocab)


Draw = tuple[str, str, Callable[[Any], Any], Callable[[], Any], dict[str, Any]]


def _draws(ctx: Context, kind: str, batch: int, vocab: int) -> None:
    """Samplers of probabilities."""
    import torch

    probs = distribution(kind, batch, vocab, ctx.device)
    k = min(K, vocab // 4)

    def draw(kept: Any, order: Any) -> Any:
        return order.gather(-1, torch.multinomial(kept, 1)).squeeze(-1).int()

    def top_p(values: Any, order: Any) -> Any:
        return draw(torch.where(values.cumsum(-1) - values < P, values, 0.0), order)

    def top_k_first() -> Any:
        values, order = torch.topk(probs, k, dim=-1)
        return top_p(values / values.sum(-1, keepdim=True), order)

    def min_p() -> Any:
        kept = torch.where(probs >= M * probs.amax(-1, keepdim=True), probs, 0.0)
        return torch.multinomial(kept, 1).squeeze(-1).int()

    # operator, its options, the call, the same in torch, the limits that a draw must keep
    cases: list[Draw] = [
        (
            "sampling_from_probs",
            "",
            lambda m: m.sampling_from_probs(probs),
            lambda: torch.multinomial(probs, 1).squeeze(-1).int(),
            {},
        ),
        (
            "top_p_sampling_from_probs",
            f"p={P}",
            lambda m: m.top_p_sampling_from_probs(probs, P),
            lambda: top_p(*probs.sort(-1, descending=True)),
            {"top_p": P},
        ),
        (
            "top_k_sampling_from_probs",
            f"k={k}",
            lambda m: m.top_k_sampling_from_probs(probs, k),
            lambda: draw(*torch.topk(probs, k, dim=-1)),
            {"top_k": k},
        ),
        (
            "top_k_top_p_sampling_from_probs",
            f"k={k} p={P} joint",
            lambda m: m.top_k_top_p_sampling_from_probs(probs, k, P, filter_apply_order="joint"),
            lambda: top_p(*torch.topk(probs, k, dim=-1)),
            {"top_k": k, "top_p": P, "joint": True},
        ),
        (
            "top_k_top_p_sampling_from_probs",
            f"k={k} p={P}",
            lambda m: m.top_k_top_p_sampling_from_probs(probs, k, P),
            top_k_first,
            {"top_k": k, "top_p": P},
        ),
        ("min_p_sampling_from_probs", f"p={M}", lambda m: m.min_p_sampling_from_probs(probs, M), min_p, {"min_p": M}),
    ]
    for op, options, call, plain, limits in cases:
        case = _case(op, batch, vocab, f"{kind} {options}".strip(), 4.0, _checker(probs, limits))
        variants = _variants(call, plain)
        ctx.measure(case, [v for v in variants if v[0] != "flashinfer" or options != f"k={k} p={P}"])


def _from_logits(ctx: Context, batch: int, vocab: int) -> None:
    """What starts from logits."""
    import torch

    raw = logits(batch, vocab, ctx.device)
    k = min(K, vocab // 4)
    ctx.measure(
        _case("sampling_from_logits", batch, vocab, "", 4.0, _checker(torch.softmax(raw, -1), {})),
        _variants(
            lambda m: m.sampling_from_logits(raw),
            lambda: (raw - torch.empty_like(raw).exponential_().log_()).argmax(-1).int(),
        ),
    )
    _pipeline(ctx, batch, vocab, raw, k)
    for largest in (k, min(2048, vocab // 2)):
        ctx.measure(_case("top_k", batch, vocab, f"k={largest} sorted", 4.0), _largest(raw, largest))
    softmax = _variants(lambda m: m.softmax(raw), lambda: torch.softmax(raw, -1))
    ctx.measure(_case("softmax", batch, vocab, "", 8.0, tolerance=1e-4), softmax)


def _case(
    op: str,
    batch: int,
    vocab: int,
    options: str,
    bytes_each: float,
    compare: Callable[[Any, Any], float] | None = None,
    tolerance: float = 0.0,
) -> Case:
    """A case; what README's table is made of stands in its info."""
    return Case(
        op,
        f"b{batch} v{vocab} {options}".strip(),
        bytes=bytes_each * batch * vocab,
        tolerance=tolerance,
        compare=compare,
        info={"batch": batch, "options": options},
    )


def _pipeline(ctx: Context, batch: int, vocab: int, raw: Any, k: int) -> None:
    """logits_processor: temperature, softmax, top-k, top-p, a draw. Fused by pyinfer; in torch one operation after another."""
    import torch

    compare = _checker(torch.softmax(raw / 0.8, -1), {"top_k": k, "top_p": P})
    case = _case("LogitsPipe", batch, vocab, f"T=0.8 k={k} p={P}", 4.0, compare)

    def ours() -> Any:
        from pyinfer.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK, TopP

        pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), Sample()])
        return lambda: pipe(raw, temperature=0.8, top_k=k, top_p=P)

    def plain() -> Any:
        values, order = torch.topk(torch.softmax(raw / 0.8, -1), k, dim=-1)
        values = values / values.sum(-1, keepdim=True)
        values = torch.where(values.cumsum(-1) - values < P, values, 0.0)
        return order.gather(-1, torch.multinomial(values, 1)).squeeze(-1).int()

    ctx.measure(case, [("pyinfer", ours), ("torch", lambda: plain)])


def _largest(raw: Any, k: int) -> list[tuple[str, Callable[[], Any]]]:
    """The values alone are compared: of equal ones torch may name others."""
    import torch

    def ours() -> Any:
        import pyinfer

        return lambda: pyinfer.top_k(raw, k, sorted=True)[0]

    return [("pyinfer", ours), ("torch", lambda: lambda: torch.topk(raw, k, dim=-1).values)]


def _variants(call: Callable[[Any], Any], plain: Callable[[], Any]) -> list[tuple[str, Callable[[], Any]]]:
    def ours() -> Any:
        import pyinfer.sampling

        return lambda: call(pyinfer.sampling)

    def flashinfer() -> Any:
        module = peers.flashinfer("sampling").sampling
        return lambda: call(module)

    return [("pyinfer", ours), ("flashinfer", flashinfer), ("torch", lambda: plain)]


def _checker(base: Any, limits: dict[str, Any]) -> Callable[[Any, Any], float]:
    """Compares by the allowed set: the share of draws outside it."""
    state: dict[str, Any] = {}

    def compare(_: Any, ids: Any) -> float:
        if "mask" not in state:
            state["mask"] = _allowed(base, **limits)
        ids = ids[0] if isinstance(ids, tuple) else ids
        if tuple(ids.shape) != (base.shape[0],) or bool(((ids < 0) | (ids >= base.shape[1])).any()):
            return float("inf")
        return 1.0 - float(state["mask"].gather(-1, ids.long()[:, None]).float().mean())

    return compare
