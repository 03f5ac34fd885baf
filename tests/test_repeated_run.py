"""run() calls that look alike share one bound launch: it must serve those, all of those, and nothing else."""

from __future__ import annotations

import struct

import numpy as np
import pytest

import pyinfer
from pyinfer import _attention, _batch_run, _paged_mla, _single_calls
from pyinfer.jit import attention_launch
from tests import stub_driver, stub_runtime
from tests.arrays import assert_same_bits

torch = pytest.importorskip("torch")
PAGES, PAGE, HEADS, DIM = 9, 16, (8, 2), 64
TABLE = ([0, 2, 5, 9], list(range(PAGES)), [3, 16, 1])


class Runs:
    """The GPU path of a wrapper's run() on CPU tensors: what was launched, and how many calls were checked in full."""

    def __init__(self, monkeypatch, record):
        self.launches, self.checked = record, 0
        original = _batch_run.BatchRun._check_run

        def check_run(wrapper, *args):
            self.checked += 1
            return original(wrapper, *args)

        monkeypatch.setattr(_batch_run.BatchRun, "_check_run", check_run)

    def pointers(self):
        """q, k, v, out and lse of the last launch."""
        return struct.unpack_from("5P", self.launches[-1][2])

    def served(self, call):
        """A call's result, and whether it went straight to the launch."""
        before = self.checked
        result = call()
        return result, self.checked == before


@pytest.fixture
def runs(monkeypatch):
    caches = (
        attention_launch.prepare_attention,
        attention_launch._planned,
        attention_launch._kernel,
    )  # of stubs' kernels
    for x in caches:
        x.cache_clear()
    yield Runs(monkeypatch, stub_runtime.install(monkeypatch)[1])
    for x in caches:
        x.cache_clear()


def zeros(*shape, dtype=torch.float16):
    return torch.zeros(shape, dtype=dtype)


def decode():
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(zeros(1 << 20, dtype=torch.uint8))
    wrapper.plan(*TABLE, *HEADS, DIM, PAGE)
    return wrapper


def cache(combined=True):
    both = zeros(PAGES, 2, PAGE, 2, DIM)
    return both if combined else (both[:, 0].contiguous(), both[:, 1].contiguous())


@pytest.mark.cpu
@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("given_out", [True, False])
@pytest.mark.parametrize("lse", ["none", "own", "given"])
def test_addresses_follow_the_tensors(runs, combined, given_out, lse):
    wrapper = decode()
    for step in range(4):
        q, kv = zeros(3, 8, DIM), cache(combined)
        out = zeros(3, 8, DIM) if given_out else None
        own = zeros(3, 8, dtype=torch.float32) if lse == "given" else None
        got, straight = runs.served(
            lambda: wrapper.run(q, kv, out=out, lse=own, return_lse=lse != "none", v_scale=0.5)  # noqa: B023
        )
        assert straight == (step > 0)
        first, second = got if lse != "none" else (got, None)
        assert not given_out or first is out
        assert lse != "given" or second is own
        assert first.shape == q.shape and first.dtype is q.dtype and first.is_contiguous()
        assert second is None or (second.shape == (3, 8) and second.dtype is torch.float32)
        k, v = (kv[:, 0], kv[:, 1]) if combined else kv
        wanted = (q, k, v, first)
        assert runs.pointers() == (*[x.data_ptr() for x in wanted], 0 if second is None else second.data_ptr())
    first, *later = [data for _, _, data, *_ in runs.launches]
    assert all(data[40:] == first[40:] for data in later)  # all but the pointers


