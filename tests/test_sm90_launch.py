"""The host side of the sm90 prefill kernel: when it is chosen, what it is launched with, and that the kernels compile. No GPU needed."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from pyinfer.core import tensormap
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.params import ParamStruct, i32, ptr, tensor_map
from pyinfer.jit import attention_launch, attention_sm90
from pyinfer.jit.attention_options import PLAIN, AttentionOptions
from pyinfer.schedulers.prefill import prefill_plan
from tests import stub_driver

pytestmark = pytest.mark.cpu  # a stub stands for the driver, whatever architecture a GPU here is built for


def fake_map(address, dtype, shape, strides, box):
    """A map whose bytes say what it was made of."""
    text = repr((address, dtype.name, shape, strides, box)).encode()
    return struct.pack("Q", address) + text[:120].ljust(120)


@pytest.fixture
def hopper(monkeypatch):
    """cuda:0 is a Hopper GPU with the family switched on, and launches are recorded."""
    pytest.importorskip("torch")
    submitted = stub_driver.install(monkeypatch)
    monkeypatch.delenv("PYINFER_SM90", raising=False)
    monkeypatch.setattr(tensormap, "encode", fake_map)
    caches = (
        attention_sm90.enabled,
        attention_sm90.kernel_of,
        attention_launch.hopper_config,
        attention_launch.chosen_config,
        attention_launch.device_config,
        attention_launch.prepare_attention,
        attention_launch._planned,
        attention_launch._kernel,
        tensormap.table,
    )
    from pyinfer.core import device, workspace

    monkeypatch.setattr(device, "arch_number_of", lambda index: 90)
    monkeypatch.setattr(workspace.DeviceBuffer, "reserve", lambda self, nbytes, *, zero=False: 1 << 30)
    for cache in caches:
        cache.cache_clear()
    yield submitted
    for cache in caches:
        cache.cache_clear()


def run_plan(torch, page_size=0, dim=128, dtype=None, bind=False, layout="NHD", out_dtype=None, offset=0):
    """One launch of a two-request plan. Returns (launches' bound or None, plan, tensors)."""
    from pyinfer.core.tensor import view

    dtype = dtype or torch.bfloat16
    if page_size:
        pages = [5, 9]
        kv_indptr, last = np.array([0, *np.cumsum(pages)], np.int32), np.array([1, page_size], np.int32)
        shape = (20, page_size, 2, dim) if layout == "NHD" else (20, 2, page_size, dim)
    else:
        kv_indptr, last = np.array([0, 50, 350], np.int32), None
        shape = (350, 2, dim)
    indices = None if not page_size else np.arange(14, dtype=np.int32)
    q = torch.zeros(80, 8, dim, dtype=dtype)
    k = torch.zeros(int(np.prod(shape)) + 8, dtype=dtype)[offset : offset + int(np.prod(shape))].view(shape)
    v = torch.zeros(shape, dtype=dtype)
    out = torch.zeros(80, 8, dim, dtype=out_dtype or dtype)
    plan = prefill_plan(
        np.array([0, 30, 80], np.int32), kv_indptr, indices, last, num_qo_heads=8, num_kv_heads=2, head_dim_qk=dim, page_size=page_size,
        tile_q=128, tile_kv=128, num_sms=132, ctas_per_sm=1, causal=True,
    )  # fmt: skip
    bound = attention_launch.launch_attention(
        0, 7, 1 << 20, plan, view(q), view(k), view(v), (1 << 20) + 4 * plan.offsets.kv_indices, layout, view(out), None, 1 << 30,
        sm_scale=0.1, bind=bind,
    )  # fmt: skip
    return bound, plan, (q, k, v, out)


@pytest.mark.parametrize("page_size", [0, 8, 16, 48, 256])
def test_plan_launch(hopper, page_size):
    import torch

    _, plan, (q, k, v, out) = run_plan(torch, page_size)
    name, grid, data, *_ = hopper.pop()
    assert name.startswith("prefill_sm90_bf16_d128_plan_plain_q128_kv128") and grid == (2 * plan.n_work, 1, 1)
    found = stub_driver.fields(attention_sm90.sm90_params("plan"), data)
    assert [found[n] for n in ("q", "k", "v", "out")] == [x.data_ptr() for x in (q, k, v, out)]
    rows = {0: 128, 8: 8, 16: 16, 48: 16, 256: 128}[page_size]
    assert found["box_rows"] == rows and found["page_size"] == page_size
    shape, strides = (128, page_size, 2, 20), (256, 128, 256 * page_size)
    if not page_size:
        shape, strides = (128, 350, 2, 1), (256, 128, 0)
    assert found["k_map"] == fake_map(k.data_ptr(), BFLOAT16, shape, strides, (64, rows, 1, 1))
    assert found["v_map"] == fake_map(v.data_ptr(), BFLOAT16, shape, strides, (64, rows, 1, 1))
    assert found["q_map"] == fake_map(q.data_ptr(), BFLOAT16, (128, 8, 80, 1), (128, 1024, 0), (64, 4, 16, 1))
    assert found["o_map"] == fake_map(out.data_ptr(), BFLOAT16, (128, 8, 80, 1), (128, 1024, 0), (64, 4, 16, 1))
    assert found["boxed"] == 3 and found["heads_at_once"] == 2
    assert found["q_stride_token"] == 1024 and found["q_stride_head"] == 128 and found["out_stride_token"] == 1024
    assert found["logit_scale"] == pytest.approx(0.1 * 1.4426950408889634) and found["v_scale"] == 1.0
    assert found["num_kv_heads"] == 2 and found["group"] == 4 and found["causal"] == 1 and found["window_left"] == -1
    assert found["plan_header"] == 1 << 20 and found["semaphore"] == (1 << 20) + 4 * plan.offsets.semaphore
    assert found["partial_o"] == 1 << 30


@pytest.mark.parametrize("page_size", [1, 5, 20])
def test_pages_without_boxes(hopper, page_size):
    """Rows are gathered: no tensor maps, the strides instead."""
    import torch

    _, plan, (_, k, v, _) = run_plan(torch, page_size)
    name, grid, data, *_ = hopper.pop()
    assert name.startswith("prefill_sm90_bf16_d128_plan_plain_q128_kv96_s3_q2_gather") and grid == (
        2 * plan.n_work,
        1,
        1,
    )
    found = stub_driver.fields(attention_sm90.sm90_params("plan"), data)
    assert found["k_map"] == found["v_map"] == bytes(128) and found["box_rows"] == 1
    assert (found["k"], found["v"], found["page_size"]) == (k.data_ptr(), v.data_ptr(), page_size)
    assert tuple(found[f"k_stride_{n}"] for n in ("page", "token", "head")) == (256 * page_size, 256, 128)


def test_hnd_strides(hopper):
    import torch

    _, _, (_, k, *_) = run_plan(torch, 16, layout="HND")
    found = stub_driver.fields(attention_sm90.sm90_params("plan"), hopper.pop()[2])
    assert found["k_map"] == fake_map(k.data_ptr(), BFLOAT16, (128, 16, 2, 20), (128, 2048, 4096), (64, 16, 1, 1))


def test_single_launch(hopper):
    import torch

    import pyinfer

    q, k, v = (torch.zeros(n, h, 64, dtype=torch.float16) for n, h in ((5000, 8), (5000, 4), (5000, 4)))
    pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True, logits_soft_cap=30.0)
    name, grid, data, *_ = hopper.pop()
    assert name.startswith("prefill_sm90_f16_d64_single_softcap") and grid == (132, 1, 1)  # of 53 * 4 items
    found = stub_driver.fields(attention_sm90.sm90_params("single"), data)
    assert (found["qo_len"], found["kv_len"], found["num_splits"], found["kv_indices"]) == (5000, 5000, 1, 0)
    assert found["k_map"] == fake_map(
        k.data_ptr(), FLOAT16, (64, 5000, 4, 1), (256, 64, 0), (64, 96, 1, 1)
    )  # capped logits: fewer keys


