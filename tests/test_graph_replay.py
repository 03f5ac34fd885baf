"""CUDA graph mode over many batches: one capture, 200 random plans (growing, shrinking, empty), every replay the bits of an eager run and right.

On the CPU the same wrappers keep the same promises about their capacity: fixed sections, fixed grid, everything in the caller's buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests import stub_driver
from tests.arrays import Backend, assert_close, assert_same_bits
from tests.reference.attention import attention

BATCH, PAGES, PAGE, ROWS = 5, 96, 16, 160
HEADS = (4, 2)
PREFILL = (70, 150)  # the request that POD prefills


@dataclass
class Step:
    """A batch: lengths and a page table over pages in any order, some of them shared."""

    qo: np.ndarray
    kv: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    last: np.ndarray

    @property
    def qo_indptr(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.qo)]).astype(np.int32)

    def rows(self, b: int) -> slice:
        return slice(int(self.qo_indptr[b]), int(self.qo_indptr[b + 1]))

    def keys(self, cache: np.ndarray, b: int) -> np.ndarray:
        """Request b's part of a cache [pages, page, ...]."""
        pages = self.indices[self.indptr[b] : self.indptr[b + 1]]
        return cache[pages].reshape(len(pages) * PAGE, *cache.shape[2:])[: self.kv[b]]


def step_of(qo: Any, kv: Any, rng: np.random.Generator) -> Step:
    kv = np.asarray(kv)
    counts = -(-kv // PAGE)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    indices = rng.integers(0, PAGES, indptr[-1]).astype(np.int32)  # drawn with replacement: shared pages
    last = np.where(kv > 0, (kv - 1) % PAGE + 1, 0).astype(np.int32)
    return Step(np.asarray(qo), kv, indptr, indices, last)


def random_step(rng: np.random.Generator, i: int, decode: bool) -> Step:
    """Step 0 is the largest; then any, with everything empty, one long request, or rows without keys now and then."""
    most = (PAGES - BATCH) * PAGE
    kv = np.sort(rng.integers(0, most + 1, BATCH - 1))
    kv = np.diff(np.concatenate([[0], kv, [most]])) * rng.choice([0.05, 0.3, 1.0])
    if i == 0:
        kv = np.full(BATCH, most // BATCH)
    elif i % 11 == 3:
        kv = np.zeros(BATCH)
    elif i % 11 == 7:
        kv = rng.permutation([most] + [0] * (BATCH - 1))
    if decode:
        qo = np.ones(BATCH)
    elif i == 0:  # request 0's queries are not the cascade's
        qo = np.concatenate([[0], rng.multinomial(ROWS, np.full(BATCH - 1, 1 / (BATCH - 1)))])
    else:
        qo = rng.multinomial(int(rng.integers(0, ROWS + 1)), rng.dirichlet([0.5] * BATCH))
    return step_of(np.asarray(qo, np.int64), np.asarray(kv, np.int64), rng)


class Kind:
    """One wrapper in graph mode. Tensors stay where they are; `plan` follows a step, `run` writes `outs`."""

    decode = False

    def __init__(self, b: Backend, dtype: str, tensors: dict[str, Any] | None = None) -> None:
        self.b, self.dtype = b, dtype
        self.buffers = [b.array(np.full(n, -7), "int32") for n in self.sizes()]
        self.x = self.make_tensors(b, dtype) if tensors is None else tensors
        self.outs = self.make_outs(b, dtype)
        self.wrapper = self.make(b.array(np.zeros(32 << 20, np.uint8)))

    def sizes(self) -> tuple[int, ...]:
        return (BATCH + 1, BATCH + 1, PAGES, BATCH)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"q": (ROWS, HEADS[0], 64), "cache": (PAGES, 2, PAGE, HEADS[1], 64)}

    def make_tensors(self, b: Backend, dtype: str) -> dict[str, Any]:
        return {name: b.full(shape, 0, dtype) for name, shape in self.shapes().items()}

    def make_outs(self, b: Backend, dtype: str) -> list[Any]:
        return [b.full((ROWS, HEADS[0], 64), np.nan, dtype), b.full((ROWS, HEADS[0]), np.nan, "float32")]

    def fill(self, rng: np.random.Generator) -> None:
        """Fresh values in place."""
        for name, shape in self.shapes().items():
            self.x[name][...] = self.b.array(rng.standard_normal(shape), self.dtype)

    def make(self, workspace: Any) -> Any:
        return pyinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", True, *self.buffers)

    def plan(self, s: Step) -> None:
        self.wrapper.plan(s.qo_indptr, s.indptr, s.indices, s.last, *HEADS, 64, PAGE, causal=True, q_data_type=self.dtype)  # fmt: skip

    def run(self) -> None:
        self.wrapper.run(self.x["q"], self.x["cache"], out=self.outs[0], lse=self.outs[1], return_lse=True)

    def plans(self) -> list[Any]:
        return [self.wrapper.plan_info]

    def live(self, s: Step) -> list[int]:
        """How many rows of each output the step defines."""
        return [int(s.qo.sum())] * 2

    def wanted(self, s: Step) -> list[np.ndarray]:
        """The outputs in float64."""
        q, cache = self.b.float64(self.x["q"]), self.b.float64(self.x["cache"])
        parts = [
            attention(q[s.rows(i)], s.keys(cache[:, 0], i), s.keys(cache[:, 1], i), causal=not self.decode) for i in range(BATCH)
        ]  # fmt: skip
        return [np.concatenate(x) for x in zip(*parts, strict=True)]


class Decode(Kind):
    decode = True

    def sizes(self) -> tuple[int, ...]:
        return (BATCH + 1, PAGES, BATCH)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"q": (BATCH, HEADS[0], 64), "cache": (PAGES, 2, PAGE, HEADS[1], 64)}

    def make_outs(self, b: Backend, dtype: str) -> list[Any]:
        return [b.full((BATCH, HEADS[0], 64), np.nan, dtype), b.full((BATCH, HEADS[0]), np.nan, "float32")]

    def make(self, workspace: Any) -> Any:
        return pyinfer.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace, *self.buffers)

    def plan(self, s: Step) -> None:
        self.wrapper.plan(s.indptr, s.indices, s.last, *HEADS, 64, PAGE, q_data_type=self.dtype)