@pytest.mark.cpu
def test_anything_else_takes_the_full_path(runs):
    wrapper, q, kv = decode(), zeros(3, 8, DIM), cache()
    k, v = cache(False)
    wrapper.run(q, kv)
    odd = zeros(q.numel() + 1)[1:].view(q.shape)  # 2 bytes off a 16-byte boundary
    strided = zeros(3, 8, 2 * DIM)[..., :DIM]
    for args, options in [
        ((torch.nn.Parameter(q.clone()), kv), {}),
        ((odd, kv), {}),
        ((strided, kv), {}),
        ((q, (k, v)), {}),
        ((q, zeros(PAGES + 1, 2, PAGE, 2, DIM)), {}),
        ((q, kv), {"out": strided}),
        ((q, kv), {"return_lse": True}),
        ((q, kv), {"v_scale": 0.5}),
        ((q, kv), {"k_scale": 2}),
        ((q, kv), {"enable_pdl": False}),
        ((q, kv), {"window_left": -1}),
        ((q, kv), {"q_scale": torch.tensor(2.0)}),
        ((q, kv), {"sinks": zeros(8, dtype=torch.float32)}),
        ((q, kv), {"lse": zeros(3, 8, dtype=torch.float32)}),
    ]:
        assert not runs.served(lambda: wrapper.run(*args, **options))[1], options  # noqa: B023
        assert runs.served(lambda: wrapper.run(q, kv))[1]
    for args, options in [
        ((q[:2], kv), {}),
        ((q.float(), kv), {}),
        ((q, kv[:4]), {}),
        ((q, kv.float()), {}),
        ((q, [k, v]), {}),
        ((q, (k, v, v)), {}),
        ((q, kv), {"out": zeros(3, 8, DIM, dtype=torch.float32)}),
        ((q, kv), {"lse": zeros(3, 8), "return_lse": True}),
        ((q, kv), {"k_scale": zeros(3)}),
        ((q, kv), {"k_scale": [1.0]}),
        ((q, kv), {"window_left": 3}),
        ((q, kv, 1.0), {}),
        ((q.numpy(), kv), {}),
    ]:
        with pytest.raises((TypeError, ValueError), match="BatchDecodeWithPagedKVCacheWrapper"):
            wrapper.run(*args, **options)
        assert runs.served(lambda: wrapper.run(q, kv))[1]


@pytest.mark.cpu
def test_nothing_is_remembered_of_values_in_tensors(runs):
    """A scale in a tensor may change in place."""
    wrapper, q, kv, scale = decode(), zeros(3, 8, DIM), cache(), torch.tensor(2.0)
    seen = set()
    for value in (2.0, 3.0, 3.0):
        scale.fill_(value)
        assert not runs.served(lambda: wrapper.run(q, kv, v_scale=scale))[1]
        seen.add(runs.launches[-1][2][40:])
    assert len(seen) == 2


@pytest.mark.cpu
def test_a_new_plan_starts_over(runs):
    wrapper, q, kv = decode(), zeros(3, 8, DIM), cache()
    for _ in range(2):
        wrapper.run(q, kv)
    wrapper.plan([0, 1, 2, 3], *TABLE[1:], *HEADS, DIM, PAGE)
    assert not runs.served(lambda: wrapper.run(q, kv))[1] and runs.served(lambda: wrapper.run(q, kv))[1]
    with pytest.warns(DeprecationWarning):
        wrapper.forward(q, kv, sm_scale=2.0)  # replaces a part of the plan
    assert runs.checked == 3


@pytest.mark.cpu
def test_pages_are_checked_against_each_cache(runs):
    """A plan that names a page outside the cache is refused, also where the same cache was good for the plan before."""
    wrapper, q, kv = decode(), zeros(3, 8, DIM), cache()
    for _ in range(2):
        wrapper.run(q, kv)
    wrapper.plan(TABLE[0], [*range(8), 9], TABLE[2], *HEADS, DIM, PAGE)
    with pytest.raises(ValueError, match="names a page outside the cache"):
        wrapper.run(q, kv)


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["decode", "sink wrapper"])
def test_sinks_are_bound_by_address(runs, name):
    q, kv, sinks = zeros(3, 8, DIM), cache(), zeros(8, dtype=torch.float32)
    if name == "decode":
        wrapper = decode()
        call = lambda x, **options: wrapper.run(q, kv, sinks=x, **options)  # noqa: E731
    else:
        wrapper = pyinfer.BatchAttentionWithAttentionSinkWrapper(
            q_data_type="float16", kv_data_type="float16", head_dim_qk=DIM, head_dim_vo=DIM
        )
        wrapper.plan([0, 1, 2, 3], *TABLE, *HEADS, page_size=PAGE)
        call = lambda x, **options: wrapper.run(q, kv, x, **options)  # noqa: E731
    other, bound = zeros(8, dtype=torch.float32), []
    for x, straight in ((sinks, False), (sinks, True), (other, False), (sinks, True), (other, True)):
        assert runs.served(lambda: call(x))[1] == straight  # noqa: B023
        assert struct.pack("P", x.data_ptr()) in runs.launches[-1][2]
    if name == "sink wrapper":  # sm_scale is run()'s as well
        for scale, straight in ((0.5, False), (0.5, True), (None, True), (0.25, False), (torch.tensor(0.5), False)):
            assert runs.served(lambda: call(sinks, sm_scale=scale))[1] == straight  # noqa: B023
            bound.append(runs.launches[-1][2][40:])
        assert bound[0] == bound[1] == bound[4] and len(set(bound)) == 3