@pytest.mark.parametrize("case", [dict(dim=56), dict(offset=1)])
def test_falls_back(hopper, case):
    """What the kernel does not cover runs on the sm80 kernel, with the same plan."""
    import torch

    run_plan(torch, **case)
    assert hopper.pop()[0].startswith("prefill_sm80")


@pytest.mark.parametrize(("out_dtype", "boxed"), [("float16", 3), ("float32", 1)])
def test_output_dtype(hopper, out_dtype, boxed):
    """Output of another dtype than q's is a kernel of this family too; float32 leaves without boxes."""
    import torch

    *_, (_, _, _, out) = run_plan(torch, out_dtype=getattr(torch, out_dtype))
    name, _, data, *_ = hopper.pop()
    short = {"float16": "f16", "float32": "f32"}[out_dtype]
    assert name.startswith("prefill_sm90_bf16_d128_plan_plain") and name.endswith(f"_{short}out")
    found = stub_driver.fields(attention_sm90.sm90_params("plan"), data)
    wanted = fake_map(out.data_ptr(), FLOAT16, (128, 8, 80, 1), (128, 1024, 0), (64, 4, 16, 1))
    assert found["boxed"] == boxed and found["o_map"] == (wanted if boxed & 2 else bytes(128))


def test_heads_at_once():
    """As many as L2 holds the keys and values of, at least one, in turns of equal size."""
    config = attention_sm90.candidates(128)[0]
    assert [attention_sm90.heads_at_once(config, 8, n) for n in (0, 1000, 4096, 8192, 16384, 1 << 30)] == [
        8,
        8,
        8,
        8,
        4,
        1,
    ]


