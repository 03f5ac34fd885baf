"""Arguments and dispatch of chain_speculative_sampling."""

from __future__ import annotations

import functools
from typing import Any

from pyinfer._sampling import (
    _FLOATS,
    _INTS,
    MAX_VOCAB,
    _Argument,
    _check_contiguous,
    _draw_seed,
    _grain,
    _raise_if_invalid,
    _seed_and_offset,
)
from pyinfer.core.dtypes import BOOL, INT32, INT64
from pyinfer.core.errors import (
    check_dtype,
    check_last_dim_contiguous,
    check_ndim,
    check_same_device,
    check_shape,
    fail,
    fail_type,
)
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, empty, view

OP = "chain_speculative_sampling"


def _counter(arg: str, x: Any, like: TensorView, requests: int) -> tuple[Any, bool]:
    """A counter tensor and whether it is the caller's, to be added to."""
    if x is None:
        return empty(like, (requests,), INT32), False
    v = view(x, OP, arg)
    check_dtype(OP, arg, v, (INT32,))
    check_shape(OP, arg, v, (requests,))
    check_same_device(OP, {"target_probs": like, arg: v})
    _check_contiguous(OP, arg, v)
    return x, True


def chain(
    draft_probs: Any,
    draft_token_ids: Any,
    target_probs: Any,
    accepted: Any,
    emitted: Any,
    generator: Any,
    check_nan: bool,
    seed: Any,
    offset: Any,
    return_valid: bool,
) -> Any:
    """Check everything, then launch."""
    target, draft = view(target_probs, OP, "target_probs"), view(draft_probs, OP, "draft_probs")
    ids = view(draft_token_ids, OP, "draft_token_ids")
    check_dtype(OP, "target_probs", target, _FLOATS)
    if draft.dtype is not target.dtype:
        fail_type(
            OP,
            "draft_probs",
            "has another dtype than target_probs",
            draft.dtype.name,
            target.dtype.name,
            "Convert one.",
        )
    check_dtype(OP, "draft_token_ids", ids, _INTS)
    check_ndim(OP, "target_probs", target, 3)
    requests, positions, vocab = target.shape
    n = positions - 1
    if n < 0:
        fail(OP, "target_probs", "has no position", tuple(target.shape), "[requests, drafts + 1, vocab]")
    if not 0 < vocab <= MAX_VOCAB:
        fail(OP, "target_probs", "has an unsupported vocabulary", vocab, f"1 to {MAX_VOCAB} tokens on the last axis")
    if requests * positions >= 2**31:
        fail(OP, "target_probs", "has too many rows", requests * positions, "fewer than 2**31")
    check_shape(OP, "draft_probs", draft, (requests, n, vocab))
    check_shape(OP, "draft_token_ids", ids, (requests, n))
    check_same_device(OP, {"target_probs": target, "draft_probs": draft, "draft_token_ids": ids})
    check_last_dim_contiguous(OP, "target_probs", target)
    check_last_dim_contiguous(OP, "draft_probs", draft)
    _check_contiguous(OP, "draft_token_ids", ids)
    accepted, add_accepted = _counter("maybe_output_accepted_token_num", accepted, target, requests)
    emitted, add_emitted = _counter("maybe_output_emitted_draft_token_num", emitted, target, requests)
    if seed is None and offset is None:
        seeds, offsets = _draw_seed(OP, target, requests * positions, generator)
    else:
        seeds, offsets = _seed_and_offset(OP, target, requests, generator, seed, offset)
    out = empty(target, (requests, positions), INT32)
    valid = empty(target, (requests,), BOOL) if return_valid or check_nan or target.device < 0 else None
    if requests and target.device < 0:
        _cpu(target, draft, ids, out, accepted, add_accepted, emitted, add_emitted, valid, seeds, offsets)
    elif requests:
        kernel, pdl = _kernel(target.device, target.dtype.name)
        kernel(
            current_stream(target),
            requests,
            (
                draft.ptr, draft.strides[0], draft.strides[1], target.ptr, target.strides[0], target.strides[1],
                ids.ptr, int(ids.dtype is INT64), n, vocab, view(out).ptr,
                view(accepted).ptr, int(add_accepted), view(emitted).ptr, int(add_emitted), 0 if valid is None else view(valid).ptr,
                seeds.ptr, seeds.wide, offsets.ptr, offsets.wide, seeds.value, offsets.value,
            ),
            pdl,
        )  # fmt: skip
    if check_nan:
        _raise_if_invalid(OP, "probs", valid)
    return (out, accepted, emitted, valid) if return_valid else (out, accepted, emitted)


@functools.cache
def _kernel(device: int, dtype: str) -> Any:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.sampling import gen_chain

    return gen_chain(dtype).build_and_load(device), pdl_supported(device)


def _cpu(
    target: TensorView,
    draft: TensorView,
    ids: TensorView,
    out: Any,
    accepted: Any,
    add_accepted: bool,
    emitted: Any,
    add_emitted: bool,
    valid: Any,
    seeds: _Argument,
    offsets: _Argument,
) -> None:
    import numpy as np

    from pyinfer.cpu.speculative import chain_rows
    from pyinfer.cpu.storage import flat
    from pyinfer.cpu.threads import run

    requests, positions, vocab = target.shape
    rows = np.arange(requests)
    counters = [as_numpy(accepted), as_numpy(emitted)]
    for counter, keep in zip(counters, (add_accepted, add_emitted), strict=True):
        if not keep:
            counter[:] = 0
    apart = seeds.view is None and offsets.view is None
    run(
        chain_rows, requests, *flat(draft), *draft.strides[:2], *flat(target), *target.strides[:2], vocab,
        np.ascontiguousarray(as_numpy(ids), np.int64), seeds.on_host(requests, rows, np.uint64), offsets.on_host(requests, rows, np.uint64),
        rows * positions if apart else np.zeros(requests, np.int64), as_numpy(out), *counters, as_numpy(valid).view(np.uint8),
        grain=_grain(vocab),
    )  # fmt: skip
