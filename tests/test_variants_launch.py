"""What a variant's run hands to the CUDA kernel: its parameters in their fields, again for every call whose values differ. On host memory, without a GPU."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import pyinfer
from pyinfer import AttentionVariant
from pyinfer.core import device
from tests import stub_runtime

pytestmark = pytest.mark.cpu


def graded(score, q_pos, kv_idx, slope, cap, shift):
    return min(score, cap) - slope * (q_pos - kv_idx) + shift


PARAMS = {"slope": "float32[head]", "cap": "float32", "shift": "int32"}
VARIANT = AttentionVariant("graded", logits=graded, params=PARAMS)


def given(spec: Any, data: bytes) -> dict[str, Any]:
    values = spec.params.packer.unpack(data)
    return {f.name: x for f, x in zip(spec.params.fields, values, strict=True) if f.name.startswith("user_")}


def as_float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[tuple[Any, ...]], dict[str, Any]]]:
    """Launches, and the specs of their kernels by name; what is looked up once for a device is looked up anew, before and after."""
    pytest.importorskip("torch")
    from pyinfer.core import tensormap
    from pyinfer.jit import attention_launch, attention_sm90
    from pyinfer.jit.spec import JitSpec

    caches = (
        attention_launch._kernel, attention_launch._planned, attention_launch.prepare_attention, attention_launch.hopper_config,
        attention_launch.device_config, attention_sm90.kernel_of, attention_sm90.enabled, tensormap.table,
    )  # fmt: skip
    for cached in caches:
        cached.cache_clear()
    _, submitted = stub_runtime.install(monkeypatch)
    specs: dict[str, Any] = {}
    build = JitSpec.build_and_load

    def remember(self: Any, device: int) -> Any:
        specs[self.name] = self
        return build(self, device)

    monkeypatch.setattr(JitSpec, "build_and_load", remember)
    monkeypatch.setattr(device, "arch_number_of", lambda index: 90)
    monkeypatch.setattr(tensormap, "encode", lambda *args: bytes(128))  # the driver's
    yield submitted, specs
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("sm90", [False, True])
def test_values_stand_in_their_fields(sm90: bool, stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    submitted, specs = stub
    monkeypatch.setenv("PYINFER_SM90", "1" if sm90 else "0")
    workspace = torch.zeros(8 << 20, dtype=torch.uint8)
    prefill = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, variant=VARIANT)
    prefill.plan([0, 200], [0, 300], 8, 2, 128, causal=True, q_data_type="bfloat16")
    q, k = torch.zeros(200, 8, 128, dtype=torch.bfloat16), torch.zeros(300, 2, 128, dtype=torch.bfloat16)
    slope = torch.arange(8, dtype=torch.float32)
    prefill.run(q, k, k, slope, 2.5, 7)
    decode = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, variant=VARIANT)
    decode.plan([0, 2], [0, 1], [5], 8, 2, 128, 16, q_data_type="bfloat16")
    cache = torch.zeros(2, 2, 16, 2, 128, dtype=torch.bfloat16)
    decode.run(q[:1], cache, slope, 2.5, 7)
    assert len(submitted) == 2
    family = "prefill_sm90" if sm90 else "prefill_sm80"
    assert submitted[0][0].startswith(family) and submitted[1][0].startswith("decode_sm80")
    for name, _, data, *_ in submitted:
        assert "user_graded" in name and specs[name].link == VARIANT.user.functions
        wanted = {"user_slope": slope.data_ptr(), "user_cap": 2.5, "user_shift": 7}
        assert given(specs[name], data) == wanted

    # A run like the one before is bound, values and all; other values are not served by it.
    for shift in (7, 7, 7, 8, 8, 8, 7):
        decode.run(q[:1], cache, slope, 2.5, shift)
        name, _, data, *_ = submitted[-1]
        assert given(specs[name], data)["user_shift"] == shift
    other = slope.clone()
    for tensor, cap in ((other, 2.5), (slope, 0.1), (slope, 0.1), (slope, 0.1), (other, 0.1)):
        decode.run(q[:1], cache, tensor, cap, 7)
        name, _, data, *_ = submitted[-1]
        assert given(specs[name], data) == {
            "user_slope": tensor.data_ptr(),
            "user_cap": as_float32(cap),
            "user_shift": 7,
        }
    before = len(submitted)
    for args in ((), (slope, 0.1), (slope[:4], 0.1, 7), (slope, 0.1, 7, 1)):
        with pytest.raises((TypeError, ValueError), match=r"do not fit the variant|wrong length"):
            decode.run(q[:1], cache, *args)
    assert len(submitted) == before
    decode.run(q[:1], cache, slope, np.float32(0.5), 7)  # a value that has no key is launched each time
    assert given(specs[name], submitted[-1][2])["user_cap"] == 0.5


def test_repeated_runs_are_bound(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second like call on nothing is checked or packed again."""
    import torch

    submitted, _ = stub
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(8 << 20, dtype=torch.uint8), variant=VARIANT)
    wrapper.plan([0, 2], [0, 1], [5], 8, 2, 64, 16, q_data_type="float16")
    q, cache = torch.zeros(1, 8, 64, dtype=torch.float16), torch.zeros(2, 2, 16, 2, 64, dtype=torch.float16)
    slope, calls = torch.zeros(8), []
    original = AttentionVariant.check_args
    monkeypatch.setattr(AttentionVariant, "check_args", lambda *a: calls.append(1) or original(*a))
    for _ in range(5):
        wrapper.run(q, cache, slope, 1.0, 2)
    assert len(submitted) == 5 and len(calls) == 1
    wrapper.run(q, cache, slope, 1, 2)  # 1 equals 1.0: told apart by type
    assert len(calls) == 2


def test_single_calls(stub: Any) -> None:
    import torch

    submitted, specs = stub
    q, k = torch.zeros(1, 4, 64, dtype=torch.float16), torch.zeros(30, 2, 64, dtype=torch.float16)
    slope = torch.zeros(4)
    pyinfer.single_decode_with_kv_cache(q[0], k, k, variant=VARIANT, variant_args=(slope, 3.0, -4))
    pyinfer.single_prefill_with_kv_cache(q, k, k, variant=VARIANT, variant_args=(slope, 3.0, -4))
    assert len(submitted) == 2
    for name, _, data, *_ in submitted:
        assert given(specs[name], data) == {"user_slope": slope.data_ptr(), "user_cap": 3.0, "user_shift": -4}
