"""Multi-head latent attention against float64, on either device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import pyinfer
from tests.arrays import EPSILON, Backend
from tests.attention_cases import page_table
from tests.reference.mla import mla

SCALE = (128 + 64) ** -0.5
DIMS = (512, 64)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family`: the kernel families to run. "auto" is sm90's on Hopper where that can run, and all there is on the CPU."""
    if "family" in metafunc.fixturenames:
        cuda = metafunc.config.getoption("--device") == "cuda"
        metafunc.parametrize("family", ("auto", "fa2") if cuda else ("auto",))


def dtypes(device: str) -> tuple[str, ...]:
    return ("float16", "bfloat16") if device == "cuda" else ("float32", "float16", "bfloat16")


@dataclass
class Case:
    """A batch: tensors for the operator, the same numbers as float64 for the reference."""

    backend: Backend
    dtype: str
    heads: int
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    kv_indices: np.ndarray
    last_page_len: np.ndarray
    kv_len: np.ndarray
    page_size: int
    q_nope: Any
    q_pe: Any
    ckv: Any
    kpe: Any
    kv_dtype: str | None = None  # None: the queries'
    scales: tuple[float, float] = (1.0, 1.0)  # what a stored value of ckv and of kpe is worth

    def plan(self, wrapper: Any, causal: bool = False, *, sm_scale: float = SCALE, on_device: bool = False) -> None:
        tables = (self.qo_indptr, self.kv_indptr, self.kv_indices, self.kv_len)
        if on_device:
            tables = tuple(self.backend.array(x) for x in tables)
        dims = (self.q_nope.shape[2], self.q_pe.shape[2])
        kv_dtype = self.kv_dtype or self.dtype
        wrapper.plan(*tables, self.heads, *dims, self.page_size, causal, sm_scale, self.dtype, kv_dtype)

    def run(self, wrapper: Any, **options: Any) -> Any:
        return wrapper.run(self.q_nope, self.q_pe, self.ckv, self.kpe, **options)

    def expected(self, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        options = {"sm_scale": SCALE, **options}
        nope, pe, ckv, kpe = (self.backend.float64(x) for x in (self.q_nope, self.q_pe, self.ckv, self.kpe))
        ckv, kpe = ckv * self.scales[0], kpe * self.scales[1]
        found = []
        for b, n in enumerate(self.kv_len):
            rows = slice(self.qo_indptr[b], self.qo_indptr[b + 1])
            tokens = np.arange(n)
            pages = self.kv_indices[self.kv_indptr[b] + tokens // self.page_size]
            slots = tokens % self.page_size
            found.append(mla(nope[rows], pe[rows], ckv[pages, slots], kpe[pages, slots], **options))
        return tuple(np.concatenate([f[i] for f in found]) for i in range(3))

    def check(self, out: Any, lse: Any = None, *, lse_factor: float = 1.0, **options: Any) -> None:
        wanted, wanted_lse, mean = self.expected(**options)
        got = self.backend.float64(out)
        assert got.shape == wanted.shape
        assert self.backend.is_own(out)
        eps = EPSILON[self.dtype]
        # One rounding of the result; the GPU also rounds the weights; what is summed in float32 besides.
        bound = 1.01 * eps * np.abs(wanted) + (eps if self.backend.device == "cuda" else 0) * mean + 2e-5 * (1 + mean)
        worst = np.abs(got - wanted) - bound
        assert np.isfinite(got).all(), f"not finite at {np.argwhere(~np.isfinite(got))[:5].tolist()}"
        assert (worst <= 0).all(), (
            f"{(worst > 0).sum()} beyond the bound, worst at {np.unravel_index(worst.argmax(), worst.shape)}: "
            f"got {got.flat[worst.argmax()]}, wanted {wanted.flat[worst.argmax()]}"
        )
        if lse is not None:
            np.testing.assert_allclose(self.backend.float64(lse), wanted_lse * lse_factor, rtol=4e-6, atol=2e-4)


def make(
    rng: np.random.Generator, backend: Backend, dtype: str, heads: int, qo_lens: Any, kv_lens: Any, page_size: int, *, joined: bool = False, spare: int = 0,
    magnitude: float = 1.0, dims: tuple[int, int] = DIMS, kv_dtype: str | None = None, scales: tuple[float, float] = (1.0, 1.0),
) -> Case:  # fmt: skip
    """A random batch. Slots behind a request's last token, and pages of nobody, are NaN. `joined`: halves of one tensor. `spare`: pages behind kv_len.

    With `scales` the stored values are as much smaller as they are worth more.
    """
    kv_len = np.asarray(kv_lens, np.int32)
    indptr, indices, last, pages = page_table(rng, np.where(kv_len > 0, kv_len + spare * page_size, 0), page_size)
    qo_indptr = np.concatenate([[0], np.cumsum(qo_lens)]).astype(np.int32)
    latent, rotary = dims
    cache = np.full((pages, page_size, latent + rotary), np.nan)
    for b, n in enumerate(kv_len):
        for t in range(n):
            slot = indices[indptr[b] + t // page_size], t % page_size
            cache[slot] = magnitude * rng.standard_normal(latent + rotary)
    cache[..., :latent] /= scales[0]
    cache[..., latent:] /= scales[1]
    q = rng.standard_normal((qo_indptr[-1], heads, latent + rotary))
    if joined:
        q, cache = backend.array(q, dtype), backend.array(cache, kv_dtype or dtype)
        parts = (q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:])
    else:
        halves = (q[..., :latent], q[..., latent:], cache[..., :latent], cache[..., latent:])
        types = (dtype, dtype, kv_dtype or dtype, kv_dtype or dtype)
        parts = tuple(backend.array(np.ascontiguousarray(x), t) for x, t in zip(halves, types, strict=True))
    return Case(backend, dtype, heads, qo_indptr, indptr, indices, last, kv_len, page_size, *parts, kv_dtype, scales)


# heads, query lengths, kv lengths, page size, causal: decode and prefill tiles, empty requests, more queries than keys, one key, several tiles and blocks;
# pages that TMA reads and others
CASES = [
    (16, (1, 1, 1, 1), (1, 40, 0, 77), 16, False),
    (128, (1, 1), (33, 150), 64, True),
    (16, (3, 0, 9, 2), (70, 5, 4, 0), 1, True),
    (1, (1, 5), (129, 64), 256, False),
    (5, (30, 1), (30, 300), 3, True),
    (7, (2,), (65,), 2, False),
    (33, (4,), (37,), 100, True),
    (128, (2, 1), (200, 517), 64, True),
    (16, (4, 1), (300, 65), 8, False),
]


@pytest.mark.parametrize(("heads", "qo", "kv", "page_size", "causal"), CASES)
def test_against_float64(rng, backend, device, family, heads, qo, kv, page_size, causal):
    dtype = dtypes(device)[int(rng.integers(len(dtypes(device))))]
    case = make(rng, backend, dtype, heads, qo, kv, page_size, joined=bool(rng.integers(2)))
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    case.plan(wrapper, causal, on_device=bool(rng.integers(2)))
    out, lse = case.run(wrapper, return_lse=True)
    case.check(out, lse, causal=causal)
    again = case.run(wrapper)
    assert (backend.numpy(again).view(np.uint8) == backend.numpy(out).view(np.uint8)).all(), "two runs differ"


FP8_CASES = [  # few rows and many, tiles of which some rows lie behind the end, pages of one token, several splits
    (16, (1, 1, 0, 1), (1, 45, 3, 130), 16, False),
    (128, (1, 2), (33, 400), 64, True),
    (5, (9, 2), (70, 0), 1, True),
]


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("heads", "qo", "kv", "page_size", "causal"), FP8_CASES)
def test_cache_of_8_bit_floats(rng, backend_arrays, kv_dtype, heads, qo, kv, page_size, causal):
    """Every stored value is exact in the queries' dtype, so the bound is that of 16-bit caches; each part of the cache has its own scale."""
    dtype = ("float16", "bfloat16")[int(rng.integers(2))]
    scales = tuple(rng.uniform(0.03, 3.0, 2).tolist())
    joined = bool(rng.integers(2))
    case = make(rng, backend_arrays, dtype, heads, qo, kv, page_size, joined=joined, kv_dtype=kv_dtype, scales=scales)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    case.plan(wrapper, causal)
    out, lse = case.run(wrapper, return_lse=True, ckv_scale=scales[0], kpe_scale=scales[1])
    case.check(out, lse, causal=causal)
    case.scales = (1.0, 1.0)
    case.check(case.run(wrapper), causal=causal)


def test_scales_of_a_cache(rng, backend_arrays, device):
    """They are positive numbers, and need a cache of 8-bit floats; the caches have the planned dtype."""
    case = make(rng, backend_arrays, "bfloat16", 4, (1,), (20,), 16, kv_dtype="float8_e4m3fn")
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    case.plan(wrapper)
    for value in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"^BatchMLAPagedAttentionWrapper: kpe_scale is no scale: got \S+, wanted a pos"
        ):
            case.run(wrapper, kpe_scale=value)
    with pytest.raises(TypeError, match="ckv_cache differs from the planned dtype: got bfloat16, wanted float8_e4m3fn"):
        wrapper.run(case.q_nope, case.q_pe, case.backend.full(case.ckv.shape, 0, "bfloat16"), case.kpe)
    plain = make(rng, backend_arrays, "bfloat16", 4, (1,), (20,), 16)
    plain.plan(wrapper)
    with pytest.raises(ValueError, match="ckv_scale needs a cache of 8-bit floats: got bfloat16, wanted float8_e4m3fn"):
        plain.run(wrapper, ckv_scale=0.5)


