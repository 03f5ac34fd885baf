"""install_as_flashinfer: programs written for FlashInfer run on pyinfer; what is missing says so."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import pyinfer
from pyinfer import _flashinfer
from tests.attention_cases import dtypes

SAYS = r"pyinfer [\d.]+, installed as flashinfer, has no {} \(docs/flashinfer_compat\.md lists what it lacks\)"


@pytest.fixture
def installed():
    pyinfer.install_as_flashinfer(replace=True)
    yield
    _flashinfer.uninstall_as_flashinfer()
    assert not any(n.split(".")[0] == "flashinfer" for n in sys.modules)


def test_modules_and_names(installed):
    import flashinfer
    import flashinfer.decode
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, fast_decode_plan  # noqa: F401
    from flashinfer.cascade import merge_state
    from flashinfer.decode import _get_range_buf, get_seq_lens
    from flashinfer.jit import env as jit_env
    from flashinfer.norm import rmsnorm as norm
    from flashinfer.quantization import packbits, segment_packbits  # noqa: F401
    from flashinfer.utils import next_positive_power_of_2, round_up

    assert flashinfer.__version__ == f"0.2.9+pyinfer.{pyinfer.__version__}"
    assert flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper is pyinfer.BatchDecodeWithPagedKVCacheWrapper
    assert norm is pyinfer.rmsnorm and merge_state is pyinfer.merge_state and get_seq_lens is pyinfer.get_seq_lens
    assert flashinfer.rope.apply_rope is flashinfer.apply_rope is pyinfer.apply_rope  # a submodule without importing it
    assert jit_env.cache_bases and round_up(9, 8) == 16 and next_positive_power_of_2(9) == 16
    assert _get_range_buf(3, "cpu").tolist() == [0, 1, 2]
    assert "rmsnorm" in dir(flashinfer) and "BatchMLAPagedAttentionWrapper" in dir(flashinfer.mla)
    assert flashinfer.decode.__doc__ == pyinfer.decode.__doc__ and "decode.py" in flashinfer.decode.__file__
    pyinfer.install_as_flashinfer()  # twice is once
    assert sys.modules["flashinfer"] is flashinfer


@pytest.mark.parametrize("name", sorted(name for names in pyinfer._FAMILIES.values() for name in names))
def test_every_operator_is_where_flashinfer_has_it(installed, name):
    import flashinfer

    assert getattr(flashinfer, name) is getattr(pyinfer, name)
    family = pyinfer._MODULE_OF[name]
    assert getattr(getattr(flashinfer, family), name) is getattr(pyinfer, name)


def test_what_is_missing_says_so(installed):
    import flashinfer
    import flashinfer.decode

    with pytest.raises(AttributeError, match=SAYS.format("trtllm_fp4_block_scale_moe")):
        flashinfer.trtllm_fp4_block_scale_moe  # noqa: B018
    with pytest.raises(AttributeError, match=SAYS.format("decode.xqa")):
        flashinfer.decode.xqa  # noqa: B018
    with pytest.raises(ImportError, match=SAYS.format("decode.xqa")):
        from flashinfer.decode import xqa  # noqa: F401
    with pytest.raises(ImportError, match=SAYS.format("no_such_part")):
        from flashinfer import no_such_part  # noqa: F401
    with pytest.raises(ModuleNotFoundError, match=SAYS.format("no_such_part")):
        import flashinfer.no_such_part
    with pytest.raises(ModuleNotFoundError, match=SAYS.format("no_such_part")):
        from flashinfer.no_such_part.mnnvl import Anything  # noqa: F401
    with pytest.raises(ImportError, match=SAYS.format("core")):  # pyinfer's own insides are not FlashInfer's
        import flashinfer.core
    assert not hasattr(flashinfer, "no_such_part") and not hasattr(flashinfer.decode, "_private")
    assert getattr(flashinfer.decode, "trtllm_batch_decode_with_kv_cache", None) is None


def test_probes_are_answered_as_usual(installed):
    """Engines ask importlib whether a part is there: that must not raise."""
    import importlib.util

    assert importlib.util.find_spec("flashinfer") is not None
    assert importlib.util.find_spec("flashinfer.decode") is not None
    assert importlib.util.find_spec("flashinfer.no_such_part") is None
    assert importlib.util.find_spec("flashinfer_other") is None


def test_without_installing_flashinfer_is_not_ours():
    import importlib.util

    _flashinfer.uninstall_as_flashinfer()  # nothing to undo
    spec = importlib.util.find_spec("flashinfer")
    assert spec is None or not isinstance(spec.loader, _flashinfer._Finder)


PROGRAM = """
import sys, types
real = types.ModuleType("flashinfer"); real.__file__ = "/somewhere/flashinfer/__init__.py"; real.mark = 1
part = types.ModuleType("flashinfer.decode")
sys.modules.update({"flashinfer": real, "flashinfer.decode": part})
import pyinfer
try:
    pyinfer.install_as_flashinfer()
