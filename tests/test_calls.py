"""Calls like one before: recognised only if everything that was checked still holds, launched with the new addresses."""

from __future__ import annotations

import threading
import time
import weakref

import numpy as np
import pytest

import pyinfer
from pyinfer import (
    _norm_quant,
    _page,
    _page_moves,
    _qk_norm_rope,
    _rope,
    _rope_launch,
    _rope_quant,
    activation,
    cascade,
    norm,
    page,
)
from pyinfer.core import calls
from tests import stub_driver

torch = pytest.importorskip("torch")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def forget():
    """Each test begins with nothing remembered and no kernel that a stub built."""
    stores = [norm._norm_calls, norm._add_calls, activation._calls, _rope._calls]
    stores += [_page.append_calls, page._position_calls, page._length_calls]
    caches = [norm._rmsnorm_kernel, norm._fused_add_rmsnorm_kernel, activation._act_and_mul_kernel, _rope._rope_kernel]
    caches += [page._kernel, _page._append_kernel]
    stores += [
        norm._layer_calls,
        _norm_quant._static_calls,
        _norm_quant._dynamic_calls,
        _rope_launch.calls,
        _qk_norm_rope._calls,
    ]
    stores += [activation._quant_calls, activation._dynamic_calls]
    stores += [cascade._two_calls, cascade._in_place_calls, cascade._many_calls]
    caches += [cascade._merge_state_kernel, cascade._merge_states_kernel]
    caches += [
        norm._layernorm_kernel,
        _norm_quant._kernel,
        _qk_norm_rope._kernel,
        _rope_launch._kernel,
        activation._rows_kernel,
    ]

    def clear():
        for x in stores:
            x.clear()
        for x in caches:
            x.cache_clear()

    clear()
    yield
    clear()


@pytest.fixture(params=["TensorGuards", "attributes"])
def launches(request, monkeypatch):
    """Operators on CPU tensors taken for tensors of cuda:0; what they launch. With torch's guard and without it."""
    if request.param == "attributes":
        monkeypatch.setattr(calls, "_tensor_guards", lambda: None)
    else:
        assert calls._tensor_guards() is not None, "this torch has no TensorGuards that work"
    return stub_driver.install(monkeypatch)