class Pod(Decode):
    def shapes(self) -> dict[str, tuple[int, ...]]:
        more = {"q_p": (PREFILL[0], HEADS[0], 64), "k_p": (PREFILL[1], HEADS[1], 64), "v_p": (PREFILL[1], HEADS[1], 64)}
        return super().shapes() | more

    def make(self, workspace: Any) -> Any:
        return pyinfer.PODWithPagedKVCacheWrapper(workspace, "NHD", True, *self.buffers)

    def run(self) -> None:
        x = self.x
        p, d = self.wrapper.run(
            x["q_p"], x["k_p"], x["v_p"], x["q"], x["cache"], causal_p=True, return_lse_p=True, return_lse_d=True
        )
        self.outs = [*d, *p]  # allocated by the run; in a graph they stay where the capture had them

    def live(self, s: Step) -> list[int]:
        return [BATCH, BATCH, PREFILL[0], PREFILL[0]]

    def wanted(self, s: Step) -> list[np.ndarray]:
        x = [self.b.float64(self.x[name]) for name in ("q_p", "k_p", "v_p")]
        return [*super().wanted(s), *attention(*x, causal=True)]


class Ragged(Kind):
    """Keys one request after another, in tensors with room for the most."""

    def sizes(self) -> tuple[int, ...]:
        return (BATCH + 1, BATCH + 1)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"q": (ROWS, HEADS[0], 64), "k": (PAGES * PAGE, HEADS[1], 64), "v": (PAGES * PAGE, HEADS[1], 64)}

    def make(self, workspace: Any) -> Any:
        return pyinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", True, *self.buffers)

    def plan(self, s: Step) -> None:
        kv_indptr = np.concatenate([[0], np.cumsum(s.kv)]).astype(np.int32)
        self.wrapper.plan(s.qo_indptr, kv_indptr, *HEADS, 64, causal=True, q_data_type=self.dtype)

    def run(self) -> None:
        x = self.x
        self.wrapper.run(x["q"], x["k"], x["v"], out=self.outs[0], lse=self.outs[1], return_lse=True)

    def wanted(self, s: Step) -> list[np.ndarray]:
        q, k, v = (self.b.float64(self.x[name]) for name in "qkv")
        ends = np.concatenate([[0], np.cumsum(s.kv)])
        own = [slice(int(ends[i]), int(ends[i + 1])) for i in range(BATCH)]
        parts = [attention(q[s.rows(i)], k[at], v[at], causal=True) for i, at in enumerate(own)]
        return [np.concatenate(x) for x in zip(*parts, strict=True)]