@pytest.mark.parametrize("heads", [16, 128])
def test_split_keys(rng, backend_arrays, device, family, heads):
    """One long request is split, and merged in the launch; natural-log LSE on that path."""
    case = make(rng, backend_arrays, dtypes(device)[0], heads, (1,), (700,), 64)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    case.plan(wrapper)
    out, lse = case.run(wrapper, return_lse=True, return_lse_base_on_e=True)
    if device == "cuda":
        assert wrapper.plan_info.num_partials > 1
    case.check(out, lse, lse_factor=np.log(2))
    first = backend_arrays.numpy(out).copy()
    for _ in range(3):
        assert (backend_arrays.numpy(case.run(wrapper)).view(np.uint8) == first.view(np.uint8)).all()


@pytest.mark.cpu
def test_split_keys_of_several_tiles(rng, backend_arrays, monkeypatch):
    """More slots than tiles, whatever the machine: the CPU's own merge."""
    from pyinfer.cpu import threads

    monkeypatch.setattr(threads, "get_num_threads", lambda: 8)
    case = make(rng, backend_arrays, "float32", 40, (2, 1), (500, 2), 16)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    case.plan(wrapper, True)
    assert wrapper.plan_info.num_partials > 1
    out, lse = case.run(wrapper, return_lse=True)
    case.check(out, lse, causal=True)
    out, lse = case.run(wrapper, return_lse=True, return_lse_base_on_e=True)
    case.check(out, lse, causal=True, lse_factor=np.log(2))


