"""Bits: the same in every run, and with a fixed split size (or none) the same whatever else is in the batch."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests.arrays import Backend, assert_close, assert_same_bits
from tests.oracle_grid import OFF, OPS, case_of

HEADS, DIM, PAGE = (6, 2), 64, 16
LENS, QO = (700, 1, 33, 0, 128, 250), (40, 1, 9, 3, 70, 2)
SPLITS: tuple[dict[str, Any], ...] = (
    {"fixed_split_size": 2}, {"fixed_split_size": 3}, {"fixed_split_size": 100}, {"disable_split_kv": True},
)  # fmt: skip


class Batch:
    """Requests, each with its queries and keys, from which any selection in any order is run."""

    def __init__(self, b: Backend, rng: np.random.Generator, kind: str, dtype: str) -> None:
        self.b, self.kind, self.dtype = b, kind, dtype
        self.qo = (1,) * len(LENS) if kind == "decode" else QO
        self.q = [b.array(rng.standard_normal((n, HEADS[0], DIM)), dtype) for n in self.qo]
        self.masks = [rng.random((n, m)) < 0.7 for n, m in zip(self.qo, LENS, strict=True)]
        self.indptr, self.indices, self.last, pages = cases.page_table(rng, LENS, PAGE)
        self.cache = b.array(rng.standard_normal((pages, 2, PAGE, HEADS[1], DIM)), dtype)
        self.kv = [b.array(rng.standard_normal((2, n, HEADS[1], DIM)), dtype) for n in LENS]

    def run(self, chosen: list[int], mask: bool, **options: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """(out, lse) of each request chosen, run together in this order."""
        import torch

        pages = [self.indices[self.indptr[r] : self.indptr[r + 1]] for r in chosen]
        indptr, indices = np.cumsum([0, *map(len, pages)]), np.concatenate(pages)
        qo_indptr = np.cumsum([0, *(self.qo[r] for r in chosen)])
        options |= {"q_data_type": self.dtype}
        if mask:
            options["custom_mask"] = np.concatenate([self.masks[r].reshape(-1) for r in chosen])
        q = torch.cat([self.q[r] for r in chosen])
        if self.kind == "decode":
            w: Any = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
            w.plan(indptr, indices, self.last[chosen], *HEADS, DIM, PAGE, **options)
        elif self.kind == "paged":
            w = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
            w.plan(qo_indptr, indptr, indices, self.last[chosen], *HEADS, DIM, PAGE, causal=True, **options)
        else:
            w = pyinfer.BatchPrefillWithRaggedKVCacheWrapper()
            if options.get("fixed_split_size"):
                options["fixed_split_size"] *= PAGE  # of a ragged tensor: tokens
            w.plan(qo_indptr, np.cumsum([0, *(LENS[r] for r in chosen)]), *HEADS, DIM, causal=True, **options)
        caches = (torch.cat([self.kv[r] for r in chosen], 1)) if self.kind == "ragged" else (self.cache,)
        out, lse = w.run(q, *caches, return_lse=True)
        ends = qo_indptr[1:-1]
        return list(zip(np.split(self.b.numpy(out), ends), np.split(self.b.numpy(lse), ends), strict=True))


@pytest.mark.parametrize(
    ("kind", "mask"), [("decode", False), ("paged", False), ("ragged", False), ("paged", True), ("ragged", True)]
)
def test_company_changes_no_bit(rng, backend_arrays, device, kind, mask):
    batch = Batch(backend_arrays, rng, kind, cases.dtypes(device)[0])
    for options in SPLITS[:1] if mask else SPLITS:
        together = batch.run(list(range(len(LENS))), mask, **options)
        order = [int(i) for i in rng.permutation(len(LENS))]
        others = [([r], batch.run([r], mask, **options)) for r in range(len(LENS))]
        others += [(order, batch.run(order, mask, **options)), (order[:3], batch.run(order[:3], mask, **options))]
        for chosen, got in others:
            for r, results in zip(chosen, got, strict=True):
                for x, y, what in zip(results, together[r], ("out", "lse"), strict=True):
                    assert_same_bits(x, y, f"{what} of request {r} among {chosen}, {options}")


@pytest.mark.parametrize("rows", [1, 40])
def test_huge_scores_of_one_size_in_every_split(rng, backend_arrays, rows):
    """Beyond 2^26 or so an LSE is the same for one key as for all of a split; the splits' weights must sum to one all the same."""
    b, n = backend_arrays, 256
    v = b.array(rng.standard_normal((n // PAGE, PAGE, HEADS[1], DIM)), "bfloat16")
    k, q = b.full(v.shape, 1e15, "bfloat16"), b.full((rows, HEADS[0], DIM), 1e15, "bfloat16")
    w = pyinfer.BatchPrefillWithPagedKVCacheWrapper()
    pages = np.arange(n // PAGE + 1, dtype=np.int32)
    table = (np.array([0, rows], np.int32), pages[[0, -1]], pages[:-1], np.array([PAGE], np.int32))
    w.plan(*table, *HEADS, DIM, PAGE, q_data_type="bfloat16", fixed_split_size=4)
    assert w.plan_info.num_partials >= 4
    want = np.repeat(b.float64(v).reshape(n, HEADS[1], DIM).mean(0), HEADS[0] // HEADS[1], axis=0)
    assert_close(b.float64(w.run(q, (k, v))), np.broadcast_to(want, (rows, HEADS[0], DIM)), rtol=0.01, atol=2e-3)


def test_split_sizes_do_change_bits(rng, backend_arrays, device):
    """What the test above compares is not so small that no order of summation shows."""
    batch = Batch(backend_arrays, rng, "paged", cases.dtypes(device)[0])
    two, all_ = (batch.run([0, 4], False, **options) for options in (SPLITS[0], SPLITS[3]))
    assert any((x[1] != y[1]).any() for x, y in zip(two, all_, strict=True))


@pytest.mark.parametrize("op", ["single_prefill", "decode", "paged", "batch_attention", "cascade", "pod", "block_sparse", "mla"])  # fmt: skip
def test_repeated_runs(rng, device, op):
    """Splits arrive in any order at their merge: it does not show. PYINFER_REPEATS: how often, under a tool that slows runs down."""
    from tests import oracle_cases

    row = {f: values[0] for f, values in OPS[op].items()} | OFF
    row |= {
        "op": op,
        "dtype": cases.dtypes(device)[0],
        "shape": "long",
        "results": "both",
        "framework": "torch",
        "group": "few",
        "page": "16",
    }
    row |= {"dims": "mla" if op == "mla" else "64", "scale": OPS[op]["scale"][0]}
    if op == "single_prefill":
        row["page"] = "none"
    d = oracle_cases.Draw(case_of(row, {}), rng, device)
    prepared = oracle_cases.RUNNERS[op](d)
    first = [[d.b.numpy(x).copy() for x in pair] for pair in prepared.run()]
    repeats = int(os.environ.get("PYINFER_REPEATS", "0")) or (100 if device == "cuda" else 4)
    for i in range(repeats):
        for pair, want in zip(prepared.run(), first, strict=True):
            for x, y in zip(pair, want, strict=True):
                assert_same_bits(d.b.numpy(x), y, f"{op}, run {i + 2}")