@pytest.mark.cpu
def test_ragged_keys(runs):
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(zeros(1 << 20, dtype=torch.uint8))
    wrapper.plan([0, 2, 5], [0, 4, 9], *HEADS, DIM, causal=True)
    for step in range(3):
        q, k, v = zeros(5, 8, DIM), zeros(9, 2, DIM), zeros(9, 2, DIM)
        out, straight = runs.served(lambda: wrapper.run(q, k, v))  # noqa: B023
        assert straight == (step > 0) and runs.pointers() == (*[x.data_ptr() for x in (q, k, v, out)], 0)
    both = zeros(9, 2, DIM)
    assert not runs.served(lambda: wrapper.run(q, both, both))[1]  # one tensor twice
    with pytest.raises(ValueError, match="k is shorter than the plan"):
        wrapper.run(q, k[:8], v[:8])


@pytest.mark.cpu
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("lse", ["none", "own", "given"])
def test_mla(runs, monkeypatch, arch, lse):
    from pyinfer.core import device, tensormap
    from pyinfer.jit import mla, mla_sm90

    def named(address, *layout):
        """A tensor map that says whose it is."""
        return struct.pack("Q", address).ljust(128)

    caches = (mla_sm90.prepare_mla_sm90, mla_sm90._kernel, mla.prepare_mla, mla._kernel, tensormap.table)
    for x in caches:
        x.cache_clear()
    monkeypatch.setattr(tensormap, "encode", named)
    monkeypatch.setattr(device, "arch_number_of", lambda index: arch)
    views = []
    original = _paged_mla.PagedMla._tensor
    monkeypatch.setattr(
        _paged_mla.PagedMla, "_tensor", lambda self, *args: views.append(args[0]) or original(self, *args)
    )
    wrapper = pyinfer.BatchMLAPagedAttentionWrapper(zeros(1 << 20, dtype=torch.uint8))
    wrapper.plan([0, 1, 2], [0, 1, 3], [0, 1, 2], [5, 20], 16, 512, 64, PAGE, True, 0.1, "float16", "float16")
    for step in range(4):
        q, kv = zeros(2, 16, 576), zeros(PAGES, PAGE, 576)
        parts = (q[..., :512], q[..., 512:], kv[..., :512], kv[..., 512:])
        out = zeros(2, 16, 512) if step % 2 else None
        own = zeros(2, 16, dtype=torch.float32) if lse == "given" else None
        views.clear()
        got = wrapper.run(*parts, out=out, lse=own, return_lse=lse != "none")
        assert bool(views) == (step < 2)
        first, second = got if lse != "none" else (got, None)
        assert (out is None or first is out) and (own is None or second is own)
        assert first.shape == (2, 16, 512) and (second is None or second.dtype is torch.float32)
        name, _, data, *_ = runs.launches[-1]
        at = [x.data_ptr() for x in (*parts, first)] + [0 if second is None else second.data_ptr()]
        if arch == 80:
            assert "mla_sm80" in name and struct.unpack_from("6P", data) == tuple(at)
        else:
            assert "mla_sm90" in name and struct.unpack_from("4P", data) == (at[0], at[1], at[4], at[5])
            assert data[64:320] == named(at[2]) + named(at[3])
    for x in caches:
        x.cache_clear()


