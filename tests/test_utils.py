"""pyinfer.utils: what users of FlashInfer import from there."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from pyinfer import utils
from tests.reference.attention import alibi_slopes


def test_rounding():
    for x in range(1, 70):
        up, down = utils.next_positive_power_of_2(x), utils.last_positive_power_of_2(x)
        assert down <= x <= up and bin(up).count("1") == bin(down).count("1") == 1 and up < 2 * x and x < 2 * down
        for y in (1, 3, 8):
            assert utils.ceil_div(x, y) == -(-x // y)
            assert utils.round_up(x, y) % y == 0 and 0 <= utils.round_up(x, y) - x < y
    assert utils.next_positive_power_of_2(0) == utils.next_positive_power_of_2(-3) == 1
    with pytest.raises(
        ValueError, match="last_positive_power_of_2: x has no power of 2 below it: got 0, wanted 1 or more"
    ):
        utils.last_positive_power_of_2(0)


def test_get_indptr(backend):
    got = utils.get_indptr(backend.array(np.array([3, 0, 4]), "int32"))
    assert backend.is_own(got) and backend.numpy(got).tolist() == [0, 3, 3, 7]


def test_alibi_slopes():
    for heads in (1, 2, 7, 8, 12, 40):
        np.testing.assert_allclose(np.asarray(utils.get_alibi_slopes(heads)), alibi_slopes(heads), rtol=1e-6)
    with pytest.raises(ValueError, match="get_alibi_slopes: n_heads is no number of heads: got 0, wanted 1 or more"):
        utils.get_alibi_slopes(0)


def test_enumerations_have_flashinfers_codes():
    assert [m.value for m in utils.MaskMode] == [0, 1, 2, 3] and utils.MaskMode["CUSTOM"].value == 2
    assert utils.TensorLayout["HND"].value == 1 and utils.PosEncodingMode["ALIBI"].value == 2


def test_dtypes_and_buffers():
    torch = pytest.importorskip("torch")
    assert (
        utils.canonicalize_torch_dtype("bfloat16") is utils.canonicalize_torch_dtype(torch.bfloat16) is torch.bfloat16
    )
    with pytest.raises(TypeError, match="canonicalize_torch_dtype: dtype is no element type known here"):
        utils.canonicalize_torch_dtype("float3")
    assert utils._get_range_buf(4, "cpu").tolist() == [0, 1, 2, 3]


def test_what_a_gpu_can(monkeypatch):
    """With a GPU of each kind pretended."""
    from pyinfer.core import device

    for capability, hopper, blackwell in (
        (80, False, False),
        (90, True, False),
        (100, False, True),
        (120, False, False),
    ):
        info = device.DeviceInfo(0, "pretended", capability, 4, 1, 1)
        monkeypatch.setattr(device, "device_info", lambda index, info=info: info)
        monkeypatch.setattr(device, "current_device", lambda: 0)
        monkeypatch.setattr(device, "pdl_supported", functools.partial(lambda index, c: c >= 90, c=capability))
        for where in (0, "cuda", "cuda:0", None):
            assert utils.get_compute_capability(where) == divmod(capability, 10)
            assert utils.is_sm90a_supported(where) is hopper and utils.is_sm100a_supported(where) is blackwell
            assert utils.device_support_pdl(where) is (capability >= 90)
            assert utils.determine_mla_backend(where) == ("fa3" if hopper else "fa2")
        choice = [utils.determine_attention_backend("cuda:0", *o, "float16", kv) for o, kv in (
            ((0, False, False), "float16"), ((1, False, False), "float16"), ((0, True, False), "float16"), ((0, False, True), "float16"),
            ((0, False, False), "float8_e4m3fn"),
        )]  # fmt: skip
        assert choice == ["fa3" if hopper else "fa2", *["fa2"] * 4]
    with pytest.raises(ValueError, match="get_compute_capability: device is no GPU: got cpu, wanted a CUDA device"):
        utils.get_compute_capability("cpu")
    assert utils.device_support_pdl("cpu") is False


def test_a_torch_device_is_a_device(monkeypatch):
    torch = pytest.importorskip("torch")
    from pyinfer.core import device

    monkeypatch.setattr(device, "current_device", lambda: 3)
    got = [utils._ordinal(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")]
    assert got == [-1, 3, 1]


def test_registration_passes_through():
    @utils.register_custom_op("ours::f", mutates_args=("x",))
    def f(x):
        return x + 1

    @utils.register_fake_op("ours::f")
    def fake(x):
        return x

    assert (
        f(1) == 2
        and fake(1) == 1
        and utils.register_custom_op("g", f) is f
        and utils.register_fake_op("g", fake) is fake
    )


def test_log_level():
    import logging

    logger = logging.getLogger("pyinfer")
    before = logger.level
    try:
        for name, level in (("debug", 10), ("WARNING", 30)):
            utils.set_log_level(name)
            assert logger.level == level
        with pytest.raises(ValueError, match="set_log_level: lvl_str is no level: got 'loud', wanted 'debug', 'info'"):
            utils.set_log_level("loud")
        assert logger.level == 30
    finally:
        logger.setLevel(before)