def test_order_of_heads():
    """The kernel's `work_of` takes every (item, head) once, in sections of heads."""
    text = (Path(__file__).parent.parent / "cuda_src" / "prefill" / "sm90_work.cu.jinja").read_text()
    body = text[text.index("int first_head = 0;") : text.index("Ring<WORKS> at;\n    bool more")]
    beyond, step = re.search(r"while \((.+?)\) \{\s+first_head \+= (.+?);", body).groups()
    lines = re.findall(r"const int (\w+) = (.+?);", body)
    assert "planned_work(p, item, kv_head)" in body and "single_work<TILE_Q>(p, item, kv_head)" in body
    for items, num_kv_heads, at_once in ((1, 1, 1), (7, 8, 3), (5, 8, 8), (4, 6, 1), (3, 5, 2)):
        order = []
        scope = dict(heads_at_once=at_once, num_kv_heads=num_kv_heads, items=items, min_of=min, first_head=0)

        def value(code, scope=scope):
            return eval(code.replace("p.", "").replace("/", "//"), {}, scope)

        for index in range(items * num_kv_heads):
            scope["index"] = index
            while value(beyond):
                scope["first_head"] += value(step)
            for name, code in lines:
                scope[name] = value(code)
            order.append((scope["item"], scope["kv_head"]))
        assert sorted(order) == [(i, h) for i in range(items) for h in range(num_kv_heads)]
        sections = [h // at_once for _, h in order]
        assert sections == sorted(sections)
        for section in set(sections):
            own = [i for (i, _), s in zip(order, sections, strict=True) if s == section]
            assert own == sorted(own)


@pytest.mark.parametrize(("heads", "group"), [(6, 3), (10, 5), (256, 128)])
def test_groups_that_are_no_boxes(hopper, heads, group):
    """64 packed rows then end within a token: queries come, and outputs leave, row by row."""
    import torch

    import pyinfer

    q, k, v = (torch.zeros(70, h, 64, dtype=torch.float16) for h in (heads, heads // group, heads // group))
    pyinfer.single_prefill_with_kv_cache(q, k, v)
    name, _, data, *_ = hopper.pop()
    found = stub_driver.fields(attention_sm90.sm90_params("single"), data)
    assert name.startswith("prefill_sm90") and found["boxed"] == 0 and found["q_map"] == found["o_map"] == bytes(128)


def test_bound_launch_follows_addresses(hopper):
    import torch

    bound, _, (_, k, *_) = run_plan(torch, 16, bind=True)  # 80 queries of 8 heads
    for addresses in ((16, 32, 48, 64, 0), (16, 1 << 36, 48, 64, 0), (32, 1 << 36, 1 << 37, 64, 128)):
        bound(7, *addresses)
        found = stub_driver.fields(attention_sm90.sm90_params("plan"), hopper.pop()[2])
        assert tuple(found[n] for n in ("q", "k", "v", "out", "lse")) == addresses
        for name, address in (("k_map", addresses[1]), ("v_map", addresses[2])):
            assert found[name] == fake_map(
                address, BFLOAT16, (128, 16, 2, 20), tuple(k.stride()[i] for i in (1, 2, 0)), (64, 16, 1, 1)
            )
        for name, address in (("q_map", addresses[0]), ("o_map", addresses[3])):
            assert found[name] == fake_map(address, BFLOAT16, (128, 8, 80, 1), (128, 1024, 0), (64, 4, 16, 1))


def test_choice(monkeypatch):
    attention_sm90.enabled.cache_clear()
    monkeypatch.setenv("PYINFER_SM90", "0")
    assert attention_sm90.config_for(90, BFLOAT16, 128, 128, 1000) is None
    attention_sm90.enabled.cache_clear()
    monkeypatch.delenv("PYINFER_SM90")
    chosen = attention_sm90.config_for
    assert chosen(90, BFLOAT16, 128, 128, 65).tile_q == 128
    assert (
        chosen(90, FLOAT16, 64, 64, 1000, FLOAT16, AttentionOptions(sinks=True)) is not None
    )  # planned alike, run by sm80
    for arch in (80, 89, 100, 120):
        assert chosen(arch, BFLOAT16, 128, 128, 1000) is None
    for case in (
        (FLOAT32, 128, 128, 1000),
        (BFLOAT16, 264, 264, 1000),
        (BFLOAT16, 128, 56, 1000),
        (BFLOAT16, 100, 100, 1000),
        (BFLOAT16, 128, 128, 64),
    ):
        assert chosen(90, *case) is None
    assert chosen(90, BFLOAT16, 128, 128, 1000, FLOAT16) is None
    assert chosen(90, BFLOAT16, 128, 128, 1000, None, AttentionOptions(rope=(1.0, 1e4))) is None
    plain, masked = (chosen(90, BFLOAT16, 128, 128, 1000, None, AttentionOptions(mask=m)) for m in (False, True))
    assert masked.tile_kv < plain.tile_kv and masked.tile_q == plain.tile_q
    assert [chosen(90, BFLOAT16, *d, 1000).head_dim_vo for d in ((192, 128), (256, 256), (96, 96))] == [128, 256, 96]
    attention_sm90.enabled.cache_clear()


def test_asked_for_but_not_covered():
    config = attention_sm90.candidates(128)[0]
    from pyinfer.core.tensor import view

    x = view(np.zeros((4, 2, 128), np.float16))
    with pytest.raises(ValueError, match=r"attention: config cannot run this call: got q192_kv80_s2"):
        attention_sm90.check(config, x, x, x, x, "NHD", 1, PLAIN, True)


def single(torch, backend, rows=300, dim=64, **options):
    import pyinfer

    q, k, v = (torch.zeros(n, h, dim, dtype=torch.float16) for n, h in ((rows, 8), (60, 4), (60, 4)))
    return pyinfer.single_prefill_with_kv_cache(q, k, v, backend=backend, **options)


def test_backend_chooses_the_family(hopper):
    import torch

    import pyinfer

    for backend, rows, name in (
        ("auto", 300, "prefill_sm90"), ("auto", 20, "prefill_sm80"), ("fa2", 300, "prefill_sm80"), ("fa3", 300, "prefill_sm90"), ("fa3", 20, "prefill_sm90"),
    ):  # fmt: skip
        single(torch, backend, rows)
        assert hopper.pop()[0].startswith(name), (backend, rows)
    no_kernel = "attention: backend has no kernel for this case: got 'fa3', wanted a Hopper GPU, float16 or bfloat16"
    with pytest.raises(ValueError, match=no_kernel):
        single(torch, "fa3", pos_encoding_mode="ROPE_LLAMA")
    with pytest.raises(ValueError, match=no_kernel):
        single(torch, "fa3", dim=48)
    q, k = torch.zeros(300, 8, 64, dtype=torch.float16), torch.zeros(60 * 4 * 64 + 1, dtype=torch.float16)
    with pytest.raises(
        ValueError,
        match="attention: backend has no kernel for these tensors: got 'fa3', wanted k and v of q's dtype, all aligned",
    ):
        pyinfer.single_prefill_with_kv_cache(q, k[1:].view(60, 4, 64), k[:-1].view(60, 4, 64), backend="fa3")
    assert not hopper
    single(torch, "fa3", o_dtype="float32")
    assert hopper.pop()[0].endswith("_f32out")
    decode = "BatchDecodeWithPagedKVCacheWrapper: backend has no kernel here: got 'fa3', wanted 'auto' or 'fa2'"
    with pytest.raises(ValueError, match=decode):
        pyinfer.BatchDecodeWithPagedKVCacheWrapper(backend="fa3")


def test_modules_of_a_backend(monkeypatch):
    """FlashInfer's factories: "fa3" gives kernels of this family alone, "auto" both where both may run."""
    from pyinfer.jit import attention

    def names(backend, archs="9.0a", dtype="bfloat16", out="bfloat16", rope=0):
        monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", archs)
        module = attention.gen_batch_prefill_module(backend, dtype, dtype, out, "int32", 128, 128, rope)
        return {s.name.split("_bf16")[0] for s in module.specs}, [s for s in module.specs if "gather" in s.name]

    assert names("fa3") == ({"prefill_sm90"}, names("fa3")[1]) and len(names("fa3")[1]) == 1
    assert names("auto")[0] == {"decode_sm80", "prefill_sm80", "prefill_sm90"}
    assert names("auto", "8.9")[0] == names("fa2")[0] == {"decode_sm80", "prefill_sm80"}
    assert names("fa3", out="float32")[0] == {"prefill_sm90"}
    for case in (dict(archs="8.0"), dict(rope=1)):
        with pytest.raises(
            ValueError,
            match="gen_batch_prefill_module: backend has no kernel for this case: got 'fa3', wanted 'auto' or 'fa2'",
        ):
            names("fa3", **case)
    with pytest.raises(
        ValueError,
        match="gen_single_prefill_module: backend is not available: got 'cudnn', wanted 'auto', 'fa2' or 'fa3'",
    ):
        attention.gen_single_prefill_module("cudnn", *["float16"] * 3, 64, 64)


@pytest.mark.cpu
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_backends_on_the_cpu(backend):
    """There is one family there."""
    import pyinfer

    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape, dtype=np.float32) for shape in ((5, 4, 16), (9, 2, 16), (9, 2, 16)))
    wanted = pyinfer.single_prefill_with_kv_cache(q, k, v)
    np.testing.assert_array_equal(pyinfer.single_prefill_with_kv_cache(q, k, v, backend=backend), wanted)
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(backend=backend)
    wrapper.plan([0, 5], [0, 9], 4, 2, 16, q_data_type="float32")
    np.testing.assert_array_equal(wrapper.run(q, k, v), wanted)


def test_tensor_map_field():
    params = ParamStruct("P", *(ptr(f"p{i}") for i in range(8)), tensor_map("m"), i32("n"))
    assert (
        params.size == 256
        and "struct alignas(64) Params" in params.cpp_source()
        and "TensorMap m;" in params.cpp_source()
    )
    data = params.pack(*range(8), bytes(range(128)), 5)
    assert len(data) == 256 and data[64:192] == bytes(range(128)) and data[192] == 5
    with pytest.raises(ValueError, match="tensor map m does not lie at a multiple of 64 bytes"):
        ParamStruct("P", ptr("p"), tensor_map("m"))


def test_encodable():
    shape, strides = (128, 10, 2, 5), (256, 128, 2560)
    assert tensormap.encodable(1024, shape, strides, 2)
    assert tensormap.encodable(1024, (128, 10, 1, 1), (256, 0, 0), 2)  # axes of size 1
    assert not tensormap.encodable(1032, shape, strides, 2)
    assert not tensormap.encodable(1024, (128, 0, 2, 1), strides, 2)
    assert not tensormap.encodable(1024, shape, (0, 128, 2560), 2)  # a broadcast tensor
    assert not tensormap.encodable(1024, shape, (-256, 128, 2560), 2)
    assert not tensormap.encodable(1024, shape, (257, 128, 2560), 2)
    assert not tensormap.encodable(1024, shape, (1 << 40, 128, 2560), 2)
    with pytest.raises(ValueError, match="no TMA over shape"):
        tensormap.encode(8, BFLOAT16, shape, strides, (64, 128, 1, 1))


@pytest.mark.compile
@pytest.mark.parametrize("dim", attention_sm90.HEAD_DIMS)
def test_compiles(dim):
    """No spill, no warning of ptxas about wgmma or setmaxnreg, the planned shared memory."""
    for i, config in enumerate(attention_sm90.candidates(dim)):
        dtype, source, variant = (
            ("bfloat16", "float16")[i % 2],
            ("plan", "single")[i // 2 % 2],
            ("plain", "softcap")[(i + 1) // 2 % 2],
        )
        artifact = attention_sm90.gen_prefill_sm90(config, dtype, source, variant).build("90a")
        used = artifact.resources
        assert used.spill_stores == used.spill_loads == used.stack == 0, (config.tag, used)
        assert (
            used.registers == 65536 // config.block[0] // config.ctas_per_sm // 8 * 8
            and config.smem + used.smem <= 227 * 1024
        ), (
            config.tag,
            used,
        )
        assert not [line for line in artifact.log.splitlines() if "(C75" in line], (config.tag, artifact.log)


def test_maps_by_address(monkeypatch):
    """A tensor's map is encoded once for its address, and no more than so many are kept."""
    made = []
    monkeypatch.setattr(tensormap, "encode", lambda address, *layout: made.append((address, layout)) or bytes(128))
    layout = (BFLOAT16, (128, 10, 2, 1), (256, 128, 0), (64, 8, 1, 1))
    maps = tensormap.Maps(*layout)
    for address in (16, 32, 16, 32, 16):
        maps[address]
    assert made == [(16, layout), (32, layout)]
    for address in range(tensormap.MOST_ADDRESSES + 1):
        maps[16 * address]
    assert len(maps) <= tensormap.MOST_ADDRESSES and len(made) > tensormap.MOST_ADDRESSES
    assert tensormap.table(*layout) is tensormap.table(*layout)
    tensormap.table.cache_clear()