@pytest.fixture
def single(runs, monkeypatch):
    """`runs`, with CPU tensors taken for those of cuda:0 by the functions of one request."""
    _single_calls.calls.clear()
    monkeypatch.setattr(_single_calls, "_device", lambda q: 0)
    checked = []
    original = attention_launch.launch_single
    monkeypatch.setattr(attention_launch, "launch_single", lambda *a, **k: checked.append(1) or original(*a, **k))
    _attention.launchers.cache_clear()
    yield runs, checked
    _single_calls.calls.clear()
    _attention.launchers.cache_clear()


@pytest.mark.cpu
@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize("return_lse", [True, False])
def test_single_requests(single, name, return_lse):
    """The second of two like calls is kept; another length, scale, stream or address modulo 16 is another call."""
    runs, checked = single

    def call(length=40, rows=5, **options):
        q, k, v = (
            zeros(8, DIM) if name == "decode" else zeros(rows, 8, DIM),
            zeros(length, 2, DIM),
            zeros(length, 2, DIM),
        )
        checked.clear()
        function = getattr(pyinfer, f"single_{name}_with_kv_cache")
        got = function(q, k, v, return_lse=return_lse, **options)
        out, lse = got if return_lse else (got, None)
        assert out.shape == q.shape and (lse is None or lse.shape == q.shape[:-1])
        assert runs.pointers() == tuple(addresses(q, k, v, out, lse))
        return not checked

    assert [call() for _ in range(4)] == [False, False, True, True]
    assert [call(length) for length in (41, 42, 41, 41, 41)] == [False, False, False, False, True]
    assert call() and not call(sm_scale=0.5) and not call(sm_scale=0.5) and call(sm_scale=0.5)
    data = runs.launches[-1][2]
    assert call() and data != runs.launches[-1][2]
    scale = "k_scale"
    assert not any(call(**{scale: torch.tensor(2.0)}) for _ in range(3))
    if name == "prefill":
        assert not any(call(custom_mask=torch.ones(5, 40, dtype=torch.bool)) for _ in range(3))


@pytest.mark.cpu
def test_single_requests_on_two_streams(single, monkeypatch):
    """Partial results are a stream's own."""
    runs, _ = single
    q, k = zeros(8, DIM), zeros(4000, 2, DIM)
    seen = {}
    for stream in (1, 1, 2, 2, 1, 2):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device, stream=stream: stream, raising=False)
        pyinfer.single_decode_with_kv_cache(q, k, k)
        assert runs.launches[-1][3] == stream
        workspace = struct.unpack_from("3P", runs.launches[-1][2], 48)
        assert seen.setdefault(stream, workspace) == workspace and all(workspace)
    assert seen[1] != seen[2]


@pytest.fixture
def fused(runs, monkeypatch):
    """`runs`, and the kernel of both kinds of block looked up anew."""
    from pyinfer.core import device
    from pyinfer.jit import pod

    monkeypatch.setattr(device, "arch_number_of", lambda index: 80)
    pod.device_pod.cache_clear()
    yield runs
    pod.device_pod.cache_clear()


def fused_pointers(runs, dim=DIM):
    """The ten addresses of the last launch."""
    from pyinfer.core.dtypes import FLOAT16
    from pyinfer.jit import pod

    spec = pod.device_pod(0, FLOAT16, dim, "plan", "plain")[1]
    found = stub_driver.fields(spec.spec.params, runs.launches[-1][2])
    return [found[f"{part}_{name}"] for part in ("prefill", "decode") for name in ("q", "k", "v", "out", "lse")]


def addresses(*tensors):
    return [0 if x is None else x.data_ptr() for x in tensors]


