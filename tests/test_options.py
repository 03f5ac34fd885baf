"""The options of attention against the float64 reference: alone, in pairs, on every wrapper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests.arrays import EPSILON, Backend, assert_close, assert_same_bits
from tests.reference.attention import attention

ITEM_LEN = 64  # some items end behind it: their tokens see the prefix alone
LENS, QO_LENS = (37, 5, 0, 1, 90, 3), (9, 5, 2, 1, 40, 7)  # empty, one key, more queries than keys


@dataclass
class Case:
    """One combination of options, and of the wrapper that runs it."""

    kind: str  # decode | paged | ragged
    plan: dict[str, Any] = field(default_factory=dict)
    mask: bool = False
    sinks: bool = False
    items: bool = False
    dtype: str = "float16"
    kv_dtype: str | None = None
    out_dtype: str | None = None
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (64, 64)
    page_size: int = 16
    layout: str = "NHD"

    def __str__(self) -> str:
        on = [f"{k}={v}" for k, v in self.plan.items()] + [k for k in ("mask", "sinks", "items") if getattr(self, k)]
        types = "-".join(filter(None, (self.dtype, self.kv_dtype, self.out_dtype)))
        return f"{self.kind}-{types}-{self.heads}-{self.dims}-p{self.page_size}-{self.layout}-{'-'.join(on)}"


ALIBI, ROPE = {"pos_encoding_mode": "ALIBI"}, {"pos_encoding_mode": "ROPE_LLAMA", "rope_scale": 2.0, "rope_theta": 5e3}
CAP, WINDOW, CAUSAL = {"logits_soft_cap": 4.0}, {"window_left": 11}, {"causal": True}
CASES = [
    Case("decode", ALIBI),
    Case("decode", {**ALIBI, **CAP}, sinks=True, heads=(6, 2)),
    Case("decode", ROPE, heads=(7, 1), page_size=1, layout="HND"),
    Case("decode", {**ROPE, **WINDOW}, kv_dtype="float8_e4m3fn", dtype="bfloat16"),
    Case("decode", WINDOW, sinks=True, kv_dtype="float8_e5m2", out_dtype="float32"),
    Case("decode", {}, heads=(128, 1), dims=(24, 24), page_size=256),
    Case("decode", CAP, dims=(200, 200), out_dtype="bfloat16", page_size=5),
    Case("paged", CAUSAL, mask=True),
    Case("paged", {**WINDOW, **CAP}, mask=True, sinks=True, dtype="bfloat16"),
    Case("paged", {**ALIBI, **CAUSAL, **CAP}, heads=(6, 1), out_dtype="float32"),
    Case("paged", {**ROPE, **CAUSAL}, kv_dtype="float8_e4m3fn", layout="HND"),
    Case("paged", {**ROPE, **WINDOW}, mask=True, dims=(64, 32)),
    Case("paged", {}, items=True, sinks=True),
    Case("paged", {**ALIBI, **CAP, **WINDOW}, items=True, page_size=3),
    Case("paged", CAUSAL, sinks=True, kv_dtype="float8_e5m2", dims=(72, 40)),
    Case("ragged", {**ALIBI}, mask=True),
    Case("ragged", CAUSAL, dims=(192, 128), dtype="bfloat16"),
    Case("ragged", {**ROPE, **CAP}, items=True, heads=(3, 3)),
    Case("ragged", CAUSAL, sinks=True, layout="HND", out_dtype="float32", heads=(8, 1)),
]


def tolerance(case: Case, device: str) -> dict[str, float]:
    out = EPSILON[case.out_dtype or case.dtype]
    if device == "cpu":
        return {"rtol": out * 1.01 + 4e-6, "atol": 2e-6}
    weights = EPSILON[case.dtype] * (
        16 if "pos_encoding_mode" in case.plan else 4
    )  # rotated keys are rounded to q's type
    return {"rtol": weights + out, "atol": 2e-3 if case.plan.get("pos_encoding_mode") == "ROPE_LLAMA" else 1e-5}


@dataclass
class Inputs:
    """Everything a case needs, and what is expected of it."""

    q: Any
    cache: Any
    table: tuple[Any, ...]
    qo_indptr: np.ndarray
    masks: list[np.ndarray]
    sinks: Any
    items: list[tuple[int, list[int]]]
    want: np.ndarray
    want_lse: np.ndarray


def draw(rng: np.random.Generator, b: Backend, case: Case) -> Inputs:
    qo_lens = (1,) * len(LENS) if case.kind == "decode" else QO_LENS
    qo_heads, kv_heads = case.heads
    kv_type = case.kv_dtype or case.dtype
    q = b.array(rng.standard_normal((sum(qo_lens), qo_heads, case.dims[0])), case.dtype)
    tensors, per_request = [], []
    table = cases.page_table(rng, LENS, case.page_size)
    for dim in case.dims:
        if case.kind == "ragged":
            dims = (sum(LENS), kv_heads, dim) if case.layout == "NHD" else (kv_heads, sum(LENS), dim)
            x = b.array(rng.standard_normal(dims), kv_type)
            flat = b.float64(x) if case.layout == "NHD" else b.float64(x).swapaxes(0, 1)
            per_request.append(np.split(flat, np.cumsum(LENS)[:-1]))
        else:
            ps = case.page_size
            dims = (table[3], ps, kv_heads, dim) if case.layout == "NHD" else (table[3], kv_heads, ps, dim)
            values = rng.standard_normal(dims)
            values[~used_slots(table, dims, case.layout)] = np.nan  # e5m2 and e4m3 have NaN too
            x = b.array(values, kv_type)
            parts = [cases.gather_pages(b.float64(x), case.layout, *table[:3], i) for i in range(len(LENS))]
            per_request.append(parts)
        tensors.append(x)
    masks = [rng.random((n, m)) < 0.6 for n, m in zip(qo_lens, LENS, strict=True)]
    sinks = rng.standard_normal(qo_heads) * 2 if case.sinks else None
    items = [draw_items(rng, n, m) for n, m in zip(qo_lens, LENS, strict=True)]
    options = {k: v for k, v in case.plan.items() if k in ("window_left", "logits_soft_cap", "causal")}
    if case.mask or case.items:
        options["causal"] = case.items  # a mask replaces causality, multi-item scoring includes it
    if "pos_encoding_mode" in case.plan:
        options["alibi"] = case.plan["pos_encoding_mode"] == "ALIBI"
        options["rope"] = (case.plan["rope_scale"], case.plan["rope_theta"]) if not options["alibi"] else None
    outs, lses, row = [], [], 0
    for i, n in enumerate(qo_lens):
        out, lse = attention(
            b.float64(q)[row : row + n], per_request[0][i], per_request[1][i], sinks=None if sinks is None else np.float32(sinks),
            mask=masks[i] if case.mask else None, items=items[i] if case.items else None, **options,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
        row += n
    qo_indptr = np.cumsum([0, *qo_lens]).astype(np.int32)
    sinks = None if sinks is None else b.array(sinks, "float32")
    return Inputs(
        q, tuple(tensors), table[:3], qo_indptr, masks, sinks, items, np.concatenate(outs), np.concatenate(lses)
    )


def used_slots(table: tuple[Any, ...], dims: tuple[int, ...], layout: str) -> np.ndarray:
    used = np.zeros(dims, bool)
    for i, n in enumerate(LENS):
        for j, page in enumerate(table[1][table[0][i] : table[0][i + 1]]):
            m = min(n - j * dims[1 if layout == "NHD" else 2], dims[1 if layout == "NHD" else 2])
            used[(page, slice(0, m)) if layout == "NHD" else (page, slice(None), slice(0, m))] = True
    return used


def draw_items(rng: np.random.Generator, n: int, m: int) -> tuple[int, list[int]]:
    """A prefix, and behind it items of up to five tokens: for each token its place in its item, a delimiter (place 0) first."""
    prefix = int(rng.integers(0, m + 1))
    places: list[int] = []
    while len(places) < m - prefix:
        places += range(int(rng.integers(1, 6)))
    return prefix, places[: min(m - prefix, ITEM_LEN)]


def planned(case: Case, x: Inputs, **more: Any) -> Any:
    options = {**case.plan, "q_data_type": case.dtype, "kv_data_type": case.kv_dtype, "o_data_type": case.out_dtype}
    if case.mask:
        options["custom_mask"] = np.concatenate([m.reshape(-1) for m in x.masks])
    if case.items:
        places = np.zeros((len(LENS), ITEM_LEN), np.uint16)
        for row, (_, item) in zip(places, x.items, strict=True):
            row[: len(item)] = item
        options |= dict(
            prefix_len_ptr=np.array([p for p, _ in x.items], np.uint32), token_pos_in_items_ptr=places.reshape(-1),
            token_pos_in_items_len=ITEM_LEN,
        )  # fmt: skip
    options |= more
    heads = case.heads
    if case.kind == "decode":
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, case.layout)
        wrapper.plan(*x.table, *heads, case.dims[0], case.page_size, **options)
    elif case.kind == "paged":
        wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, case.layout)
        wrapper.plan(x.qo_indptr, *x.table, *heads, case.dims[0], case.page_size, case.dims[1], **options)
    else:
        wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(None, case.layout)
        wrapper.plan(x.qo_indptr, np.cumsum([0, *LENS]), *heads, *case.dims, **options)
    return wrapper


def run(case: Case, wrapper: Any, x: Inputs, **more: Any) -> Any:
    options = {"return_lse": True, "sinks": x.sinks, **more}
    if case.kind == "ragged":
        return wrapper.run(x.q, *x.cache, **options)
    return wrapper.run(x.q, x.cache, **options)


def check(b: Backend, device: str, case: Case, x: Inputs, got: Any) -> None:
    out, lse = got
    assert_close(b.float64(out), x.want, **tolerance(case, device), name=str(case))
    rope = case.plan.get("pos_encoding_mode") == "ROPE_LLAMA"
    limit = cases.lse_tolerance(device)
    if rope and device == "cuda":
        limit = {"rtol": 4 * EPSILON[case.dtype], "atol": 64 * EPSILON[case.dtype]}
    assert_close(b.float64(lse), x.want_lse, **limit, name=f"lse of {case}")
    unseen = np.isneginf(x.want_lse)
    assert (b.float64(out)[unseen] == 0).all()
    assert unseen.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_reference(rng, backend_arrays, device, case):
    x = draw(rng, backend_arrays, case)
    wrapper = planned(case, x)
    got = run(case, wrapper, x)
    check(backend_arrays, device, case, x, got)
    out = backend_arrays.full(x.want.shape, np.nan, case.out_dtype or case.dtype)
    again, lse = run(case, wrapper, x, out=out)
    assert again is out
    assert_same_bits(backend_arrays.numpy(out), backend_arrays.numpy(got[0]), "second run")
    assert_same_bits(backend_arrays.numpy(lse), backend_arrays.numpy(got[1]), "second run's lse")


@pytest.mark.parametrize("i", [1, 8, 13], ids=lambda i: str(CASES[i]))
def test_splits_change_nothing(rng, backend_arrays, device, i):
    """Sinks count once, however the keys are cut."""
    x = draw(rng, backend_arrays, CASES[i])
    wrapper = planned(CASES[i], x, fixed_split_size=1 if CASES[i].page_size >= 16 else 5)
    assert wrapper.plan_info.num_partials > 0
    check(backend_arrays, device, CASES[i], x, run(CASES[i], wrapper, x))


def test_a_mask_in_every_form(rng, backend_arrays, device):
    """Booleans and bits, on the host and where q is, give one result; the next plan forgets the mask."""
    case = Case("paged", mask=True, plan=CAUSAL)
    b, x = backend_arrays, draw(rng, backend_arrays, case)
    flat = np.concatenate([m.reshape(-1) for m in x.masks])
    packed = np.concatenate([np.packbits(m.reshape(-1), bitorder="little") for m in x.masks])
    first = None
    for options in (
        {"custom_mask": flat},
        {"custom_mask": b.array(flat)},
        {"custom_mask": b.array(flat.astype(np.uint8))},
        {"custom_mask": None, "packed_custom_mask": packed},
        {"custom_mask": ~flat, "packed_custom_mask": b.array(np.concatenate([packed, packed]))},
    ):
        wrapper = planned(case, x, **options)
        for array in (flat, packed):  # what plan() was given may change afterwards
            kept = array.copy()
            if any(value is array for value in options.values()):
                array[...] = 0
            got = run(case, wrapper, x)
            array[...] = kept
        check(b, device, case, x, got)
        if first is not None:
            assert_same_bits(b.numpy(got[0]), first)
        first = b.numpy(got[0])
    plain = Case("paged", CAUSAL)
    wrapper.plan(x.qo_indptr, *x.table, 4, 2, 64, 16, causal=True, q_data_type=case.dtype)
    forgotten = b.numpy(run(plain, wrapper, x)[0])
    assert_same_bits(forgotten, b.numpy(run(plain, planned(plain, x), x)[0]))
    assert (forgotten != first).any()


def test_a_bad_mask_leaves_the_last_plan(rng, backend_arrays, device):
    case = Case("paged", mask=True)
    x = draw(rng, backend_arrays, case)
    wrapper = planned(case, x)
    with pytest.raises(ValueError, match="custom_mask has the wrong size"):
        wrapper.plan(x.qo_indptr, *x.table, 4, 2, 64, 16, q_data_type=case.dtype, custom_mask=np.ones(3, bool))
    check(backend_arrays, device, case, x, run(case, wrapper, x))


@pytest.mark.parametrize("kind", ["paged", "ragged"])
def test_graph_mode_masks(rng, backend_arrays, device, kind):
    """The mask's buffers are filled by plan(), and a plan without a mask is refused once there was one."""
    b, case = backend_arrays, Case(kind, mask=True)
    x = draw(rng, b, case)
    batch, most = len(LENS), int(x.table[0][-1]) + 9
    sizes = (batch + 1, batch + 1, most, batch) if kind == "paged" else (batch + 1, batch + 1)
    room = sum((n * m + 7) // 8 for n, m in zip(QO_LENS, LENS, strict=True))
    masks = [b.array(np.full(room + 3, 255, np.uint8)), b.array(np.full(batch + 1, -7), "int32")]
    buffers = [b.array(np.full(n, -7), "int32") for n in sizes] + masks
    name = "BatchPrefillWithPagedKVCacheWrapper" if kind == "paged" else "BatchPrefillWithRaggedKVCacheWrapper"
    wrapper = getattr(pyinfer, name)(None, "NHD", True, *buffers)
    lengths = np.cumsum([0, *LENS])
    args = (x.qo_indptr, *x.table, 4, 2, 64, 16) if kind == "paged" else (x.qo_indptr, lengths, 4, 2, 64)
    for _ in range(2):
        flat = np.concatenate([m.reshape(-1) for m in x.masks])
        wrapper.plan(*args, q_data_type=case.dtype, custom_mask=flat)
        bits = np.concatenate([np.packbits(m.reshape(-1), bitorder="little") for m in x.masks])
        assert_same_bits(b.numpy(masks[0])[:room], bits)
        assert (
            b.numpy(masks[1]).tolist()
            == np.cumsum([0] + [(n * m + 7) // 8 for n, m in zip(QO_LENS, LENS, strict=True)]).tolist()
        )
        check(b, device, case, x, run(case, wrapper, x))
        x = draw(rng, b, case)
        args = (x.qo_indptr, *x.table, 4, 2, 64, 16) if kind == "paged" else args
    with pytest.raises(ValueError, match="custom_mask differs from the first plan: got False, wanted True"):
        wrapper.plan(*args, q_data_type=case.dtype)
    with pytest.raises(ValueError, match="window_left differs from the first plan: got 3, wanted -1"):
        wrapper.plan(*args, q_data_type=case.dtype, custom_mask=flat, window_left=3)


@pytest.mark.parametrize("mode", ["NONE", "ROPE_LLAMA", "ALIBI"])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_single_calls(rng, backend_arrays, device, mode, kv_dtype):
    b, dtype = backend_arrays, "bfloat16"
    case = Case("single", {} if mode == "NONE" else {"pos_encoding_mode": mode}, dtype=dtype, out_dtype="float32")
    q = b.array(rng.standard_normal((6, 4, 48)), dtype)
    k, v = (b.array(rng.standard_normal((70, 2, d)), kv_dtype or dtype) for d in (48, 16))
    mask = rng.random((6, 70)) < 0.5
    mask[2] = False
    options: dict[str, Any] = {"alibi": mode == "ALIBI", "rope": (4.0, 1e4) if mode == "ROPE_LLAMA" else None}
    arrays = [b.float64(x) for x in (q, k, v)]
    place: dict[str, Any] = {"pos_encoding_mode": mode} | ({"rope_scale": 4.0} if mode == "ROPE_LLAMA" else {})
    args = dict(place, return_lse=True, use_fp16_qk_reduction=True, o_dtype="float32")
    want = attention(*arrays, mask=mask, window_left=50, **options)
    packed = b.array(np.packbits(mask.reshape(-1), bitorder="little"))
    for given in ({"custom_mask": b.array(mask)}, {"packed_custom_mask": packed}):
        got = pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True, window_left=50, **given, **args)
        assert_close(b.float64(got[0]), want[0], **tolerance(case, device))
        assert (b.float64(got[1])[2] == -np.inf).all() and (b.float64(got[0])[2] == 0).all()
    got = pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True, **args)
    want = attention(*arrays, causal=True, **options)
    assert_close(b.float64(got[0]), want[0], **tolerance(case, device))
    case.out_dtype = None
    got = pyinfer.single_decode_with_kv_cache(q[5], k, v, "NHD", k_scale=0.5, **place)
    want = attention(arrays[0][5:], *arrays[1:], sm_scale=0.5 * 48**-0.5, **options)
    assert_close(b.float64(got), want[0][0], **tolerance(case, device))


def test_scales_in_tensors(rng, backend_arrays, device):
    case = Case("decode")
    b, x = backend_arrays, draw(rng, backend_arrays, case)
    wrapper = planned(case, x)
    want = wrapper.run(x.q, x.cache, q_scale=0.5, k_scale=3.0, v_scale=0.25)
    scales = {name: b.array(np.float32(value).reshape(shape)) for name, value, shape in
              (("q_scale", 0.5, ()), ("k_scale", 3.0, (1,)), ("v_scale", 0.25, ()))}  # fmt: skip
    assert_same_bits(b.numpy(wrapper.run(x.q, x.cache, **scales)), b.numpy(want))


def test_a_sink_outweighs_all_keys(rng, backend_arrays, device):
    """Sinks of ±huge and -inf: the limit cases of the denominator."""
    case = Case("decode", sinks=True)
    b, x = backend_arrays, draw(rng, backend_arrays, case)
    wrapper = planned(case, x)
    plain, plain_lse = run(case, wrapper, x, sinks=None)
    sinks = b.array(np.array([-np.inf, -1e30, 1e4, 80.0]), "float32")
    out, lse = (b.float64(a) for a in run(case, wrapper, x, sinks=sinks))
    seen = np.array(LENS) > 0
    assert_same_bits(out[:, :2], b.float64(plain)[:, :2])
    assert_same_bits(lse[:, :2], b.float64(plain_lse)[:, :2])
    assert (out[seen, 2] == 0).all()
    assert_close(lse[seen][:, 2:], np.tile(np.array([1e4, 80.0]) / np.log(2), (seen.sum(), 1)), rtol=1e-6)
    assert (lse[~seen] == -np.inf).all() and (out[~seen] == 0).all()
    assert_same_bits(b.float64(run(case, wrapper, x, sinks=None)[0]), b.float64(plain), "without sinks again")


@pytest.mark.parametrize("i", [5, 7, 10], ids=lambda i: str(CASES[i]))
@pytest.mark.parametrize("plan", [{"fixed_split_size": 2}, {"disable_split_kv": True}], ids=str)
def test_batch_invariance(rng, backend_arrays, device, i, plan):
    """A request alone gives the bits it gives in company."""
    case = CASES[i]
    b, x = backend_arrays, draw(rng, backend_arrays, case)
    together = b.numpy(run(case, planned(case, x, **plan), x)[0])
    row = 0
    for r, n in enumerate(np.diff(x.qo_indptr) if case.kind != "decode" else [1] * len(LENS)):
        pages = x.table[1][x.table[0][r] : x.table[0][r + 1]]
        table = ([0, len(pages)], pages, x.table[2][r : r + 1])
        options = {**case.plan, **plan, "q_data_type": case.dtype, "kv_data_type": case.kv_dtype}
        if case.kind == "decode":
            wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, case.layout)
            wrapper.plan(*table, *case.heads, case.dims[0], case.page_size, **options)
        else:
            wrapper = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, case.layout)
            options |= {"custom_mask": x.masks[r].reshape(-1)} if case.mask else {}
            wrapper.plan([0, n], *table, *case.heads, case.dims[0], case.page_size, **options)
        alone = b.numpy(wrapper.run(x.q[row : row + n], x.cache))
        assert_same_bits(alone, together[row : row + n], f"request {r}")
        row += n


