"""common/types.cuh: sizes and traits for every architecture, and on a GPU every conversion, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from pyinfer.core.params import ParamStruct, i32, ptr
from pyinfer.jit import compiler, env
from pyinfer.jit.spec import JitSpec
from tests import jit_template as t
from tests.arrays import assert_same_bits

TEMPLATE = "test/types.cu.jinja"
SOURCE = r"""#include "common/types.cuh"
static_assert(sizeof(int8_t) == 1 && sizeof(int16_t) == 2 && sizeof(int32_t) == 4 && sizeof(int64_t) == 8 && sizeof(size_t) == 8, "ints");
static_assert(sizeof(uint8_t) == 1 && sizeof(uint16_t) == 2 && sizeof(uint32_t) == 4 && sizeof(uint64_t) == 8, "unsigned ints");
static_assert(int8_t(-1) < 0 && int64_t(-1) < 0 && uint8_t(-1) > 0 && uint64_t(-1) > 0, "signs");
static_assert(sizeof(f16) == 2 && alignof(f16) == 2 && sizeof(bf16) == 2 && sizeof(e4m3) == 1 && sizeof(e5m2) == 1, "storage types");
static_assert(is_same_v<f16, f16> && !is_same_v<f16, bf16> && !is_same_v<e4m3, e5m2>, "is_same");
static_assert(ceil_div(7, 2) == 4 && ceil_div(8, 2) == 4 && ceil_div(0, 3) == 0 && ceil_div(1, 3) == 1, "ceil_div");
static_assert(sizeof(vec_t<f16, 8>) == 16 && alignof(vec_t<f16, 8>) == 16 && sizeof(vec_t<float, 8>) == 32 && alignof(vec_t<float, 8>) == 16, "vec_t");
static_assert(sizeof(vec_t<e4m3, 4>) == 4 && alignof(vec_t<e4m3, 4>) == 4 && alignof(vec_t<bf16, 2>) == 4 && alignof(vec_t<int32_t, 2>) == 8, "vec_t");
static_assert(sizeof(TensorMap) == 128 && alignof(TensorMap) == 64, "TensorMap");
{{ params }}

template <typename T>
PYINFER_DEVICE void convert(const Params& p, int i, uint16_t bits, float* to32, uint16_t* to16, uint32_t* packed, float* unpacked) {
    if (i < 65536) to32[i] = to_float(T{bits});
    if (i < p.n) to16[i] = from_float<T>(p.floats[i]).bits;
    if (i < p.n / 2) {
        packed[i] = pack2<T>(p.floats[2 * i], p.floats[2 * i + 1]);
        float2 pair = unpack2<T>(packed[i]);
        unpacked[2 * i] = pair.x;
        unpacked[2 * i + 1] = pair.y;
    }
}