except ValueError as error:
    print(error)
import flashinfer
assert flashinfer.mark == 1
pyinfer.install_as_flashinfer(replace=True)
assert flashinfer.mark == 1  # held by this module: stays what it was
import flashinfer
from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper as wrapper
assert wrapper is pyinfer.BatchDecodeWithPagedKVCacheWrapper and not hasattr(flashinfer, "mark")
assert not {"torch", "numba", "cupy"} & set(sys.modules)
"""


def test_a_loaded_flashinfer_is_left_alone(monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "flashinfer.decode", types.ModuleType("flashinfer.decode"))
    with pytest.raises(
        ValueError, match=r"install_as_flashinfer: flashinfer has been imported already: got .*flashinfer"
    ):
        pyinfer.install_as_flashinfer()


def test_after_flashinfer_itself():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "install_as_flashinfer: flashinfer has been imported already: got /somewhere/flashinfer/__init__.py, wanted a process that has not. "
        "Call it first, or pass replace=True: what others have imported from it stays FlashInfer's."
    )


def test_installing_imports_little(tmp_path):
    code = """
    import sys, pyinfer
    pyinfer.install_as_flashinfer()
    import flashinfer
    assert not {"torch", "numba", "cupy", "numpy"} & set(sys.modules), sorted(sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


# ---- programs in the style of serving engines -----------------------------------------------------------------------------------
class Engine:
    """An attention backend as engines write it: append the step's keys, one prefill wrapper, one decode wrapper, a merge over a shared prefix."""

    def __init__(self, device, dtype) -> None:
        import torch
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
        from flashinfer.decode import get_seq_lens

        self.torch, self.device, self.get_seq_lens = torch, device, get_seq_lens
        self.dtype = getattr(torch, dtype)
        workspace = torch.empty(32 << 20, dtype=torch.uint8, device=device)
        self.decode = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
        self.prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto")
        self.cache = torch.zeros(32, 2, 16, 2, 64, dtype=self.dtype, device=device)

    def ints(self, values):
        return self.torch.tensor(values, dtype=self.torch.int32, device=self.device)

    def table(self, lens):
        """Disjoint pages for requests of these lengths."""
        pages = [-(-n // 16) for n in lens]
        indptr = np.r_[0, np.cumsum(pages)].tolist()
        return self.ints(indptr), self.ints(list(range(indptr[-1]))), self.ints([(n - 1) % 16 + 1 for n in lens])

    def append(self, k, v, qo_lens, lens):
        import flashinfer

        indptr, indices, last = self.table(lens)
        batch, positions = flashinfer.get_batch_indices_positions(
            self.ints(np.r_[0, np.cumsum(qo_lens)].tolist()), flashinfer.get_seq_lens(indptr, last, 16), k.shape[0]
        )
        flashinfer.append_paged_kv_cache(k, v, batch, positions, self.cache, indices, indptr, last, "NHD")


def test_an_engine_step(rng, device, installed):
    """Prefill of two requests and three decode steps; at the end a wrapper that sees all at once gives the same."""
    import flashinfer
    import torch

    dtype = dtypes(device)[-2]
    engine = Engine("cuda" if device == "cuda" else "cpu", dtype)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(engine.dtype).to(engine.device)

    lens = [20, 5]
    k, v, q = draw(25, 2, 64), draw(25, 2, 64), draw(25, 8, 64)
    cos_sin = torch.cat([torch.ones(64, 32), torch.zeros(64, 32)], -1).float().to(engine.device)  # no rotation
    flashinfer.rope.apply_rope_with_cos_sin_cache_inplace(
        positions=engine.ints([*range(20), *range(5)]), query=q.view(25, -1), key=k.view(25, -1), head_size=64, cos_sin_cache=cos_sin
    )  # fmt: skip
    engine.append(k, v, lens, lens)
    engine.prefill.plan(
        engine.ints([0, 20, 25]), *engine.table(lens), num_qo_heads=8, num_kv_heads=2, head_dim_qk=64, page_size=16, causal=True,
        sm_scale=0.125, window_left=-1, logits_soft_cap=None, q_data_type=engine.dtype, kv_data_type=engine.dtype,
    )  # fmt: skip
    out = engine.prefill.run(q, engine.cache, k_scale=1.0, v_scale=1.0)
    assert out.shape == q.shape and bool(torch.isfinite(out).all())
    for _ in range(3):
        lens = [n + 1 for n in lens]
        q, k, v = draw(2, 8, 64), draw(2, 2, 64), draw(2, 2, 64)
        engine.append(k, v, [1, 1], lens)
        flashinfer.fast_decode_plan(
            engine.decode, *engine.table(lens), 8, 2, 64, 16, sm_scale=0.125, q_data_type=engine.dtype, kv_data_type=engine.dtype
        )  # fmt: skip
        out = engine.decode.run(q, engine.cache)
    single = [
        flashinfer.single_decode_with_kv_cache(q[b], *(engine.cache[first:, i].reshape(-1, 2, 64)[:n] for i in (0, 1)), sm_scale=0.125)
        for b, (first, n) in enumerate([(0, lens[0]), (-(-lens[0] // 16), lens[1])])
    ]  # fmt: skip
    assert float((out - torch.stack(single)).abs().max()) < 4e-3
    probs = torch.softmax(torch.from_numpy(rng.standard_normal((2, 100))).float(), -1).to(engine.device)
    ids = flashinfer.sampling.top_k_top_p_sampling_from_probs(probs, 1, 1.0, filter_apply_order="joint")
    assert ids.tolist() == probs.argmax(-1).tolist()


def test_a_two_level_engine(rng, device, installed):
    """A shared prefix by hand: prefill wrappers over ragged and paged keys, states merged."""
    import torch
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, BatchPrefillWithRaggedKVCacheWrapper
    from flashinfer.cascade import merge_state

    dtype = dtypes(device)[-2]
    engine = Engine("cuda" if device == "cuda" else "cpu", dtype)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape)).to(engine.dtype).to(engine.device)

    k, v, q = draw(30, 2, 64), draw(30, 2, 64), draw(7, 8, 64)
    engine.append(k[:23], v[:23], [23], [23])
    workspace = torch.empty(16 << 20, dtype=torch.uint8, device=engine.device)
    ragged, paged = (
        BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD"),
        BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD"),
    )
    qo = engine.ints([0, 7])
    with pytest.warns(DeprecationWarning, match="begin_forward is deprecated"):
        ragged.begin_forward(qo, qo, 8, 2, 64, q_data_type=engine.dtype)
    paged.plan(qo, *engine.table([23]), 8, 2, 64, 16, q_data_type=engine.dtype)
    with pytest.warns(DeprecationWarning, match="forward is deprecated"):
        o1, s1 = ragged.forward_return_lse(q, k[23:], v[23:], causal=True, sm_scale=0.125)
    o2, s2 = paged.run_return_lse(q, engine.cache)
    out, _ = merge_state(o1, s1, o2, s2)
    import flashinfer

    whole = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True)
    assert float((out - whole).abs().max()) < 4e-3