class Mixed(Kind):
    """Prefill and decode requests in one launch; the wrapper's own memory, and no buffers."""

    def make(self, workspace: Any) -> Any:
        sizes = {"max_batch_size": BATCH, "max_num_tokens": ROWS, "max_num_pages": PAGES}
        return pyinfer.BatchAttention("NHD", use_cuda_graph=True, **sizes)

    def plan(self, s: Step) -> None:
        kv_len = s.kv.astype(np.int32)
        self.wrapper.plan(s.qo_indptr, s.indptr, s.indices, kv_len, *HEADS, 64, 64, PAGE, True, None, None, self.dtype, self.dtype)  # fmt: skip

    def run(self) -> None:
        self.wrapper.run(self.x["q"], self.x["cache"], *self.outs)

    def plans(self) -> list[Any]:
        info = self.wrapper.plan_info
        return list(info[:2]) if isinstance(info, tuple) else []  # the CPU runs it as it comes


class Mla(Kind):
    """Latent and rotary parts are halves of one tensor."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"q": (ROWS, 3, 576), "cache": (PAGES, PAGE, 576)}

    def make_outs(self, b: Backend, dtype: str) -> list[Any]:
        return [b.full((ROWS, 3, 512), np.nan, dtype), b.full((ROWS, 3), np.nan, "float32")]

    def make(self, workspace: Any) -> Any:
        return pyinfer.mla.BatchMLAPagedAttentionWrapper(workspace, True, *self.buffers)

    def plan(self, s: Step) -> None:
        kv_len = s.kv.astype(np.int32)
        self.wrapper.plan(s.qo_indptr, s.indptr, s.indices, kv_len, 3, 512, 64, PAGE, True, 576**-0.5, self.dtype, self.dtype)  # fmt: skip

    def run(self) -> None:
        q, c = self.x["q"], self.x["cache"]
        tensors = (q[..., :512], q[..., 512:], c[..., :512], c[..., 512:])
        self.wrapper.run(*tensors, out=self.outs[0], lse=self.outs[1], return_lse=True)

    def wanted(self, s: Step) -> list[np.ndarray]:
        q, cache = self.b.float64(self.x["q"]), self.b.float64(self.x["cache"])[:, :, None]
        keys = [s.keys(cache, i) for i in range(BATCH)]
        parts = [attention(q[s.rows(i)], k, k[..., :512], causal=True) for i, k in enumerate(keys)]
        return [np.concatenate(x) for x in zip(*parts, strict=True)]


class Cascade(Kind):
    """Two levels; the first request's keys are what all share."""

    def make(self, workspace: Any) -> Any:
        b = self.b
        pairs = [[b.array(np.full(n, -7), "int32") for n in pair] for pair in ((2, BATCH), (2, BATCH), (PAGES, PAGES), (1, BATCH - 1))]  # fmt: skip
        return pyinfer.MultiLevelCascadeAttentionWrapper(2, workspace, "NHD", True, *pairs)

    def plan(self, s: Step) -> None:
        rows = s.qo_indptr[1:] - s.qo_indptr[1]
        first = int(s.indptr[1])
        own = (rows, s.indptr[1:] - s.indptr[1], s.indices[first:], s.last[1:])
        shared = (np.array([0, rows[-1]], np.int32), np.array([0, first], np.int32), s.indices[:first], s.last[:1])
        tables = [list(x) for x in zip(shared, own, strict=True)]
        self.wrapper.plan(*tables, *HEADS, 64, PAGE, q_data_type=self.dtype)

    def plans(self) -> list[Any]:
        return list(self.wrapper.plan_info)

    def live(self, s: Step) -> list[int]:
        return [int(s.qo[1:].sum())] * 2

    def wanted(self, s: Step) -> list[np.ndarray]:
        q, cache = self.b.float64(self.x["q"]), self.b.float64(self.x["cache"])
        parts, row = [], 0
        for i in range(1, BATCH):
            k, v = (np.concatenate([s.keys(cache[:, j], 0), s.keys(cache[:, j], i)]) for j in (0, 1))
            parts.append(attention(q[row : row + s.qo[i]], k, v))
            row += int(s.qo[i])
        return [np.concatenate(x) for x in zip(*parts, strict=True)]


KINDS: dict[str, Callable[..., Kind]] = {
    "decode": Decode,
    "prefill": Kind,
    "ragged": Ragged,
    "mixed": Mixed,
    "pod": Pod,
    "mla": Mla,
    "cascade": Cascade,
}


