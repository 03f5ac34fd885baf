"""run() calls that look alike share one bound launch: it must serve those, all of those, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

import pyinfer
from pyinfer import _repeated_run
from pyinfer.core.tensor import view
from tests.arrays import assert_same_bits

OPTIONS = (None, None, None, False, None, None)


class Recorder:
    """Stands for a bound launch."""

    def __init__(self):
        self.calls = []

    def __call__(self, *pointers):
        self.calls.append(pointers)


@pytest.fixture
def torch(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(_repeated_run, "raw_stream", lambda: lambda device: 77)
    return torch


def warm(torch, kv, options=OPTIONS, lse=False, given=False):
    """A RepeatedRun that has seen the same call twice, its recorder and its query."""
    repeated, bound = _repeated_run.RepeatedRun(), Recorder()
    q, out = torch.zeros(3, 4, 64), torch.zeros(3, 4, 64)
    if isinstance(kv, tuple):
        k, v = view(kv[0]), view(kv[1])
    else:
        k, v = view(kv), view(kv)
        v.ptr += kv.stride(1) * kv.element_size()
    for _ in range(2):
        assert not repeated.ready
        repeated.note(view(q), k, v, view(out), view(torch.zeros(3, 4)) if lse else None, options, lambda: bound, given)
    return repeated, bound, q


@pytest.mark.cpu
def test_addresses_follow_the_tensors(torch):
    cache = torch.zeros(5, 2, 16, 2, 64)
    repeated, bound, q = warm(torch, cache)
    other, q2 = torch.ones_like(cache), torch.ones_like(q)
    out = repeated(q2, other, None, None, OPTIONS)
    v_ptr = other[:, 1].data_ptr()
    assert bound.calls == [(77, q2.data_ptr(), other.data_ptr(), v_ptr, out.data_ptr(), 0)]
    assert out.shape == q.shape and out.dtype == q.dtype
    given = torch.zeros_like(q)
    assert repeated(q, other, given, None, OPTIONS) is given
    k, v = torch.zeros(5, 16, 2, 64), torch.zeros(5, 16, 2, 64)
    repeated, bound, q = warm(torch, (k, v), (None, 0.5, None, True, None, None), lse=True)
    out, lse = repeated(q, (v, k), None, None, (None, 0.5, None, True, None, None))
    assert bound.calls == [(77, q.data_ptr(), v.data_ptr(), k.data_ptr(), out.data_ptr(), lse.data_ptr())]
    assert lse.shape == (3, 4) and lse.dtype is torch.float32


@pytest.mark.cpu
def test_a_given_lse(torch):
    """It is served where one was given, and told from a call without; as from one of another layout."""
    cache, options = torch.zeros(5, 2, 16, 2, 64), (None, None, None, True, None, None)
    repeated, bound, q = warm(torch, cache, options, lse=True, given=True)
    out, lse = torch.zeros_like(q), torch.zeros(3, 4)
    got = repeated(q, cache, out, lse, options)
    assert got[0] is out and got[1] is lse
    assert bound.calls == [(77, q.data_ptr(), cache.data_ptr(), cache[:, 1].data_ptr(), out.data_ptr(), lse.data_ptr())]
    for other in (None, torch.zeros(3, 8)[:, :4], torch.zeros(3, 4).double(), lse.numpy(), torch.zeros(4, 3).T):
        assert repeated(q, cache, out, other, options) is None
    own, _, q = warm(torch, cache, options, lse=True)
    assert own(q, cache, out, lse, options) is None and own(q, cache, out, None, options) is not None


@pytest.mark.cpu
def test_anything_else_takes_the_full_path(torch):
    cache = torch.zeros(5, 2, 16, 2, 64)
    repeated, bound, q = warm(torch, cache)
    parameter = torch.nn.Parameter(q.clone())
    odd = torch.zeros(q.numel() + 1)[1:].view(q.shape)  # 4 bytes off a 16-byte boundary
    for case in [
        (q[:2], cache, None, None, OPTIONS),
        (q.transpose(0, 1), cache, None, None, OPTIONS),
        (q.half(), cache, None, None, OPTIONS),
        (parameter, cache, None, None, OPTIONS),
        (odd, cache, None, None, OPTIONS),
        (q.numpy(), cache, None, None, OPTIONS),
        (q, cache[:4], None, None, OPTIONS),
        (q, cache.half(), None, None, OPTIONS),
        (q, (cache[:, 0], cache[:, 1]), None, None, OPTIONS),
        (q, [cache, cache], None, None, OPTIONS),
        (q, cache, torch.zeros(3, 4, 128)[..., ::2], None, OPTIONS),
        (q, cache, torch.zeros(3, 4, 64).half(), None, OPTIONS),
        (q, cache, None, torch.zeros(3, 4), OPTIONS),
        (q, cache, None, None, (None, 0.5, None, False, None, None)),
        (q, cache, None, None, (None, torch.tensor(1.0), None, False, None, None)),
        (q, cache, None, None, (None, None, None, True, None, None)),
    ]:
        assert repeated(*case) is None
    assert not bound.calls
    repeated.forget()
    assert not repeated.ready


@pytest.mark.cpu
def test_nothing_is_bound_to_scales_in_tensors(torch):
    repeated = _repeated_run.RepeatedRun()
    q = torch.zeros(3, 4, 64)
    for _ in range(3):
        repeated.note(view(q), view(q), view(q), view(q), None, (torch.tensor(2.0), *OPTIONS[1:]), Recorder)
    assert not repeated.ready


@pytest.mark.gpu
@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("return_lse", [True, False, "given"])
def test_same_bits_as_the_full_path(rng, combined, return_lse):
    torch = pytest.importorskip("torch")
    batch, pages, page = 3, 9, 16
    indptr, last = np.array([0, 2, 5, 9], np.int32), np.array([3, 16, 1], np.int32)

    def cache():
        both = torch.randn(pages, 2, page, 2, 64, device="cuda", dtype=torch.bfloat16)
        return both if combined else (both[:, 0].contiguous(), both[:, 1].contiguous())

    def make():
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8, device="cuda"))
        order = np.random.default_rng(1).permutation(pages).astype(np.int32)
        wrapper.plan(indptr, order, last, 8, 2, 64, page, q_data_type="bfloat16")
        return wrapper

    wrapper = make()
    for step in range(6):
        if step == 4:  # a new plan starts over
            order = np.random.default_rng(1).permutation(pages).astype(np.int32)
            wrapper.plan(indptr, order, last, 8, 2, 64, page, q_data_type="bfloat16")
        assert wrapper._repeated.ready == (step in (2, 3))
        q, kv = torch.randn(batch, 8, 64, device="cuda", dtype=torch.bfloat16), cache()
        out = torch.full_like(q, float("nan")) if step % 2 else None
        lse = torch.full((batch, 8), float("nan"), device="cuda") if return_lse == "given" else None
        got = wrapper.run(q, kv, out=out, lse=lse, return_lse=bool(return_lse))
        assert lse is None or got[1] is lse
        want = make().run(q, kv, return_lse=bool(return_lse))
        for a, b in zip(got, want, strict=True) if return_lse else ((got, want),):
            assert_same_bits(a.float().cpu().numpy(), b.float().cpu().numpy())