@pytest.mark.cpu
@pytest.mark.parametrize("combined", [True, False])
def test_batch_attention(fused, monkeypatch, combined):
    seen = []
    original = pyinfer.BatchAttention._caches
    monkeypatch.setattr(pyinfer.BatchAttention, "_caches", lambda self, *args: seen.append(1) or original(self, *args))
    wrapper = pyinfer.BatchAttention()
    table = ([0, 1, 41], [0, 2, 5], [0, 1, 2, 3, 4], [20, 40], *HEADS, DIM, DIM, PAGE, True)
    for step in range(6):
        if step in (0, 4):
            wrapper.plan(*table, q_data_type="float16", kv_data_type="float16")
        q, kv = zeros(41, 8, DIM), cache(combined)
        given = [zeros(41, 8, DIM), zeros(41, 8, dtype=torch.float32)] if step in (2, 3) else [None, None]
        seen.clear()
        got = wrapper.run(q, kv, *given)
        assert bool(seen) == (step in (0, 2, 4))
        assert all(want is None or x is want for x, want in zip(got, given, strict=True))
        k, v = (kv[:, 0], kv[:, 1]) if combined else kv
        assert fused_pointers(fused) == 2 * addresses(q, k, v, *got)
        assert got[0].shape == q.shape and got[1].dtype is torch.float32
    with pytest.raises(ValueError, match="profiler_buffer is not available"):
        wrapper.run(q, kv, *given, profiler_buffer=1)


@pytest.mark.cpu
@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("return_lse", [True, False])
def test_batch_pod(fused, combined, return_lse):
    wrapper = pyinfer.BatchPODWithPagedKVCacheWrapper(zeros(1 << 20, dtype=torch.uint8))
    for step in range(6):
        if step in (0, 4):
            wrapper.plan([0, 20, 41, 60], *TABLE, [0, 1, 2, 3], *TABLE, *HEADS, DIM, PAGE)
        (q_p, kv_p), (q_d, kv_d) = (zeros(60, 8, DIM), cache(combined)), (zeros(3, 8, DIM), cache(combined))
        before = fused.checked
        outs = wrapper.run(q_p, kv_p, q_d, kv_d, causal_p=step > 1, return_lse=return_lse)
        assert (fused.checked == before) == (step in (1, 3, 5))
        outs, lses = outs if return_lse else (outs, (None, None))
        assert outs[0].shape == q_p.shape and outs[1].shape == q_d.shape
        both = [(q, *((kv[:, 0], kv[:, 1]) if combined else kv)) for q, kv in ((q_p, kv_p), (q_d, kv_d))]
        wanted = [addresses(*x, out, lse) for x, out, lse in zip(both, outs, lses, strict=True)]
        assert fused_pointers(fused) == wanted[0] + wanted[1]


@pytest.mark.cpu
@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("lse", [(False, False), (True, False), (False, True), (True, True)])
def test_pod(fused, monkeypatch, combined, lse):
    """One request and a batch: the second of two like calls is kept, until plan()."""
    from pyinfer.core.dtypes import FLOAT16
    from pyinfer.jit import pod

    monkeypatch.setattr(_single_calls, "_device", lambda q: 0)
    wrapper = pyinfer.PODWithPagedKVCacheWrapper(zeros(1 << 20, dtype=torch.uint8))
    for step in range(8):
        if step in (0, 4):
            wrapper.plan(*TABLE, *HEADS, DIM, PAGE)
        (q_p, k_p, v_p), q_d, kv = (
            (zeros(20, 8, DIM), zeros(30, 2, DIM), zeros(30, 2, DIM)),
            zeros(3, 8, DIM),
            cache(combined),
        )
        before = fused.checked
        got = wrapper.run(q_p, k_p, v_p, q_d, kv, causal_p=True, return_lse_p=lse[0], return_lse_d=lse[1])
        assert (fused.checked == before) == (step in (2, 3, 5, 6, 7))
        (out_p, lse_p), (out_d, lse_d) = (x if wanted else (x, None) for x, wanted in zip(got, lse, strict=True))
        assert out_p.shape == q_p.shape and out_d.shape == q_d.shape
        assert [x is None or x.shape == out.shape[:2] for x, out in ((lse_p, out_p), (lse_d, out_d))] == [True, True]
        spec = pod.device_pod(0, FLOAT16, DIM, "single", "plain")[1]
        found = stub_driver.fields(spec.spec.params, fused.launches[-1][2])
        names = [f"{part}_{name}" for part in ("prefill", "decode") for name in ("q", "k", "v", "out", "lse")]
        k_d, v_d = (kv[:, 0], kv[:, 1]) if combined else kv
        assert [found[n] for n in names] == addresses(q_p, k_p, v_p, out_p, lse_p, q_d, k_d, v_d, out_d, lse_d)
    assert not isinstance(wrapper.run(q_p, k_p, v_p, q_d, kv, causal_p=True)[0], tuple)
    with pytest.raises(ValueError, match="kv_layout_d differs from the plan"):
        wrapper.run(q_p, k_p, v_p, q_d, kv, causal_p=True, kv_layout_d="HND")