def test_deprecated_forward_takes_the_encoding(rng, backend_arrays, device):
    case = Case("decode", ROPE)
    x = draw(rng, backend_arrays, case)
    wrapper = planned(Case("decode"), x)
    with pytest.warns(DeprecationWarning):
        got = wrapper.forward_return_lse(x.q, x.cache, **ROPE)
    check(backend_arrays, device, case, x, got)


def test_sinks_and_none_in_turn(rng, backend_arrays, device):
    """Calls that differ in nothing but the sinks: a launch remembered for one kind must not serve the other."""
    case = Case("decode", sinks=True)
    b, x = backend_arrays, draw(rng, backend_arrays, case)
    wrapper, other = planned(case, x), planned(case, x)
    plain, sunk = b.numpy(run(case, other, x, sinks=None)[0]), b.numpy(run(case, other, x)[0])
    assert (plain != sunk).any()
    for sinks in (x.sinks, x.sinks, x.sinks, None, None, None, x.sinks, None):
        got = b.numpy(run(case, wrapper, x, sinks=sinks)[0])
        assert_same_bits(got, plain if sinks is None else sunk)


@pytest.mark.gpu
def test_replays_follow_masks(rng, backend_arrays):
    """Captured once; every later plan's mask and lengths are seen by the replay, and give the bits of an eager run."""
    import torch

    b, pages, ps, batch = backend_arrays, 64, 16, 4
    cache = torch.randn(pages, 2, ps, 2, 64, dtype=torch.float16, device="cuda")
    q = torch.empty(80, 4, 64, dtype=torch.float16, device="cuda")
    out, sinks = torch.empty_like(q), torch.randn(4, device="cuda")

    def make():
        buffers = [b.array(np.zeros(n), "int32") for n in (batch + 1, batch + 1, pages, batch)]
        masks = [b.array(np.zeros(1 << 14, np.uint8)), b.array(np.zeros(batch + 1), "int32")]
        return pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, "NHD", True, *buffers, *masks)

    def plan(wrapper, qo_lens, lens, mask):
        indptr, indices, last, _ = table
        wrapper.plan(np.cumsum([0, *qo_lens]), indptr, indices, last, 4, 2, 64, ps, custom_mask=mask)

    wrapper, eager = make(), make()
    for step in range(20):
        qo_lens = np.full(batch, 20) if step == 0 else rng.integers(0, 21, batch)
        lens = np.full(batch, 200) if step == 0 else rng.integers(0, 201, batch)
        table = cases.page_table(rng, lens, ps, spare=0)
        mask = rng.random(int((qo_lens * lens).sum())) < 0.5
        for w in (wrapper, eager):
            plan(w, qo_lens, lens, mask if step % 2 else b.array(mask))
        q.copy_(torch.randn_like(q))
        if step == 0:
            wrapper.run(q, cache, out=out, sinks=sinks)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                wrapper.run(q, cache, out=out, sinks=sinks)
        rows = int(qo_lens.sum())
        out.fill_(float("nan"))
        graph.replay()
        want = eager.run(q, cache, sinks=sinks)
        assert_same_bits(b.numpy(out[:rows]), b.numpy(want[:rows]), f"step {step}")
        assert torch.isnan(out[rows:]).all()