def full_path_only(monkeypatch):
    monkeypatch.setattr(calls.Calls, "run", lambda self, scalars, tensors: calls.MISS)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def operators():
    """(name, store, function of nothing that makes fresh arguments and returns (call, expected leading pointers' tensors))."""
    bf16 = lambda *shape: torch.randn(*shape).to(BF16)  # noqa: E731
    x, w, r, wide = bf16(6, 64), bf16(64), bf16(6, 64), bf16(6, 128)
    q, k = bf16(6, 4, 64), bf16(6, 2, 64)
    pos, where = torch.arange(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int32)
    pair = (bf16(3, 4, 2, 64), bf16(3, 4, 2, 64))
    both = bf16(3, 2, 2, 4, 64)
    pages, indptr, last = ints(2, 0, 1), ints(0, 3), ints(2)
    table, angles, both_nhd = torch.randn(100, 64), torch.randn(100, 32), bf16(3, 2, 4, 2, 64)
    fp8 = lambda *shape: torch.zeros(*shape).to(torch.float8_e4m3fn)  # noqa: E731
    clone = lambda t: t.clone()  # noqa: E731
    grid = dict(
        ppf=3, pph=1, ppw=2, num_frame_channels=4, num_height_channels=2, num_width_channels=10, num_heads_q=4, num_heads_k=4, num_heads_v=4,
        head_dim=16,
    )  # fmt: skip

    def make(f, *tensors):
        def fresh():
            own = [clone(t) for t in tensors]
            return lambda: f(*own)

        return fresh

    return {
        "rmsnorm": make(lambda x, w: pyinfer.rmsnorm(x, w, 1e-5), x, w),
        "rmsnorm out": make(lambda x, w, o: pyinfer.rmsnorm(x, w, out=o), x, w, r),
        "rmsnorm in place": make(lambda x, w: pyinfer.rmsnorm(x, w, out=x), x, w),
        "gemma_rmsnorm": make(pyinfer.gemma_rmsnorm, x, w),
        "fused_add_rmsnorm": make(pyinfer.fused_add_rmsnorm, x, r, w),
        "gemma_fused_add_rmsnorm": make(pyinfer.gemma_fused_add_rmsnorm, x, r, w),
        "silu_and_mul": make(pyinfer.silu_and_mul, wide),
        "gelu_and_mul out": make(lambda x, o: pyinfer.gelu_and_mul(x, out=o), wide, x),
        "rope pos": make(pyinfer.apply_rope_pos_ids, q, k, pos),
        "rope pos in place": make(pyinfer.apply_rope_pos_ids_inplace, q, k, pos),
        "rope partial": make(lambda q, k, p: pyinfer.apply_rope_pos_ids(q, k, p, 32, True, 2.0, 1e5), q, k, pos),
        "rope indptr": make(pyinfer.apply_rope, q, k, ints(0, 6), ints(3)),
        "llama": make(pyinfer.apply_llama31_rope_inplace, q, k, ints(0, 6), ints(3)),
        "rope cache": make(
            lambda p, q, k, c: pyinfer.apply_rope_with_cos_sin_cache(p, q.view(6, -1), k.view(6, -1), 64, c),
            pos, q, k, table,
        ),
        "append pair": make(
            lambda k, v, b, p, kc, vc, *rest: pyinfer.append_paged_kv_cache(k, v, b, p, (kc, vc), *rest),
            k, k, where, pos, *pair, pages, indptr, last,
        ),
        "append both HND": make(
            lambda k, v, b, p, c, *rest: pyinfer.append_paged_kv_cache(k, v, b, p, c, *rest, kv_layout="HND"),
            k, k, where, pos, both, pages, indptr, last,
        ),
        "append mla": make(
            pyinfer.append_paged_mla_kv_cache,
            x, x[:, :32], where, pos, bf16(3, 4, 64), bf16(3, 4, 32), pages, indptr, last,
        ),
        "layernorm": make(pyinfer.layernorm, x, torch.randn(64), torch.randn(64)),
        "qk norm rope": make(lambda *a: pyinfer.fused_qk_rmsnorm_rope(*a, **grid), bf16(6, 192), bf16(64), bf16(64)),
        "qk norm rope out": make(
            lambda x, a, b, q, k, v: pyinfer.fused_qk_rmsnorm_rope(x, a, b, **grid, q_out=q, k_out=k, v_out=v),
            bf16(6, 192), bf16(64), bf16(64), *(bf16(6, 4, 16) for _ in range(3)),
        ),
        "rmsnorm quant": make(lambda o, x, w: pyinfer.rmsnorm_quant(o, x, w, 0.5), fp8(6, 64), x, w),
        "rmsnorm quant by a tensor": make(pyinfer.rmsnorm_quant, fp8(6, 64), x, w, torch.ones(1)),
        "fused add quant": make(lambda o, x, r, w: pyinfer.fused_add_rmsnorm_quant(o, x, r, w, 2.0), fp8(6, 64), x, r, w),
        "rmsnorm dynamic": make(pyinfer.rmsnorm_dynamic_quant, x, w),
        "rmsnorm dynamic out": make(lambda x, w, o, s: pyinfer.rmsnorm_dynamic_quant(x, w, 1e-6, o, s), x, w, fp8(6, 64), torch.ones(6, 1)),
        "fused add dynamic": make(pyinfer.fused_add_rmsnorm_dynamic_quant, x, r, w),
        "silu quant": make(lambda o, x: pyinfer.silu_and_mul_quant(o, x, 0.5), fp8(6, 64), wide),
        "silu quant by a tensor": make(pyinfer.silu_and_mul_quant, fp8(6, 64), wide, torch.ones(())),
        "silu dynamic": make(pyinfer.silu_and_mul_dynamic_quant, wide),
        "append rounded": make(
            lambda k, v, b, p, kc, vc, *rest: pyinfer.append_paged_kv_cache(k, v, b, p, (kc, vc), *rest),
            k, k, where, pos, fp8(3, 4, 2, 64), fp8(3, 4, 2, 64), pages, indptr, last,
        ),
        "append rounded by scales": make(
            lambda k, v, b, p, c, i, n, last, s: pyinfer.append_paged_kv_cache(k, v, b, p, c, i, n, last, "NHD", 0.5, s),
            k, k, where, pos, fp8(3, 2, 4, 2, 64), pages, indptr, last, torch.ones(2),
        ),
        "rope quantize": make(
            lambda q, k, t, p: pyinfer.rope_quantize_fp8(q[..., :32], k[..., :32], q[..., 32:], k[..., 32:], t, p), q, k, angles, pos
        ),
        "rope quantize whole out": make(
            lambda q, k, t, p, a, b, c, d: pyinfer.rope_quantize_fp8(q, k, None, None, t, p, True, None, 1.0, 1.0, a, b, c, d),
            q, k, table, pos, fp8(6, 4, 64), fp8(6, 2, 64), fp8(6, 4, 0), fp8(6, 2, 0),
        ),
        "rope quantize append": make(
            lambda q, k, v, t, p, kc, vc, *rest: pyinfer.rope_quantize_fp8_append_paged_kv_cache(
                q[..., :32], k[..., :32], q[..., 32:], k[..., 32:], v, t, p, (kc, vc), *rest, page_size=4),
            q, k, k, angles, pos, fp8(3, 4, 2, 64), fp8(3, 4, 2, 64), pages, indptr, where, pos,
        ),
        "rope quantize append latent": make(
            lambda q, k, t, p, c, r, *rest: pyinfer.rope_quantize_fp8_append_paged_kv_cache(
                q[..., :32], k[:, 0, :32], q[..., 32:], k[:, 0, 32:], None, t, p, (c, r), *rest, page_size=4),
            q, k, angles, pos, fp8(3, 4, 32), fp8(3, 4, 32), pages, indptr, where, pos,
        ),
        "rope append": make(pyinfer.rope_append_paged_kv_cache, q, k, k, angles, pos, both_nhd, pages, indptr, where, pos),
        "rope append pair in place": make(
            lambda q, k, v, t, p, kc, vc, *rest: pyinfer.rope_append_paged_kv_cache(q, k, v, t, p, (kc, vc), *rest, q_out=q),
            q, k, k, angles, pos, *pair, pages, indptr, where, pos,
        ),
        "positions": make(lambda a, b: pyinfer.get_batch_indices_positions(a, b, 6), ints(0, 6), ints(9)),
        "positions out": make(
            lambda a, b, c, d: pyinfer.get_batch_indices_positions(a, b, 6, c, d), ints(0, 6), ints(9), where, pos
        ),
        "lengths": make(lambda a, b: pyinfer.get_seq_lens(a, b, 16), indptr, last),
        "merge": make(pyinfer.merge_state, q, torch.randn(6, 4), q, torch.randn(6, 4)),
        "merge in place": make(pyinfer.merge_state_in_place, q, torch.randn(6, 4), q, torch.randn(6, 4)),
        "merge in place masked": make(pyinfer.merge_state_in_place, q, torch.randn(6, 4), q, torch.randn(6, 4), torch.ones(6, dtype=torch.bool)),
        "merge many": make(pyinfer.merge_states, bf16(6, 3, 4, 64), torch.randn(6, 3, 4)),
    }  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("name", list(operators()))