def compare(kind: Kind, s: Step, device: str, name: str) -> None:
    """Against float64. Results of the GPU, and of a cascade, are rounded on the way too."""
    for got, want, rows in zip(kind.outs, kind.wanted(s), kind.live(s), strict=True):
        if want.ndim == 2:
            assert_close(kind.b.float64(got)[:rows], want, **cases.lse_tolerance(device), name=name)
        else:
            limit = {k: 3 * v for k, v in cases.tolerance(kind.dtype, device).items()}
            assert_close(kind.b.float64(got)[:rows], want, **limit, name=name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KINDS)
def test_two_hundred_batches(rng, backend_arrays, name):
    import torch

    b, dtype = backend_arrays, "float16"
    kind = KINDS[name](b, dtype)
    eager = KINDS[name](b, dtype, kind.x)
    kind.fill(rng)
    kind.plan(random_step(rng, 0, kind.decode))
    kind.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kind.run()
    eager.plan(random_step(rng, 0, kind.decode))  # the capacity is the first plan's
    for i in range(1, 201):
        s = random_step(rng, i, kind.decode)
        kind.fill(rng)
        kind.plan(s)
        eager.plan(s)
        for out in kind.outs:
            out.fill_(float("nan"))
        graph.replay()
        eager.run()
        for got, want, rows in zip(kind.outs, eager.outs, kind.live(s), strict=True):
            assert_same_bits(b.numpy(got)[:rows], b.numpy(want)[:rows], f"replay {i} of {s.kv.tolist()}")
        if i % 20 == 0 or i < 12:
            compare(kind, s, "cuda", f"replay {i}")


@pytest.mark.parametrize("name", KINDS)
def test_the_capacity_is_the_first_plans(rng, backend_arrays, device, name):
    """What a captured launch has baked in never changes: grid, sections, workspace, tiles, addresses; and each result is right."""
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    kind = KINDS[name](b, dtype)
    fixed = None
    for i in range(61):
        s = random_step(rng, i, kind.decode)
        kind.plan(s)
        if i == 0:  # a wrapper without a workspace learns from q where it is
            kind.fill(rng)
            kind.run()
        plans = kind.plans()
        now = [(p.max_work, p.max_partials, p.workspace_bytes, p.offsets, p.tile_q, p.capacity) for p in plans]
        if now:  # without a workspace the device is known from the first run on
            assert fixed in (None, now)
            fixed = now
        for p in plans:
            assert p.n_work <= p.max_work and p.num_partials <= p.max_partials and p.workspace_bytes <= 32 << 20
            assert len(p.pack()) == p.offsets.total
        if i % 6 == 3:  # those without a key among them
            kind.fill(rng)
            kind.run()
            compare(kind, s, device, f"batch {i} of {s.kv.tolist()}")


@pytest.mark.cpu
@pytest.mark.parametrize("causal", [False, True])
def test_mixed_plans_stay_within_their_capacity(rng, causal):
    """As a GPU would plan them, with more or fewer multiprocessors than there is work for."""
    from pyinfer.schedulers import mixed

    for num_sms in (1, 7, 132):
        cut = dict(
            num_qo_heads=8, num_kv_heads=2, page_size=PAGE, prefill_tile=(64, 64), decode_tile=(16, 64), num_sms=num_sms, ctas_per_sm=2
        )  # fmt: skip
        capacity = mixed.mixed_capacity(BATCH, ROWS, PAGES, **cut)
        fixed = None
        for i in range(60):
            s = random_step(rng, i, False)
            plans = mixed.mixed_plan(
                s.qo_indptr, s.indptr, s.indices, s.kv.astype(np.int32), head_dim_qk=64, head_dim_vo=64, causal=causal, capacity=capacity, **cut
            )  # fmt: skip
            free = mixed.mixed_plan(
                s.qo_indptr, s.indptr, s.indices, s.kv.astype(np.int32), head_dim_qk=64, head_dim_vo=64, causal=causal, **cut
            )  # fmt: skip
            for plan, other in zip(plans[:2], free[:2], strict=True):
                np.testing.assert_array_equal(plan.work, other.work)
                assert plan.n_work <= plan.max_work and plan.num_partials <= plan.max_partials
            now = [plans.prefill_rate, *((p.max_work, p.offsets, p.workspace_bytes) for p in plans[:2])]
            assert fixed in (None, now)
            fixed = now