@pytest.mark.gpu
@pytest.mark.parametrize("combined", [True, False])
@pytest.mark.parametrize("return_lse", [True, False, "given"])
def test_same_bits_as_the_full_path(rng, monkeypatch, combined, return_lse):
    runs = Runs(monkeypatch, [])
    order = np.random.default_rng(1).permutation(PAGES).astype(np.int32)

    def filled():
        both = torch.randn(PAGES, 2, PAGE, 2, DIM, device="cuda", dtype=torch.bfloat16)
        return both if combined else (both[:, 0].contiguous(), both[:, 1].contiguous())

    def plan(wrapper):
        wrapper.plan(TABLE[0], order, TABLE[2], *HEADS, DIM, PAGE, q_data_type="bfloat16")
        return wrapper

    def make():
        return plan(pyinfer.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8, device="cuda")))

    wrapper = make()
    for step in range(6):
        if step == 4:  # a new plan starts over
            plan(wrapper)
        q, kv = torch.randn(3, 8, DIM, device="cuda", dtype=torch.bfloat16), filled()
        out = torch.full_like(q, float("nan")) if step % 2 else None
        lse = torch.full((3, 8), float("nan"), device="cuda") if return_lse == "given" else None
        got, straight = runs.served(lambda: wrapper.run(q, kv, out=out, lse=lse, return_lse=bool(return_lse)))  # noqa: B023
        assert straight == (step in (2, 3)) and (lse is None or got[1] is lse)
        want = make().run(q, kv, return_lse=bool(return_lse))
        for a, b in zip(got, want, strict=True) if return_lse else ((got, want),):
            assert_same_bits(a.float().cpu().numpy(), b.float().cpu().numpy())


@pytest.mark.gpu
def test_sinks_same_bits(rng, monkeypatch):
    runs = Runs(monkeypatch, [])

    def make():
        wrapper = pyinfer.BatchAttentionWithAttentionSinkWrapper(head_dim_qk=DIM, head_dim_vo=DIM)
        wrapper.plan([0, 1, 2, 3], *TABLE, *HEADS, page_size=PAGE, causal=True)
        return wrapper

    wrapper, kv = make(), torch.randn(PAGES, 2, PAGE, 2, DIM, device="cuda", dtype=torch.bfloat16)
    sinks = [torch.randn(8, device="cuda") for _ in range(2)]
    for step in range(5):
        q = torch.randn(3, 8, DIM, device="cuda", dtype=torch.bfloat16)
        got, straight = runs.served(lambda: wrapper.run(q, kv, sinks[step % 2]))  # noqa: B023
        assert straight == (step > 1)
        assert_same_bits(got.float().cpu().numpy(), make().run(q, kv, sinks[step % 2]).float().cpu().numpy())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "prefill"])
def test_single_requests_same_bits(rng, monkeypatch, name):
    function, rows = getattr(pyinfer, f"single_{name}_with_kv_cache"), () if name == "decode" else (130,)
    launched = []
    original = attention_launch.launch_single
    monkeypatch.setattr(attention_launch, "launch_single", lambda *a, **k: launched.append(1) or original(*a, **k))
    _attention.launchers.cache_clear()
    _single_calls.calls.clear()
    random = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    inputs = [(random(*rows, 8, 128), random(n, 2, 128), random(n, 2, 128)) for n in (5000, 5000, 5000, 5001, 5000)]
    got, straight = [], []
    for x in inputs:
        launched.clear()
        got.append(function(*x, return_lse=True))
        straight.append(not launched)
    assert straight == [False, False, True, False, True]
    for x, results in zip(inputs, got, strict=True):
        _single_calls.calls.clear()
        for a, b in zip(results, function(*x, return_lse=True), strict=True):
            assert_same_bits(a.float().cpu().numpy(), b.float().cpu().numpy())
    _attention.launchers.cache_clear()