def test_second_call_launches_what_the_full_path_would(launches, monkeypatch, name):
    """Same kernel, grid, parameters and stream as the full path gives for the same tensors; and the full path is not taken."""
    fresh = operators()[name]
    before = fresh()
    kept = before()  # alive, or the next tensors may lie where these did
    first = launches.pop()
    assert not launches
    call = fresh()
    with monkeypatch.context() as patch:
        for module in (
            norm,
            activation,
            _rope,
            page,
            _norm_quant,
            _qk_norm_rope,
            _rope_quant,
            _page,
            _page_moves,
            cascade,
        ):
            patch.setattr(module, "view", lambda *_: pytest.fail("the full path was taken"))
        got = call()
    second = launches.pop()
    assert not launches
    full_path_only(monkeypatch)
    want = call()
    full = launches.pop()
    assert second[0] == full[0] == first[0] and second[1] == full[1] and second[3:] == full[3:]
    spec = next(s for s in _specs() if s.name == full[0])
    a, b = (stub_driver.fields(spec.params, launch[2]) for launch in (second, full))
    allocated = {"out", "q_out", "k_out", "batch_indices", "positions", "seq_lens"} if want is not None else set()
    if name == "qk norm rope":
        allocated |= {"v_out"}
    if name.startswith("merge") and want is not None:
        allocated = {"v_out", "s_out"}
    if "dynamic" in name:
        allocated |= {"scales"}
    if name.startswith("rope ") and want is not None:
        allocated |= {"q_rope_out", "k_rope_out", "q_nope_out", "k_nope_out"}
    assert a.keys() == b.keys() and all(a[f] == b[f] for f in a if f not in allocated)
    for x, y in zip(_flat(got), _flat(want), strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
    pointers = {x.data_ptr() for x in _flat(got)}
    assert pointers <= set(a.values())
    assert second[2] != first[2], "new tensors, new addresses"
    del kept


@pytest.mark.cpu
@pytest.mark.parametrize("enable_pdl", [None, True, False])
def test_enable_pdl(launches, enable_pdl):
    """False: the launch carries no attribute for it; on the first call and on the next."""
    bf16 = lambda *shape: torch.randn(*shape).to(BF16)  # noqa: E731
    fp8 = lambda *shape: torch.zeros(*shape).to(torch.float8_e4m3fn)  # noqa: E731
    x, w, wide, f32 = bf16(6, 64), bf16(64), bf16(6, 128), torch.randn(64)
    q, k, pos, table = bf16(6, 4, 64), bf16(6, 2, 64), torch.arange(6, dtype=torch.int32), torch.randn(100, 64)
    pages, indptr, last, where = ints(2, 0, 1), ints(0, 3), ints(2), torch.zeros(6, dtype=torch.int32)
    caches, small = (bf16(3, 4, 2, 64), bf16(3, 4, 2, 64)), (fp8(3, 4, 2, 64), fp8(3, 4, 2, 64))
    latent = (bf16(3, 4, 64), bf16(3, 4, 64), pages, indptr, last)
    flat = (q.view(6, -1), k.view(6, -1))
    at = (pages, indptr, where, pos)
    option = {"enable_pdl": enable_pdl}
    for call in (
        lambda: pyinfer.rmsnorm(x, w, **option),
        lambda: pyinfer.fused_add_rmsnorm(x, x.clone(), w, **option),
        lambda: pyinfer.rmsnorm_quant(fp8(6, 64), x, w, 1.0, **option),
        lambda: pyinfer.fused_add_rmsnorm_dynamic_quant(x, x.clone(), w, **option),
        lambda: pyinfer.fused_rmsnorm_silu(x, w, **option),
        lambda: pyinfer.layernorm(x, f32, f32, **option),
        lambda: pyinfer.silu_and_mul(wide, **option),
        lambda: pyinfer.gelu_and_mul_quant(fp8(6, 64), wide, 1.0, **option),
        lambda: pyinfer.gelu_and_mul_dynamic_quant(wide, **option),
        lambda: pyinfer.apply_rope(q, k, ints(0, 6), ints(0), **option),
        lambda: pyinfer.apply_rope_pos_ids_inplace(q, k, pos, **option),
        lambda: pyinfer.apply_llama31_rope_pos_ids(q, k, pos, **option),
        lambda: pyinfer.apply_rope_with_cos_sin_cache(pos, *flat, 64, table, **option),
        lambda: pyinfer.append_paged_kv_cache(k, k, where, pos, caches, pages, indptr, last, **option),
        lambda: pyinfer.append_paged_mla_kv_cache(x, x, where, pos, *latent, **option),
        lambda: pyinfer.rope_quantize_fp8(q, k, None, None, table, pos, **option),
        lambda: pyinfer.rope_append_paged_kv_cache(q, k, k, table, pos, caches, *at, **option),
        lambda: pyinfer.rope_quantize_fp8_append_paged_kv_cache(
            q, k, None, None, k, table, pos, small, *at, page_size=4, **option
        ),
    ):
        for _ in range(2):
            call()
            assert launches.pop()[-1] == (0 if enable_pdl is False else 1)


def _flat(result):
    return [] if result is None else list(result) if isinstance(result, tuple) else [result]


def _specs():
    return _built


_built: list = []


@pytest.fixture(autouse=True)
def note_specs(monkeypatch):
    """Keep the specs that were built: their structs read the packed parameters."""
    _built.clear()
    original = stub_driver.StubKernel.__init__

    def init(self, spec, submitted):
        _built.append(spec)
        original(self, spec, submitted)

    monkeypatch.setattr(stub_driver.StubKernel, "__init__", init)


def norm_call(x, w, **options):
    return lambda: pyinfer.rmsnorm(x, w, **options)


@pytest.mark.cpu
def test_what_makes_a_call_another_one(launches):
    """Anything that enters the kernel's parameters or choice takes the full path again, and its parameters are its own."""
    base = torch.randn(8, 256).to(BF16)
    x, w = base[:4, :128], torch.randn(128).to(BF16)
    variants = {
        "as before": norm_call(x, w),
        "rows": norm_call(base[:5, :128], w),
        "row stride": norm_call(base.view(16, 128)[:4], w),
        "columns": norm_call(base[:4, :64], w[:64]),
        "dtype": norm_call(x.half(), w.half()),
        "axes": norm_call(x[:, None, :], w),
        "eps": norm_call(x, w, eps=1e-3),
        "out": norm_call(x, w, out=torch.empty(4, 128, dtype=BF16)),
        "strided out": norm_call(x, w, out=torch.empty(4, 256, dtype=BF16)[:, :128]),
        "in place": norm_call(x, w, out=x),
        "pdl": norm_call(x, w, enable_pdl=False),
        "gemma": lambda: pyinfer.gemma_rmsnorm(x, w),
    }
    for name, call in variants.items():
        before = len(norm._norm_calls)
        call()
        # By attributes, in place is as "strided out".
        assert len(norm._norm_calls) == before + 1 or (name == "in place" and calls._tensor_guards() is None), name
    count = len(norm._norm_calls)
    seen = {}
    for name, call in variants.items():
        launches.clear()
        call()
        spec = next(s for s in _built if s.name == launches[0][0])
        values = stub_driver.fields(spec.params, launches[0][2])
        seen[name] = (
            launches[0][0],
            launches[0][1],
            launches[0][4],
            *(v for f, v in values.items() if f not in ("x", "weight", "out")),
        )
    assert len(norm._norm_calls) == count, "all of them are remembered now"
    different = {k: v for k, v in seen.items() if k not in ("out", "in place", "axes")}
    assert len(set(different.values())) == len(different)


@pytest.mark.cpu
def test_unaligned_addresses_are_never_reused(launches, monkeypatch):
    """A tensor 2 bytes off gets the narrow kernel, before and after an aligned one; an allocation that is off is thrown away."""
    allocate, odd = calls._torch_direct_allocation(0), []

    def allocate_off(*layout):
        return torch.empty(4 * 128 + 8, dtype=BF16)[1:513].view(4, 128) if odd else allocate(*layout)

    monkeypatch.setattr(calls, "_torch_direct_allocation", lambda index: allocate_off)
    base, w = torch.randn(4 * 128 + 8).to(BF16), torch.randn(128).to(BF16)
    aligned, off = base[:512].view(4, 128), base[1:513].view(4, 128)
    names = []
    for x in (off, aligned, off, aligned, off):
        pyinfer.rmsnorm(x, w)
        names.append(launches.pop()[0])
    assert names[0] == names[2] == names[4] != names[1] == names[3]
    assert len(norm._norm_calls) == 1
    odd.append(True)
    pyinfer.rmsnorm(aligned, w)
    assert launches.pop()[0] == names[1], "a fresh, aligned output from the full path"


@pytest.mark.cpu
def test_errors_come_back_every_time(launches):
    """A call that was refused stays refused, also after one that passed under the same shapes."""
    x, w = torch.randn(4, 128).to(BF16), torch.randn(128).to(BF16)
    for _ in range(2):
        pyinfer.rmsnorm(x, w)
        with pytest.raises(TypeError, match="weight differs in dtype"):
            pyinfer.rmsnorm(x, w.half())
        with pytest.raises(ValueError, match="weight has the wrong shape"):
            pyinfer.rmsnorm(x, w[:64])
        with pytest.raises(ValueError, match="out has the wrong shape"):
            pyinfer.rmsnorm(x, w, out=x[:2])
        with pytest.raises(ValueError, match="not contiguous in its last axis"):
            pyinfer.rmsnorm(torch.randn(128, 4).to(BF16).t(), w)
        with pytest.raises(TypeError, match="input is no tensor"):
            pyinfer.rmsnorm([1.0], w)
        with pytest.raises(TypeError, match="weight is no tensor"):
            pyinfer.rmsnorm(x, None)
    assert len(norm._norm_calls) == 1
    q, k, pos = torch.randn(4, 2, 64).to(BF16), torch.randn(4, 1, 64).to(BF16), torch.arange(4)
    for _ in range(2):
        pyinfer.apply_rope_pos_ids_inplace(q, k, pos)
        with pytest.raises(ValueError, match="rope_theta is not positive"):
            pyinfer.apply_rope_pos_ids_inplace(q, k, pos, rope_theta=-1)
        with pytest.raises(ValueError, match="pos_ids has the wrong shape"):
            pyinfer.apply_rope_pos_ids_inplace(q, k, pos[:3])
        with pytest.raises(TypeError, match="pos_ids has the wrong dtype"):
            pyinfer.apply_rope_pos_ids_inplace(q, k, pos.float())


@pytest.mark.cpu
def test_zero_size_launches_nothing(launches):
    w = torch.randn(128).to(BF16)
    for _ in range(2):
        assert pyinfer.rmsnorm(torch.empty(0, 128, dtype=BF16), w).shape == (0, 128)
        assert pyinfer.silu_and_mul(torch.empty(0, 128, dtype=BF16)).shape == (0, 64)
        pyinfer.apply_rope_pos_ids_inplace(torch.empty(0, 2, 64), torch.empty(0, 1, 64), torch.arange(0))
    assert not launches and not len(norm._norm_calls)


@pytest.mark.cpu
def test_odd_tensors_take_the_full_path(launches):
    """Subclasses, dispatch modes and scalars that may change are served, and not remembered; parameters are."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Mine(torch.Tensor):
        pass

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    x, w = torch.randn(4, 128).to(BF16), torch.randn(128).to(BF16)
    from pyinfer.core import tensor

    tensor._viewers[Mine] = tensor._viewers[torch.Tensor]
    pyinfer.rmsnorm(x.as_subclass(Mine), w)
    with Mode():
        pyinfer.rmsnorm(x, w)
    pyinfer.rmsnorm(x, w, eps=torch.tensor(1e-5))
    assert len(launches) == 3 and not len(norm._norm_calls)
    p = torch.nn.Parameter(w, requires_grad=True)
    for _ in range(2):
        pyinfer.rmsnorm(x, p)
    assert len(norm._norm_calls) == 1
    with torch.inference_mode():
        for _ in range(3):
            assert pyinfer.rmsnorm(x, p).shape == x.shape
    assert len(norm._norm_calls) in (1, 2)
    view = torch._neg_view(x)  # holds the negated values: must not pass for x
    assert norm._norm_calls.run((1e-6, False, True), (view, p)) is calls.MISS


@pytest.mark.cpu
def test_size_one_axes(launches):
    """A row stride that means nothing is part of what is remembered; the launch is right all the same."""
    w = torch.randn(128).to(BF16)
    one = torch.randn(1, 128).to(BF16)
    odd = one.as_strided((1, 128), (3, 1))
    names = []
    for x in (one, odd, one, odd):
        pyinfer.rmsnorm(x, w)
        names.append(launches.pop()[0])
    assert names[0] == names[2] and names[1] == names[3]


@pytest.mark.cpu
def test_holds_no_tensor(launches):
    x, w = torch.randn(4, 128).to(BF16), torch.randn(128).to(BF16)
    out = pyinfer.rmsnorm(x, w)
    watched = [weakref.ref(t) for t in (x, w, out)]
    launches.clear()
    del x, w, out
    assert all(r() is None for r in watched)


@pytest.mark.cpu
def test_bounded(launches, monkeypatch):
    monkeypatch.setattr(calls, "MOST_KEYS", 5)
    w = torch.randn(128).to(BF16)
    for rows in range(1, 20):
        pyinfer.rmsnorm(torch.randn(rows, 128).to(BF16), w)
        assert len(norm._norm_calls) <= 5
    norm._norm_calls.clear()
    wide = torch.randn(4, 64 * 40).to(BF16)
    for pad in range(1, 30):
        pyinfer.rmsnorm(wide.view(-1)[: 4 * (128 + 8 * pad)].view(4, -1)[:, :128], w)
    assert len(norm._norm_calls) == calls.MOST_PER_KEY


@pytest.mark.cpu
def test_threads(launches):
    """Each thread launches with its own pointers."""
    w = torch.randn(128).to(BF16)
    tensors = [torch.randn(4, 128).to(BF16) for _ in range(4)]
    wrong = []

    def work(x):
        out = torch.empty_like(x)
        for _ in range(100):
            pyinfer.rmsnorm(x, w, out=out)

    threads = [threading.Thread(target=work, args=(x,)) for x in tensors]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong and len(launches) == 400
    seen = [stub_driver.fields(_built[0].params, launch[2])["x"] for launch in launches]
    assert {p: seen.count(p) for p in seen} == {x.data_ptr(): 100 for x in tensors}


@pytest.mark.cpu
def test_costs_less_than_the_full_path(launches, monkeypatch):
    """Thread CPU time, best of rounds: a known call costs at most half of the full path (about a quarter when nothing else runs)."""
    x, r, w = torch.randn(4, 128).to(BF16), torch.randn(4, 128).to(BF16), torch.randn(128).to(BF16)

    def best(n=300):
        times = []
        for _ in range(7):
            start = time.thread_time()
            for _ in range(n):
                pyinfer.fused_add_rmsnorm(x, r, w)
            times.append(time.thread_time() - start)
            launches.clear()
        return min(times)

    known = best()
    full_path_only(monkeypatch)
    assert known < 0.6 * best()


@pytest.mark.cpu
def test_cpu_calls_are_not_remembered(rng):
    x, w = torch.randn(4, 128), torch.randn(128)
    pyinfer.rmsnorm(x, w)
    y = np.asarray(rng.standard_normal((4, 128)), np.float32)
    pyinfer.rmsnorm(y, w.numpy())
    assert not len(norm._norm_calls)


@pytest.mark.cpu
def test_under_torch_compile():
    """Dynamo finds its way around the remembered calls (graph breaks, right results)."""
    x, w = torch.randn(4, 128), torch.randn(128)
    compiled = torch.compile(lambda x, w: pyinfer.rmsnorm(x * 2, w) + 1, backend="eager")
    for _ in range(2):
        assert torch.allclose(compiled(x, w), pyinfer.rmsnorm(x * 2, w) + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_known_calls_compute_the_same(framework, rng):
    """Every operator twice with fresh values: the second, known call gives what the full path gives."""
    import cupy

    move = (lambda t: t.cuda()) if framework == "torch" else (lambda t: cupy.from_dlpack(t.cuda()))
    half = lambda *s: torch.from_numpy(rng.standard_normal(s)).half()  # noqa: E731
    index = [move(t) for t in (torch.zeros(6, dtype=torch.int32), torch.arange(6, dtype=torch.int32))]
    rest = [move(t) for t in (ints(2, 0, 1), ints(0, 3), ints(2))]

    def run():
        x, r, w, wide = (move(half(*s)) for s in ((6, 64), (6, 64), (64,), (6, 128)))
        q, k, v = (move(half(6, h, 64)) for h in (4, 2, 2))
        caches = tuple(move(torch.zeros(3, 4, 2, 64, dtype=torch.float16)) for _ in range(2))

        def everything():
            a, b = x.copy() if framework == "cupy" else x.clone(), r.copy() if framework == "cupy" else r.clone()
            pyinfer.fused_add_rmsnorm(a, b, w)
            pyinfer.append_paged_kv_cache(k, v, *index, caches, *rest)
            where = pyinfer.get_batch_indices_positions(rest[1], rest[2], 6)
            lengths = pyinfer.get_seq_lens(rest[1], rest[2], 4)
            return [pyinfer.rmsnorm(x, w), a, b, pyinfer.silu_and_mul(wide), *pyinfer.apply_rope_pos_ids(q, k, index[1]),
                    *caches, *where, lengths]  # fmt: skip

        return everything

    get = (lambda t: t.cpu().numpy()) if framework == "torch" else cupy.asnumpy
    run()()
    known = [norm._norm_calls, norm._add_calls, activation._calls, _rope._calls, _page.append_calls, page._length_calls]
    assert all(len(c) == 1 for c in known)
    again = run()
    got = [get(t) for t in again()]
    assert all(len(c) == 1 for c in known)
    for c in known:
        c.clear()
    for a, b in zip(got, again(), strict=True):
        assert (a == get(b)).all()