# ---- BatchAttention's capacity ---------------------------------------------------------------------------------------------------
SIZES = {"max_batch_size": 2, "max_num_tokens": 9, "max_num_pages": 4}
PLAN = dict(
    qo_indptr=[0, 1, 9], kv_indptr=[0, 2, 4], kv_indices=[4, 0, 5, 1], kv_len_arr=[19, 32], num_qo_heads=4, num_kv_heads=2, head_dim_qk=64,
    head_dim_vo=64, page_size=16, q_data_type="float16", kv_data_type="float16",
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"qo_indptr": [0, 1, 10]}, r"qo_indptr is beyond max_num_tokens: got 10, wanted at most 9. Make a wrapper with more room"),
        ({"kv_indptr": [0, 2, 5], "kv_indices": [0] * 5, "kv_len_arr": [19, 48]}, "kv_indptr is beyond max_num_pages: got 5, wanted at most 4"),
        ({"qo_indptr": [0, 0, 0, 1], "kv_indptr": [0, 0, 0, 1], "kv_len_arr": [0, 0, 1]}, "kv_len_arr is beyond max_batch_size: got 3, wanted at most 2"),
        ({"num_qo_heads": 2}, "num_qo_heads differs from the first plan: got 2, wanted 4. In CUDA graph mode the first plan fixes it"),
        ({"sm_scale": 2.0}, "sm_scale differs from the first plan: got 2.0, wanted 0.125"),
        ({"causal": True}, "causal differs from the first plan: got True, wanted False"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, dict) else "",
)  # fmt: skip
def test_batch_attention_refuses(rng, backend_arrays, device, change, text):
    """And goes on with the plan that it had."""
    b = backend_arrays
    q = b.array(rng.standard_normal((9, 4, 64)), "float16")
    cache = b.array(rng.standard_normal((6, 2, 16, 2, 64)), "float16")
    wrapper = pyinfer.BatchAttention(use_cuda_graph=True, **SIZES)
    assert wrapper.is_cuda_graph_enabled and not pyinfer.BatchAttention().is_cuda_graph_enabled
    wrapper.plan(**PLAN)
    before = wrapper.run(q, cache)
    with pytest.raises(ValueError, match=f"BatchAttention: {text}"):
        wrapper.plan(**{**PLAN, **change})
    for x, y in zip(wrapper.run(q, cache), before, strict=True):
        assert_same_bits(b.numpy(x), b.numpy(y))


def test_batch_attention_wants_its_sizes():
    with pytest.raises(ValueError, match=r"BatchAttention: max_num_tokens is no size: got None, wanted 1 or more\. CUDA graph mode needs it"):  # fmt: skip
        pyinfer.BatchAttention(use_cuda_graph=True, max_batch_size=1, max_num_pages=1)


def test_batch_attention_graph_is_the_one_launch(monkeypatch, backend_arrays, device):
    """Refused before anything is launched, also where there is no GPU to launch on."""
    b = backend_arrays
    if device == "cpu":
        stub_driver.install(monkeypatch)
    wrapper = pyinfer.BatchAttention(use_cuda_graph=True, **SIZES)
    wrapper.plan(**{**PLAN, "head_dim_qk": 80, "head_dim_vo": 80})
    q, cache = b.full((9, 4, 80), 0, "float16"), b.full((6, 2, 16, 2, 80), 0, "float16")
    text = "use_cuda_graph is beyond the one-launch kernel: got q float16, cache float16, head_dim 80"
    with pytest.raises(ValueError, match=text):
        wrapper.run(q, cache)
    wrapper = pyinfer.BatchAttention(use_cuda_graph=True, **SIZES)
    on_device = b.array(np.array([4, 0, 5, 1], np.int32))
    wrapper.plan(**{**PLAN, "kv_indices": on_device})
    with pytest.raises(ValueError, match="kv_indices moved since the first plan: got host memory, wanted the same GPU memory"):  # fmt: skip
        wrapper.plan(**PLAN)
    with pytest.raises(ValueError, match="kv_indices moved since the first plan: got other GPU memory, wanted the same GPU memory"):  # fmt: skip
        wrapper.plan(**{**PLAN, "kv_indices": on_device.clone()})
    wrapper = pyinfer.BatchAttention(use_cuda_graph=True, **SIZES)
    wrapper.plan(**PLAN)
    with pytest.raises(ValueError, match="kv_indices moved since the first plan: got other GPU memory, wanted host memory"):  # fmt: skip
        wrapper.plan(**{**PLAN, "kv_indices": on_device})