extern "C" __global__ void {{ kernel_name }}(const __grid_constant__ Params p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    convert<f16>(p, i, static_cast<uint16_t>(i), p.f16_to32, p.f16_to16, p.f16_packed, p.f16_unpacked);
    convert<bf16>(p, i, static_cast<uint16_t>(i), p.bf16_to32, p.bf16_to16, p.bf16_packed, p.bf16_unpacked);
    if (i < p.n / 8) {  // 32 bytes a vector, by two accesses of 16
        vec_t<float, 8> v = vec_t<float, 8>::load(p.floats + 8 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            float first = v[j];
            v[j] = v[7 - j];
            v[7 - j] = first;
        }
        v.store(p.reversed + 8 * i);
    }
    if (i == 0) {
        p.scalars[0] = infinity();
        p.scalars[1] = min_of(2.f, -3.f);
        p.scalars[2] = max_of(2.f, -3.f);
        p.scalars[3] = LOG2_E;
        p.scalars[4] = LN_2;
        p.scalars[5] = from_float<float>(to_float(0.1f));
        p.scalars[6] = static_cast<float>(min_of(7, 3));
        p.scalars[7] = static_cast<float>(max_of<int64_t>(7, 1));
    }
}
"""
OUTPUTS = tuple(
    (f"{k}_{name}", dtype)
    for k in ("f16", "bf16")
    for name, dtype in (("to32", "float"), ("to16", "uint16_t"), ("packed", "uint32_t"), ("unpacked", "float"))
)
PARAMS = ParamStruct(
    "TypesTest",
    ptr("floats", "const float"),
    *[ptr(*o) for o in OUTPUTS],
    ptr("reversed", "float"),
    ptr("scalars", "float"),
    i32("n"),
)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(tmp_path))
    monkeypatch.setattr(compiler, "read_source", t.reader({TEMPLATE: SOURCE}))
    compiler.forget()
    yield JitSpec("types_test", TEMPLATE, PARAMS, block=(256, 1, 1))
    monkeypatch.undo()
    compiler.forget()


@pytest.mark.compile
@pytest.mark.parametrize("arch", [*env.NATIVE_ARCHS, "compute_80"])
def test_compiles(spec, arch):
    artifact = spec.build(arch)
    assert "warning" not in artifact.log, artifact.log
    assert (artifact.resources.stack, artifact.resources.spill_stores) == (0, 0)


def _floats(rng):
    """Bit patterns of every kind: random ones, and all around the values where a rounding to 16 bits tips over."""
    patterns = [rng.integers(0, 2**32, 2**20, dtype=np.uint32)]
    for kind in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(invalid="ignore"):  # signalling NaN
            every = np.arange(32768, dtype=np.uint16).view(kind).astype(np.float64)
        every = every[np.isfinite(every)]
        last = 2 * every[-1] - every[-2]  # what would follow the largest value: half-way there begins infinity
        middles = (every + np.append(every[1:], last)) / 2
        tips = np.concatenate([every, middles]).astype(np.float32)
        around = [tips, np.nextafter(tips, np.float32(0)), np.nextafter(tips, np.float32(np.inf))]
        patterns += [x.view(np.uint32) for tip in around for x in (tip, -tip)]
    joined = np.concatenate(patterns)
    return joined[: joined.size // 8 * 8].view(np.float32)


def _same(got, want, name):
    """Bits agree, but for the payload of NaN."""
    assert (np.isnan(got) == np.isnan(want)).all(), name
    assert_same_bits(
        np.where(np.isnan(got), np.zeros_like(got), got), np.where(np.isnan(want), np.zeros_like(want), want), name
    )


def test_inputs_hold_the_hard_cases(rng):
    floats = _floats(rng)
    with np.errstate(over="ignore", invalid="ignore"):
        as16 = floats.astype(np.float16)
    assert np.isnan(floats).any() and np.isinf(as16[np.isfinite(floats)]).any() and (as16[floats != 0] == 0).any()
    assert (
        (np.abs(floats) == 65504) | (np.abs(floats) == 65520)
    ).any()  # the largest, and where it tips over to infinity


@pytest.mark.gpu
def test_conversions_on_the_device(spec, rng):
    import torch

    floats = _floats(rng)
    n = floats.size
    sizes = {
        "to32": (65536, np.float32),
        "to16": (n, np.uint16),
        "packed": (n // 2, np.uint32),
        "unpacked": (n, np.float32),
    }
    floats_gpu = torch.from_numpy(floats.copy()).cuda()
    outputs = {
        name: torch.full((size * np.dtype(dtype).itemsize,), 0xAA, dtype=torch.uint8, device="cuda")
        for name, (size, dtype) in {
            **{o: sizes[o.split("_")[1]] for o, _ in OUTPUTS},
            "reversed": (n, np.float32),
            "scalars": (8, np.float32),
        }.items()
    }
    spec.build_and_load()(
        torch.cuda.current_stream().cuda_stream,
        -(-n // 256),
        (floats_gpu.data_ptr(), *[o.data_ptr() for o in outputs.values()], n),
    )
    host = {name: o.cpu().numpy() for name, o in outputs.items()}

    for prefix, dtype in (("f16", np.dtype(np.float16)), ("bf16", np.dtype(ml_dtypes.bfloat16))):
        every = np.arange(65536, dtype=np.uint16).view(dtype)
        _same(host[f"{prefix}_to32"].view(np.float32), every.astype(np.float32), f"{prefix} to float")
        with np.errstate(over="ignore", invalid="ignore"):
            want = floats.astype(dtype)
        got = host[f"{prefix}_to16"].view(dtype)
        _same(got.astype(np.float32), want.astype(np.float32), f"float to {prefix}")
        # A little-endian pair: the element of lower index in the low half.
        packed = host[f"{prefix}_packed"].view(np.uint32).view(np.uint16).view(dtype)
        _same(packed.astype(np.float32), want.astype(np.float32), f"pack2 {prefix}")
        _same(host[f"{prefix}_unpacked"].view(np.float32), want.astype(np.float32), f"unpack2 {prefix}")
    assert_same_bits(
        host["reversed"].view(np.uint32), floats.reshape(-1, 8)[:, ::-1].reshape(-1).view(np.uint32), "vec_t"
    )
    scalars = host["scalars"].view(np.float32)
    assert scalars.tolist() == [
        np.inf,
        -3.0,
        2.0,
        np.float32(np.log2(np.e)),
        np.float32(np.log(2)),
        np.float32(0.1),
        3.0,
        7.0,
    ]
