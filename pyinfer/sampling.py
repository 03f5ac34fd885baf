"""Softmax, filters and samplers.

How a token is drawn. Every probability counts as an integer mass, ``ceil(p * 2**44)``; a filter keeps the tokens whose value is accepted; one uniform
64-bit number, scaled to the kept mass, is looked up in the cumulative masses in the order of the ids (inverse CDF). Sums of integers do not depend on
their order, so a row's result is a function of its values, its seed and its offset alone: the same in any batch, in every run, on every architecture,
and on the CPU backend as on the GPU. Rounding moves a token's probability by less than 2**-26.

Randomness. Philox4x32-10 under a 64-bit key (`seed`) at a 64-bit position (`offset`), one draw per output:

- `seed` and `offset` are integers: outputs are told apart by their place in the call. Advance the offset by one per call.
- either is a tensor, one value per output: output i draws from (seed_i, offset_i) whatever its place. Give every request its own seed and advance its
  offset with each token; tensors on the GPU are read there, so replays of a CUDA graph see their updates.
- neither: both come from `generator`, which is advanced. A CUDA torch.Generator's own seed and offset are used (offset + outputs, rounded up to 4);
  any other generator, torch.Generator on the CPU or np.random.Generator, is asked for a 64-bit seed. No generator: the framework's default one.

Which tokens are kept: token x iff ``count(p > p_x) < top_k`` and ``sum(p > p_x) < top_p``. Ties at the boundary are all kept, the most probable tokens
always are, and top_p >= 1 keeps all. ``top_k = 1`` is the argmax of the input, the lowest id on ties. Tokens of probability zero are never drawn.

Rows that cannot be sampled. A row with a NaN, an infinite or a negative probability, a row without a positive one, logits with a NaN or nothing above
-inf, and an index out of range are not sampled: the id is 0 (always inside the vocabulary, and deterministic), and ``return_valid=True`` returns a second
tensor, bool, that is False there, without synchronising. ``check_nan=True`` raises ValueError instead; on a GPU that waits for the result.
"""

from __future__ import annotations

from typing import Any, Literal

from pyinfer import _sampling, _speculative
from pyinfer._sampling import ALL, FIRST, JOINT, MIN_P
from pyinfer.core.errors import fail
from pyinfer.torch_ops import attach

__all__ = [
    "chain_speculative_sampling",
    "min_p_sampling_from_probs",
    "sampling_from_logits",
    "sampling_from_probs",
    "softmax",
    "top_k_mask_logits",
    "top_k_renorm_prob",
    "top_k_renorm_probs",
    "top_k_sampling_from_probs",
    "top_k_top_p_sampling_from_logits",
    "top_k_top_p_sampling_from_probs",
    "top_p_renorm_prob",
    "top_p_renorm_probs",
    "top_p_sampling_from_probs",
]


def softmax(logits: Any, temperature: Any = None, enable_pdl: bool | None = None) -> Any:
    """Probabilities of logits: softmax(logits / temperature).

    Parameters
    ----------
    logits
        [rows, vocab], float32, bfloat16 or float16, any row stride; vocab up to 262,144. -inf is fine.
    temperature
        None (1), a number, or a tensor [rows]. 0 counts as an infinite temperature: uniform over the tokens whose logit is not -inf. (For greedy
        decoding take top_k=1.)
    enable_pdl
        Overlap the launch with the tail of the kernel before it (programmatic dependent launch). None: wherever it works (arch 9.0 or newer).

    Returns
    -------
    [rows, vocab] float32. A row of -inf alone gives zeros, a row with a NaN gives NaN. If the largest logit is +inf, those that are share the mass.

    Raises
    ------
    TypeError, ValueError
        For a wrong dtype, shape, device or stride; a negative or NaN temperature given on the host (on the GPU it counts as 0).
    """
    return _sampling.map_rows(
        "softmax",
        "logits",
        logits,
        "gen_softmax",
        [("temperature", temperature, False, 0.0, float("inf"), 1.0)],
        enable_pdl,
    )