def test_natural_lse_unsplit(rng, backend_arrays, device, family):
    case = make(rng, backend_arrays, dtypes(device)[-1], 16, (2, 1), (20, 0), 16)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    case.plan(wrapper, True)
    out, lse = case.run(wrapper, return_lse=True, return_lse_base_on_e=True)
    case.check(out, lse, causal=True, lse_factor=np.log(2))


def test_given_outputs_and_spare_pages(rng, backend_arrays, device, family):
    """Outputs with odd strides; pages behind kv_len may name anything."""
    backend, dtype = backend_arrays, dtypes(device)[0]
    case = make(rng, backend, dtype, 16, (1, 2), (17, 40), 16, spare=2)
    for b, n in enumerate(case.kv_len):
        case.kv_indices[case.kv_indptr[b] - (-n // 16) : case.kv_indptr[b + 1]] = -1 - b
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    case.plan(wrapper)
    big = backend.full((3, 17, 520), np.nan, dtype)
    out, lse = big[:, :16, :512], backend.full((3, 16), np.nan, "float32")
    got = case.run(wrapper, out=out, lse=lse, return_lse=True)
    assert got[0] is out
    assert got[1] is lse
    case.check(out, lse)
    assert np.isnan(backend.float64(big)[:, 16:]).all()
    assert np.isnan(backend.float64(big)[..., 512:]).all()


@pytest.mark.parametrize("sm_scale", [1e30, 1e4, -0.1, 0.0])
def test_extreme_scales(rng, backend_arrays, device, family, sm_scale):
    """Finite logits of any size give finite results: with huge ones the largest key alone counts."""
    case = make(rng, backend_arrays, dtypes(device)[0], 16, (1,), (90,), 16)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    case.plan(wrapper, sm_scale=sm_scale)
    out = case.run(wrapper)
    if abs(sm_scale) < 1:
        case.check(out, sm_scale=sm_scale)
    else:
        assert np.isfinite(backend_arrays.float64(out)).all()
        if sm_scale == 1e30:
            case.check(out, sm_scale=sm_scale)


def test_empty_batches(rng, backend_arrays, device, family):
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    for qo, kv in (((), ()), ((0, 0), (3, 0)), ((2, 1), (0, 0))):
        case = make(rng, backend_arrays, dtypes(device)[0], 16, np.asarray(qo, int), kv, 16)
        case.plan(wrapper)
        out, lse = case.run(wrapper, return_lse=True)
        assert tuple(out.shape) == (sum(qo), 16, 512)
        assert (backend_arrays.float64(out) == 0).all()
        assert (backend_arrays.float64(lse) == -np.inf).all()


def test_int64_metadata(rng, backend_arrays, device):
    case = make(rng, backend_arrays, dtypes(device)[0], 16, (1, 2), (40, 9), 4)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    case.qo_indptr, case.kv_indptr, case.kv_len = (
        x.astype(np.int64) for x in (case.qo_indptr, case.kv_indptr, case.kv_len)
    )
    case.plan(wrapper)
    case.check(case.run(wrapper))


@pytest.mark.cpu
def test_other_dimensions_on_the_cpu(rng, backend_arrays):
    case = make(rng, backend_arrays, "float32", 3, (2,), (150,), 16, dims=(300, 18))
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    case.plan(wrapper)
    case.check(case.run(wrapper))


# ---- CUDA graph mode -------------------------------------------------------------------------------------------------------------
def graph_wrapper(backend: Backend, batch: int, pages: int, family: str) -> Any:
    sizes = (batch + 1, batch + 1, pages, batch)
    buffers = [backend.array(np.zeros(n, np.int32)) for n in sizes]
    return pyinfer.mla.BatchMLAPagedAttentionWrapper(None, True, *buffers, backend=family)


def test_graph_buffers(rng, backend_arrays, device, family):
    """Plans change, buffers and grid stay; buffers hold what was planned."""
    dtype = dtypes(device)[0]
    wrapper = graph_wrapper(backend_arrays, 3, 60, family)
    grids = set()
    for qo, kv in (((4, 4, 4), (300, 20, 1)), ((1, 1, 1), (7, 0, 900)), ((0, 2, 3), (0, 5, 40))):
        case = make(rng, backend_arrays, dtype, 16, qo, kv, 16)
        case.plan(wrapper, True)
        grids.add(wrapper.plan_info.max_work)
        out, lse = case.run(wrapper, return_lse=True)
        case.check(out, lse, causal=True)
        pages = len(case.kv_indices)
        assert (backend_arrays.numpy(wrapper._buffers["kv_indices"].obj)[:pages] == case.kv_indices).all()
        assert (backend_arrays.numpy(wrapper._buffers["kv_len_arr"].obj) == case.kv_len).all()
    assert len(grids) == 1
    with pytest.raises(
        ValueError, match=r"qo_indptr has more query rows than the first plan: got 13, wanted at most 12"
    ):
        make(rng, backend_arrays, dtype, 16, (5, 4, 4), (9, 9, 9), 16).plan(wrapper)
    with pytest.raises(ValueError, match=r"num_heads differs from the first plan: got 8, wanted 16"):
        make(rng, backend_arrays, dtype, 8, (1, 1, 1), (9, 9, 9), 16).plan(wrapper)
    with pytest.raises(ValueError, match=r"kv_indices is too small: got 60 entries, wanted 61 for this plan"):
        make(rng, backend_arrays, dtype, 16, (1, 1, 1), (976, 0, 0), 16).plan(wrapper)


@pytest.mark.gpu
def test_graph_replay(rng, backend_arrays, family):
    """Captured once, replayed over random batches: the bits of eager runs."""
    import torch

    heads, batch, dtype = 16, 4, "bfloat16"
    wrapper = graph_wrapper(backend_arrays, batch, 300, family)
    eager = pyinfer.mla.BatchMLAPagedAttentionWrapper(backend=family)
    rows, pages = 12, 303
    q_nope, q_pe = (torch.zeros(rows, heads, d, dtype=torch.bfloat16, device="cuda") for d in DIMS)
    ckv, kpe = (torch.zeros(pages, 16, d, dtype=torch.bfloat16, device="cuda") for d in DIMS)
    out = torch.full((rows, heads, 512), torch.nan, dtype=torch.bfloat16, device="cuda")
    graph = None
    for step in range(12):
        qo = [3] * batch if step == 0 else rng.integers(0, 4, batch)
        kv = rng.integers(0, 1000, batch) if step % 3 else rng.integers(0, 20, batch)
        case = make(rng, backend_arrays, dtype, heads, qo, kv, 16)
        n = int(case.qo_indptr[-1])
        for buffer, values in ((q_nope, case.q_nope), (q_pe, case.q_pe), (ckv, case.ckv), (kpe, case.kpe)):
            buffer[: len(values)] = values
        case.plan(wrapper, True)
        if graph is None:
            wrapper.run(q_nope, q_pe, ckv, kpe, out=out)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                wrapper.run(q_nope, q_pe, ckv, kpe, out=out)
        out.fill_(torch.nan)
        graph.replay()
        case.check(out[:n], causal=True)
        case.plan(eager, True)
        close = case.run(eager)
        torch.testing.assert_close(out[:n], close, rtol=1.6e-2, atol=1e-2)


# ---- the older wrapper -----------------------------------------------------------------------------------------------------------
def older(*args: Any) -> Any:
    with pytest.warns(DeprecationWarning, match="BatchDecodeMlaWithPagedKVCacheWrapper is deprecated"):
        return pyinfer.BatchDecodeMlaWithPagedKVCacheWrapper(*args)


@pytest.mark.parametrize(
    "options", [{}, {"window_left": 12}, {"logits_soft_cap": 2.0}, {"window_left": 0, "logits_soft_cap": 1.0}]
)
def test_older_decode_wrapper(rng, backend, device, options):
    dtype = dtypes(device)[1]
    case = make(rng, backend, dtype, 16, (1, 1, 1, 1), (1, 40, 0, 130), 16)
    wrapper = older(None, False, True)
    table = (case.kv_indptr, case.kv_indices, case.last_page_len)
    wrapper.plan(*table, 16, 512, 16, SCALE, **options, data_type=dtype, rope_theta=1e4)
    out, lse = case.run(wrapper, return_lse=True)
    case.check(out, lse, **options)
    scaled = case.run(wrapper, q_scale=0.5, k_scale=0.25)
    case.check(scaled, sm_scale=SCALE / 8, **options)


def test_older_wrapper_is_where_flashinfer_has_it():
    assert pyinfer.decode.BatchDecodeMlaWithPagedKVCacheWrapper is pyinfer.BatchDecodeMlaWithPagedKVCacheWrapper
    with pytest.raises(AttributeError, match=r"module 'pyinfer\.decode' has no attribute 'nothing'"):
        pyinfer.decode.nothing  # noqa: B018  # the look-up is what is tested


def test_older_wrapper_with_graph_buffers(rng, backend_arrays, device):
    dtype = dtypes(device)[0]
    case = make(rng, backend_arrays, dtype, 16, (1, 1), (20, 40), 16)
    wrapper = older(None, True, True, *(backend_arrays.array(np.zeros(n, np.int32)) for n in (3, 9, 2)))
    wrapper.plan(case.kv_indptr, case.kv_indices, case.last_page_len, 16, 512, 16, SCALE, data_type=dtype)
    case.check(case.run(wrapper))
    assert (backend_arrays.numpy(wrapper._buffers["paged_kv_last_page_len_buffer"].obj) == case.last_page_len).all()


def test_older_wrapper_refusals(rng, backend_arrays, device):
    with (
        pytest.warns(DeprecationWarning),
        pytest.raises(ValueError, match="use_tensor_cores asks for a kernel that rotates"),
    ):
        pyinfer.BatchDecodeMlaWithPagedKVCacheWrapper()
    case = make(rng, backend_arrays, dtypes(device)[0], 16, (1,), (20,), 16)
    wrapper = older(None, False, True)
    wrapper.plan(case.kv_indptr, case.kv_indices, case.last_page_len, 16, 512, 16, SCALE, data_type=case.dtype)
    with pytest.raises(ValueError, match=r"v_scale is not supported: got 2.0, wanted None or 1"):
        case.run(wrapper, v_scale=2.0)


# ---- errors ----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def good(rng, backend_arrays, device) -> Case:
    return make(rng, backend_arrays, dtypes(device)[0], 4, (1, 2), (20, 3), 16)


PLAN_ERRORS = [
    ("heads", 0, ValueError, "num_heads is no head count: got 0, wanted 1 or more"),
    ("page_size", 0, ValueError, "page_size is no page size: got 0, wanted 1 or more"),
    (
        "kv_len",
        np.array([33, 3], np.int32),
        ValueError,
        r"kv_len_arr is out of range: got 33 for request 0 \(2 pages\), wanted 0..32",
    ),
    ("kv_len", np.array([20, -1], np.int32), ValueError, r"kv_len_arr is out of range: got -1 for request 1"),
    ("kv_len", np.array([20], np.int32), ValueError, "kv_len_arr has the wrong length: got 1, wanted 2"),
    ("qo_indptr", np.array([0, 1], np.int32), ValueError, "qo_indptr has the wrong length: got 2, wanted 3"),
    ("qo_indptr", np.array([0, 2, 1], np.int32), ValueError, "qo_indptr decreases: got 1 at entry 2 after 2"),
    ("kv_indptr", np.array([1, 2, 3], np.int32), ValueError, "kv_indptr does not start at 0: got 1"),
    ("kv_indices", np.array([0, 1], np.int32), ValueError, "kv_indices is too short: got 2, wanted at least 3"),
    (
        "kv_indices",
        np.array([0, -7, 1], np.int32),
        ValueError,
        "kv_indices holds a negative page: got -7, wanted 0 or more",
    ),
    ("dtype", "float64", TypeError, "q_data_type has no (CPU|CUDA) kernel: got float64"),
]


@pytest.mark.parametrize(("field", "value", "error", "text"), PLAN_ERRORS)
def test_plan_errors(good, field, value, error, text):
    setattr(good, field, value)
    with pytest.raises(error, match="^BatchMLAPagedAttentionWrapper: " + text):
        good.plan(pyinfer.mla.BatchMLAPagedAttentionWrapper(good.backend.array(np.zeros(1 << 22, np.uint8))))


def test_sm_scale_is_required(good):
    with pytest.raises(
        TypeError, match=r"sm_scale is missing: got None, wanted a float. DeepSeek's models: \(128 \+ 64\)"
    ):
        good.plan(pyinfer.mla.BatchMLAPagedAttentionWrapper(), sm_scale=None)


def test_constructor_and_option_errors(good, device):
    make_wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper
    with pytest.raises(ValueError, match="backend is not available: got 'cutlass', wanted 'auto', 'fa2' or 'fa3'"):
        make_wrapper(backend="cutlass")
    with pytest.raises(ValueError, match="kv_len_arr is missing"):
        ints = [good.backend.array(np.zeros(3, np.int32)) for _ in range(3)]
        make_wrapper(None, True, *ints)
    tables = (good.qo_indptr, good.kv_indptr, good.kv_indices, good.kv_len)
    with pytest.raises(ValueError, match="use_profiler is not supported: got True, wanted False"):
        make_wrapper().plan(*tables, 4, 512, 64, 16, False, SCALE, "float16", "float16", True)
    with pytest.raises(
        TypeError,
        match="kv_data_type differs from q_data_type: got bfloat16, wanted float16, float8_e4m3fn or float8_e5m2",
    ):
        make_wrapper().plan(*tables, 4, 512, 64, 16, False, SCALE, "float16", "bfloat16")
    workspace = good.backend.array(np.zeros(1 << 22, np.uint8))
    wanted = (
        "no CUDA kernel: got 256 .* wanted 512 and 64" if device == "cuda" else "no CPU kernel: got 2048 .* 1..1024"
    )
    with pytest.raises(ValueError, match="head_dim_ckv has " + wanted):
        dim = 256 if device == "cuda" else 2048
        make_wrapper(workspace).plan(*tables, 4, dim, 64, 16, False, SCALE, "float16", "float16")


def test_run_errors(good, backend_arrays):
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    with pytest.raises(ValueError, match=r"plan\(\) was not called"):
        good.run(wrapper)
    good.plan(wrapper)
    good.run(wrapper)
    args = {"q_nope": good.q_nope, "q_pe": good.q_pe, "ckv_cache": good.ckv, "kpe_cache": good.kpe}
    other = "bfloat16" if good.dtype != "bfloat16" else "float16"

    def fails(error: type[Exception], text: str, **changed: Any) -> None:
        with pytest.raises(error, match="^BatchMLAPagedAttentionWrapper: " + text):
            wrapper.run(**{**args, **changed})

    full = backend_arrays.full
    fails(ValueError, r"q_nope has the wrong shape", q_nope=full((3, 5, 512), 0, good.dtype))
    fails(ValueError, r"q_pe has the wrong shape", q_pe=full((3, 4, 32), 0, good.dtype))
    fails(ValueError, r"ckv_cache has the wrong shape", ckv_cache=full((6, 8, 512), 0, good.dtype))
    fails(ValueError, r"kpe_cache has the wrong shape", kpe_cache=full((2, 16, 64), 0, good.dtype))
    fails(ValueError, r"ckv_cache has the wrong number of", ckv_cache=full((16, 512), 0, good.dtype))
    fails(
        TypeError,
        rf"q_nope differs from the planned dtype: got {other}, .*q_data_type",
        q_nope=full((3, 4, 512), 0, other),
    )
    fails(
        TypeError,
        rf"ckv_cache differs from the planned dtype: got {other}, .*kv_data_type",
        ckv_cache=full((6, 16, 512), 0, other),
    )
    fails(ValueError, r"kv_indices names a page outside the cache", ckv_cache=good.ckv[:1], kpe_cache=good.kpe[:1])
    fails(ValueError, r"kv_len belongs to another backend: got ndarray, wanted None", kv_len=good.kv_len)
    fails(ValueError, r"page_table belongs to another backend", page_table=good.kv_indices)
    fails(ValueError, r"profiler_buffer belongs to another backend", profiler_buffer=good.kv_indices)
    fails(ValueError, r"out has the wrong shape", out=full((3, 4, 64), 0, good.dtype))
    strided = full((3, 8), 0, "float32")[:, ::2]
    fails(ValueError, r"lse is not contiguous|^.*lse's last axis", lse=strided, return_lse=True)


@pytest.mark.gpu
def test_strict_refuses_metadata_on_the_gpu(good):
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    tables = [good.backend.array(x) for x in (good.qo_indptr, good.kv_indptr, good.kv_indices, good.kv_len)]
    tail = (good.heads, *DIMS, good.page_size, False, SCALE, good.dtype, good.dtype)
    with pytest.raises(ValueError, match="qo_indptr is on the GPU under strict=True"):
        wrapper.plan(*tables, *tail, strict=True)
    wrapper.plan(good.qo_indptr, good.kv_indptr, tables[2], good.kv_len, *tail, strict=True)
    good.check(good.run(wrapper))


@pytest.mark.gpu
def test_unaligned_rows_are_refused(rng, backend_arrays):
    case = make(rng, backend_arrays, "float16", 4, (1,), (20,), 16)
    wrapper = pyinfer.mla.BatchMLAPagedAttentionWrapper()
    case.plan(wrapper)
    case.ckv = backend_arrays.full((*case.ckv.shape[:2], 513), 0, "float16")[..., :512]
    with pytest.raises(ValueError, match="ckv_cache has rows that are not aligned"):
        case.run(wrapper)