def sampling_from_probs(
    probs: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row, with the probabilities given.

    Parameters
    ----------
    probs
        [rows, vocab], float32, bfloat16 or float16, any row stride; vocab up to 262,144. Rows need not sum to one: they are taken relative to their sum.
    indices
        Integer tensor [outputs] or None: output i is drawn from row indices[i] (None: row i).
    deterministic
        Accepted for compatibility: results always are.
    generator
        torch.Generator or np.random.Generator; see the module's text.
    check_nan
        Raise ValueError if a row cannot be sampled. On a GPU this waits for the result.
    seed, offset
        Integers, or integer tensors [outputs]; see the module's text.
    return_valid
        Also return a bool tensor [outputs], False where the row could not be sampled (the id is 0 there).

    Returns
    -------
    int32 ids [outputs], or (ids, valid).

    Raises
    ------
    TypeError, ValueError
        Before any launch, for a wrong dtype, shape, device, stride or range. With check_nan, ValueError for rows that cannot be sampled.
    """
    return _sampling.sample(
        "sampling_from_probs", "probs", probs, ALL, indices, generator, check_nan, seed, offset, return_valid
    )


def sampling_from_logits(
    logits: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row from softmax(logits), without storing it: the ids that sampling_from_probs(softmax(logits)) gives.

    Parameters and results as for `sampling_from_probs`; logits [rows, vocab] may hold -inf.
    """
    return _sampling.sample(
        "sampling_from_logits", "logits", logits, ALL, indices, generator, check_nan, seed, offset, return_valid
    )


def top_k_sampling_from_probs(
    probs: Any,
    top_k: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row among those with fewer than top_k more probable ones.

    Parameters
    ----------
    top_k
        1 or more: a number, or an int32 or int64 tensor of one value per output or per row (per output where `indices` leaves both possible). vocab and
        above keep all; on the GPU, values below 1 count as 1. 1 is the argmax, the lowest id on ties.

    Others, results and errors as for `sampling_from_probs`.
    """
    op = "top_k_sampling_from_probs"
    return _sampling.sample(
        op, "probs", probs, FIRST, indices, generator, check_nan, seed, offset, return_valid, top_k=top_k, per_row=False
    )


def top_p_sampling_from_probs(
    probs: Any,
    top_p: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row among those above which less than top_p of probability lies (nucleus sampling).

    Parameters
    ----------
    top_p
        In [0, 1]: a number, or a float tensor of one value per row or per output (per row where `indices` leaves both possible). An absolute
        probability: for rows that do not sum to one, see `top_k_top_p_sampling_from_probs` with "top_k_first". 1 keeps all; at 0 the most
        probable tokens still are kept.

    Others, results and errors as for `sampling_from_probs`.
    """
    op = "top_p_sampling_from_probs"
    return _sampling.sample(
        op, "probs", probs, JOINT, indices, generator, check_nan, seed, offset, return_valid, top_p=top_p
    )


def min_p_sampling_from_probs(
    probs: Any,
    min_p: Any,
    indices: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row among those with p >= min_p * max(p) (the product rounded to float32).

    Parameters
    ----------
    min_p
        In [0, 1]: a number, or a float tensor of one value per output or per row (per output where `indices` leaves both possible).

    Others, results and errors as for `sampling_from_probs`.
    """
    op = "min_p_sampling_from_probs"
    return _sampling.sample(
        op, "probs", probs, MIN_P, indices, generator, check_nan, seed, offset, return_valid, min_p=min_p, per_row=False
    )


def _order(op: str, filter_apply_order: str) -> int:
    if filter_apply_order not in ("top_k_first", "joint"):
        fail(op, "filter_apply_order", "is unknown", repr(filter_apply_order), "'top_k_first' or 'joint'")
    return FIRST if filter_apply_order == "top_k_first" else JOINT


def top_k_top_p_sampling_from_probs(
    probs: Any,
    top_k: Any,
    top_p: Any,
    indices: Any = None,
    filter_apply_order: Literal["top_k_first", "joint"] = "top_k_first",
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row among those that pass both top_k and top_p.

    Parameters
    ----------
    top_k, top_p
        As for `top_k_sampling_from_probs` and `top_p_sampling_from_probs`; tensors of one value per row or per output (per row where `indices` leaves
        both possible).
    filter_apply_order
        "top_k_first": top_p applies to what top_k keeps, renormalised. "joint": both apply to the probabilities given.

    Others, results and errors as for `sampling_from_probs`.
    """
    op = "top_k_top_p_sampling_from_probs"
    return _sampling.sample(
        op,
        "probs",
        probs,
        _order(op, filter_apply_order),
        indices,
        generator,
        check_nan,
        seed,
        offset,
        return_valid,
        top_k=top_k,
        top_p=top_p,
    )


def top_k_top_p_sampling_from_logits(
    logits: Any,
    top_k: Any,
    top_p: Any,
    indices: Any = None,
    filter_apply_order: Literal["top_k_first", "joint"] = "top_k_first",
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Draw one token per row of softmax(logits) among those that pass both top_k and top_p, without storing the probabilities.

    The ids are those of top_k_top_p_sampling_from_probs(softmax(logits), ...), but for top_k = 1: there it is the argmax of the logits themselves,
    where softmax may round two of them to one probability.

    Parameters, results and errors as for `top_k_top_p_sampling_from_probs`.
    """
    op = "top_k_top_p_sampling_from_logits"
    return _sampling.sample(
        op,
        "logits",
        logits,
        _order(op, filter_apply_order),
        indices,
        generator,
        check_nan,
        seed,
        offset,
        return_valid,
        top_k=top_k,
        top_p=top_p,
    )


def top_p_renorm_probs(probs: Any, top_p: Any) -> Any:
    """The probabilities that top_p keeps, divided by their sum; 0 elsewhere.

    Parameters
    ----------
    probs
        [rows, vocab], float32, bfloat16 or float16, any row stride; vocab up to 262,144.
    top_p
        In [0, 1], a number or a float tensor [rows].

    Returns
    -------
    [rows, vocab] float32. A row without a positive value gives zeros; one with a NaN, infinite or negative value gives NaN.
    """
    parameters = [("top_k", None, True, 1, 1, _sampling.NO_K), ("top_p", top_p, False, 0.0, 1.0, 1.0)]
    return _sampling.map_rows("top_p_renorm_probs", "probs", probs, "gen_renorm", parameters)


def top_k_renorm_probs(probs: Any, top_k: Any) -> Any:
    """The probabilities that top_k keeps (ties at the boundary included), divided by their sum; 0 elsewhere.

    Parameters
    ----------
    probs
        As for `top_p_renorm_probs`.
    top_k
        1 or more, a number or an int32 or int64 tensor [rows].

    Returns
    -------
    As for `top_p_renorm_probs`.
    """
    parameters = [("top_k", top_k, True, 1, 2**63 - 1, 0), ("top_p", None, False, 0.0, 1.0, 1.0)]
    return _sampling.map_rows("top_k_renorm_probs", "probs", probs, "gen_renorm", parameters)


def top_k_mask_logits(logits: Any, top_k: Any) -> Any:
    """The logits, with -inf for all below the k-th largest of the row. Ties with it stay; NaN stays NaN and does not count.

    Parameters
    ----------
    logits
        [rows, vocab], float32, bfloat16 or float16, any row stride; vocab up to 262,144.
    top_k
        1 or more, a number or an int32 or int64 tensor [rows]; vocab and above change nothing.

    Returns
    -------
    [rows, vocab] float32.
    """
    return _sampling.map_rows(
        "top_k_mask_logits", "logits", logits, "gen_mask_logits", [("top_k", top_k, True, 1, 2**63 - 1, 0)]
    )


def chain_speculative_sampling(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    maybe_output_accepted_token_num: Any = None,
    maybe_output_emitted_draft_token_num: Any = None,
    deterministic: bool = True,
    generator: Any = None,
    check_nan: bool = False,
    *,
    seed: Any = None,
    offset: Any = None,
    return_valid: bool = False,
) -> Any:
    """Speculative sampling along a chain of drafts (Leviathan et al., arXiv:2211.17192, algorithm 1): what is returned is distributed as target_probs.

    Draft i is accepted while ``u * draft_probs[i, id] < target_probs[i, id]`` with u uniform on (0, 1]. The token after the accepted prefix is drawn from
    max(target - draft, 0) at the first rejected position (from target, should that be zero everywhere), or from target's last row if all were accepted.

    Parameters
    ----------
    draft_probs
        [requests, drafts, vocab], float32, bfloat16 or float16, any strides but the last; what the draft tokens were drawn from.
    draft_token_ids
        [requests, drafts], int32 or int64. An id outside the vocabulary is never accepted.
    target_probs
        [requests, drafts + 1, vocab], dtype of draft_probs.
    maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num
        int32 [requests] or None: counters to **add to**.
    deterministic
        Accepted for compatibility: results always are.
    generator, seed, offset
        As for `sampling_from_probs`; tensors hold one value per request. A request takes drafts + 1 draws at one offset.
    check_nan
        Raise ValueError if a request's last token cannot be drawn. On a GPU this waits for the result.
    return_valid
        Also return a bool tensor [requests], False where the last token could not be drawn (NaN, infinite or negative values, or nothing above zero; its
        id is 0).

    Returns
    -------
    (ids, accepted, emitted)
        int32 [requests, drafts + 1]: the accepted prefix, one more token, and -1 for the rest. `emitted` [requests] counts the prefix, `accepted` also
        later drafts that would pass on their own; the given tensors, if any.

    Raises
    ------
    TypeError, ValueError
        As for `sampling_from_probs`.
    """
    return _speculative.chain(
        draft_probs,
        draft_token_ids,
        target_probs,
        maybe_output_accepted_token_num,
        maybe_output_emitted_draft_token_num,
        generator,
        check_nan,
        seed,
        offset,
        return_valid,
    )


top_p_renorm_prob = top_p_renorm_probs
top_k_renorm_prob = top_k_renorm_probs


attach(__name__)  # what torch.compile traces in the place of these functions
