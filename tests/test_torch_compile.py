"""torch.compile sees every operator as one node of the graph, and compiled code gives what eager code does.

By aot_eager: Dynamo, fakes, functionalisation (inductor would want a C++ compiler on the CPU); on a GPU the block of a model by inductor.
`PYINFER_TEST_TORCH_COMPILE=1` runs the operators' own tests in this way.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import subprocess
import sys

import numpy as np
import pytest

import pyinfer
from pyinfer.torch_ops.signature import parse
from pyinfer.torch_ops.table import FUNCTIONS, METHODS, NOT_TRACED
from tests import compiled as compiled_suite
from tests.arrays import Backend

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(compiled_suite.wanted(), reason="the operators are compiled already")


def everything():
    for table in (FUNCTIONS, METHODS):
        for family, rows in table.items():
            for public, op in rows.items():
                yield family, public, op


def public(family, name):
    value = importlib.import_module(f"pyinfer.{family}")
    for part in name.split("."):
        value = getattr(value, part)
    return value


# ---- the table -------------------------------------------------------------------------------------------------------
@pytest.mark.cpu
def test_every_public_name_is_traced_or_says_why_not():
    rows = {name.split(".")[0] for _, name, _ in everything()}
    names = set(pyinfer._MODULE_OF)
    assert names - rows == set(NOT_TRACED)
    assert all(NOT_TRACED.values())


@pytest.mark.cpu
@pytest.mark.parametrize(("family", "name", "op"), [pytest.param(*row, id=row[1]) for row in everything()])
def test_table_has_the_arguments_of_the_function(family, name, op):
    function = public(family, name)
    assert [a.name for a in parse(op.arguments)] == list(inspect.signature(function).parameters)
    assert (
        inspect.signature(function._torchdynamo_inline).parameters.keys()
        == inspect.signature(function).parameters.keys()
    )


@pytest.mark.cpu
def test_nothing_of_torch_is_imported():
    code = (
        "import sys, pyinfer, pyinfer.norm, pyinfer.decode, pyinfer.sampling\n"
        "assert 'torch' not in sys.modules\n"
        "assert pyinfer.rmsnorm._torchdynamo_inline\n"
        "import pyinfer.torch_ops as t; t.register(); import torch\n"
        "print(torch.ops.pyinfer.rmsnorm.default._schema)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "pyinfer::rmsnorm(Tensor input, Tensor weight, float eps, bool? enable_pdl) -> Tensor"


# ---- every function --------------------------------------------------------------------------------------------------
def floats(rng, *shape, dtype=torch.float32):
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def page_table():
    """Two requests of 5 and 3 tokens, pages of 4."""
    return [torch.tensor(x, dtype=torch.int32) for x in ([2, 0, 1], [0, 2, 3], [1, 3])]


def samples(rng):
    """Arguments for each function, by name."""
    x, w, wide = floats(rng, 5, 32), floats(rng, 32), floats(rng, 5, 64)
    q, k = floats(rng, 5, 4, 16), floats(rng, 5, 2, 16)
    indptr, offsets = torch.tensor([0, 3, 5], dtype=torch.int32), torch.tensor([2, 7], dtype=torch.int32)
    positions = torch.tensor([3, 1, 4, 1, 5], dtype=torch.int32)
    table = floats(rng, 8, 16)
    v_a, s_a, v_b, s_b = q, floats(rng, 5, 4), floats(rng, 5, 4, 16), floats(rng, 5, 4)
    probs = torch.softmax(floats(rng, 6, 40), -1)
    logits = floats(rng, 6, 40)
    draw = dict(seed=torch.arange(6), offset=11)
    grid = dict(
        ppf=3, pph=1, ppw=2, num_frame_channels=4, num_height_channels=2, num_width_channels=2, num_heads_q=4, num_heads_k=2, num_heads_v=2,
        head_dim=8,
    )  # fmt: skip
    indices, kv_indptr, last = page_table()
    append = (k, floats(rng, 5, 2, 16), torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4, 1, 2, 0, 1]))
    rope = (q, k, indptr, offsets)
    half = dict(dtype=torch.float16)
    query, keys, values = floats(rng, 5, 4, 16, **half), floats(rng, 9, 2, 16, **half), floats(rng, 9, 2, 16, **half)
    draft, target = torch.softmax(floats(rng, 2, 3, 40), -1), torch.softmax(floats(rng, 2, 4, 40), -1)
    ids = torch.tensor([[1, 2, 3], [30, 20, 10]], dtype=torch.int32)
    bools = floats(rng, 21) > 0
    fp8 = lambda *shape: torch.zeros(*shape).to(torch.float8_e4m3fn)  # noqa: E731
    column, at = torch.empty(5, 1), (indices, kv_indptr, torch.tensor([0, 0, 1, 1, 1]), torch.tensor([4, 1, 2, 0, 1]))
    halves = (q[..., :8].half(), k[..., :8].half(), q[..., 8:].half(), k[..., 8:].half())
    whole, half_table = (q.half(), k.half(), None, None), table[:, :8].contiguous()
    latent = (halves[0], halves[1][:, 0], halves[2], halves[3][:, 0])
    quantized = {
        f"{act}_and_mul{form}": calls
        for act in ("silu", "gelu", "gelu_tanh")
        for form, calls in (
            ("_quant", [((fp8(5, 32), wide, 0.1), {}), ((fp8(5, 32), wide, torch.tensor(0.1)), {})]),
            (
                "_dynamic_quant",
                [
                    ((wide,), {}),
                    ((wide,), dict(scale=column, quantize_dtype=torch.float8_e5m2)),
                    ((wide, fp8(5, 32), column), {}),
                ],
            ),
        )
    }
    quantized |= {
        "rmsnorm_quant": [((fp8(5, 32), x, w, 0.1), {}), ((fp8(5, 32), x, w, torch.ones(1)), {})],
        "fused_add_rmsnorm_quant": [((fp8(5, 32), x, floats(rng, 5, 32), w, 0.1), {})],
        "rmsnorm_dynamic_quant": [((x, w), {}), ((x, w, 1e-5), dict(out=fp8(5, 32)))],
        "fused_add_rmsnorm_dynamic_quant": [((x, floats(rng, 5, 32), w), dict(quantize_dtype=torch.float8_e5m2))],
        "fused_rmsnorm_silu": [((x, w), {})],
        "fused_qk_rmsnorm_rope": [
            ((floats(rng, 6, 64), floats(rng, 32), floats(rng, 16)), grid),
            ((floats(rng, 6, 64), floats(rng, 32), floats(rng, 16)), grid | dict(output_fp8=True, q_out=fp8(6, 4, 8))),
        ],
        "layernorm": [((x, w, w), {}), ((x, w, w), dict(out=torch.empty(5, 32)))],
        "gather_paged_kv_cache": [
            ((at[2], at[3], floats(rng, 3, 2, 4, 2, 16), indices, kv_indptr), {}),
            (
                (at[2], at[3], (fp8(3, 2, 4, 16), fp8(3, 2, 4, 16)), indices, kv_indptr, "HND"),
                dict(k_scale=0.5, dtype=torch.float32),
            ),
        ],
        "gather_paged_mla_kv_cache": [
            (
                (at[2], at[3], floats(rng, 3, 4, 32), floats(rng, 3, 4, 8), indices, kv_indptr),
                dict(kpe_out=torch.empty(5, 8)),
            )
        ],
        "rope_quantize_fp8": [
            ((*halves, half_table, positions), dict(quant_scale_q=2.0)),
            (
                (*whole, table, positions),
                dict(quantize_dtype=torch.float8_e5m2, q_rope_out=fp8(5, 4, 16).to(torch.float8_e5m2)),
            ),
        ],
        "mla_rope_quantize_fp8": [((*latent, half_table, positions), {})],
        "rope_quantize_fp8_append_paged_kv_cache": [
            ((*whole, k.half(), table, positions, (fp8(3, 4, 2, 16), fp8(3, 4, 2, 16)), *at), dict(page_size=4)),
            ((*latent, None, half_table, positions, (fp8(3, 4, 8), fp8(3, 4, 8)), *at), dict(page_size=4)),
        ],
        "rope_append_paged_kv_cache": [
            ((q, k, k, table, positions, floats(rng, 3, 2, 4, 2, 16), *at), {}),
            (
                (q, k, k, half_table, positions, (floats(rng, 3, 2, 4, 16), floats(rng, 3, 2, 4, 16)), *at),
                dict(kv_layout="HND", q_out=torch.empty(5, 4, 16)),
            ),
        ],
    }
    return quantized | {
        "silu_and_mul": [((wide,), {}), ((wide,), dict(out=torch.empty(5, 32)))],
        "gelu_and_mul": [((wide,), {})],
        "gelu_tanh_and_mul": [((wide,), dict(enable_pdl=False))],
        "top_k": [((logits, 5), {}), ((logits, 40), dict(sorted=True, tie_break=pyinfer.TopKTieBreak.LARGE))],
        "top_k_page_table_transform": [((logits, ids.new_zeros(6, 40), positions[[0, 1, 2, 3, 4, 4]], 7), {})],
        "top_k_ragged_transform": [((logits, positions[[0, 1, 2, 3, 4, 4]], positions[[4, 1, 2, 3, 4, 0]], 7), {})],
        "tinygemm_bf16": [
            ((query[0], keys[0], torch.empty(4, 2, dtype=torch.float16)), {}),
            ((query[0], keys[0], torch.empty(4, 2)), dict(bias=keys[0, :, 0].contiguous())),
        ],
        "merge_state": [((v_a, s_a, v_b, s_b), {})],
        "merge_state_in_place": [
            ((v_a, s_a, v_b, s_b), {}),
            ((v_a, s_a, v_b, s_b), dict(mask=torch.tensor([1, 0, 1, 0, 0], dtype=torch.bool))),
        ],
        "merge_states": [((torch.stack([v_a, v_b], 1), torch.stack([s_a, s_b], 1)), {})],
        "single_decode_with_kv_cache": [
            ((query[0], keys, values), {}),
            ((query[0], keys, values), dict(return_lse=True, q_scale=torch.tensor(0.5), window_left=3)),
        ],
        "rmsnorm": [((x, w), {}), ((x, w, 1e-3), dict(out=torch.empty(5, 32)))],
        "gemma_rmsnorm": [((x, w), {})],
        "fused_add_rmsnorm": [((x, floats(rng, 5, 32), w), {})],
        "gemma_fused_add_rmsnorm": [((x, floats(rng, 5, 32), w), {})],
        "append_paged_kv_cache": [
            ((*append, floats(rng, 3, 2, 4, 2, 16), indices, kv_indptr, last), {}),
            ((*append, (floats(rng, 3, 2, 4, 16), floats(rng, 3, 2, 4, 16)), indices, kv_indptr, last, "HND"), {}),
            ((*append, fp8(3, 2, 4, 2, 16), indices, kv_indptr, last, "NHD", 0.5, torch.ones(2)), {}),
        ],
        "append_paged_mla_kv_cache": [
            ((x, wide, *append[2:], floats(rng, 3, 4, 32), floats(rng, 3, 4, 64), indices, kv_indptr, last), {})
        ],
        "get_batch_indices_positions": [
            ((indptr, offsets, 5), {}),
            ((indptr, offsets, 5), dict(positions=torch.empty(5, dtype=torch.int32))),
        ],
        "get_seq_lens": [((kv_indptr, last, 4), {})],
        "single_prefill_with_kv_cache": [
            ((query, keys, values), dict(causal=True)),
            (
                (query, keys, values),
                dict(o_dtype="float32", return_lse=True, custom_mask=floats(rng, 5, 9) > 0),
            ),
        ],
        "packbits": [((bools,), {})],
        "segment_packbits": [((bools, torch.tensor([0, 3, 21])), {}), ((bools, [0, 9, 9, 21], "little"), {})],
        "apply_rope": [(rope, {})],
        "apply_rope_inplace": [(rope, dict(rotary_dim=8))],
        "apply_rope_pos_ids": [((q, k, positions), dict(interleave=True))],
        "apply_rope_pos_ids_inplace": [((q, k, positions), {})],
        "apply_llama31_rope": [(rope, {})],
        "apply_llama31_rope_inplace": [(rope, {})],
        "apply_llama31_rope_pos_ids": [((q, k, positions), {})],
        "apply_llama31_rope_pos_ids_inplace": [((q, k, positions), dict(rope_scale=4.0))],
        "apply_rope_with_cos_sin_cache": [((positions, q.reshape(5, -1), k.reshape(5, -1), 16, table), {})],
        "apply_rope_with_cos_sin_cache_inplace": [
            ((positions, q.reshape(5, -1), k.reshape(5, -1), 16, table), dict(is_neox=False))
        ],
        "softmax": [((logits,), {}), ((logits, 0.7), {}), ((logits, torch.linspace(0, 1, 6)), {})],
        "sampling_from_probs": [((probs,), draw), ((probs,), dict(seed=2**64 - 3, offset=1, return_valid=True))],
        "sampling_from_logits": [((logits, torch.tensor([0, 5, 5, 2, 2, 1])), draw)],
        "top_k_sampling_from_probs": [((probs, 5), draw), ((probs, torch.arange(1, 7)), draw)],
        "top_p_sampling_from_probs": [((probs, 0.5), draw), ((probs, torch.linspace(0, 1, 6)), draw)],
        "min_p_sampling_from_probs": [((probs, 0.2), draw)],
        "top_k_top_p_sampling_from_probs": [
            ((probs, 9, 0.8), dict(**draw, filter_apply_order="joint", return_valid=True))
        ],
        "top_k_top_p_sampling_from_logits": [((logits, 9, 0.8), draw)],
        "top_p_renorm_probs": [((probs, 0.6), {})],
        "top_k_renorm_probs": [((probs, torch.arange(1, 7)), {})],
        "top_k_mask_logits": [((logits, 7), {})],
        "chain_speculative_sampling": [
            ((draft, ids, target), dict(seed=5, offset=6)),
            ((draft, ids, target, torch.tensor([1, 2], dtype=torch.int32)), dict(seed=5, offset=6, return_valid=True)),
        ],
        "convert_bsr_mask_layout": [((floats(rng, 3, 2, 4) > 0, [0, 1, 3]), {})],
    }


def moved(value, device):
    """A deep copy on a device."""
    if isinstance(value, torch.Tensor):
        return value.clone().to(device)
    if isinstance(value, tuple | list):
        return type(value)(moved(x, device) for x in value)
    return {k: moved(x, device) for k, x in value.items()} if isinstance(value, dict) else value


def leaves(value):
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        return [x for part in value for x in leaves(part)]
    return [value]


def assert_equal(a, b):
    """Same structure, same bits."""
    assert type(a) is type(b)
    first, second = leaves(a), leaves(b)
    assert len(first) == len(second)
    for x, y in zip(first, second, strict=True):
        if isinstance(x, torch.Tensor):
            assert x.dtype == y.dtype and x.device == y.device
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
        else:
            assert x == y


@pytest.fixture
def compile_whole():
    """torch.compile without a graph break; forgotten again afterwards."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield lambda f, backend="aot_eager": torch.compile(f, fullgraph=True, backend=backend)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", sorted(FUNCTIONS))
def test_compiled_equals_eager(compile_whole, rng, device, family):
    given = samples(rng)
    for name in FUNCTIONS[family]:
        function = public(family, name)
        compiled = compile_whole(function)
        for args, kwargs in given[name]:
            eager_args, args = moved((args, kwargs), device), moved((args, kwargs), device)
            want = function(*eager_args[0], **eager_args[1])
            got = compiled(*args[0], **args[1])
            assert_equal(got, want)
            assert_equal(args, eager_args)  # what was written to
            if isinstance(want, torch.Tensor):  # outputs that were given come back themselves
                assert any(got is x for x in leaves(args)) == any(want is x for x in leaves(eager_args))


@pytest.mark.cpu
@pytest.mark.parametrize("family", ["activation", "cascade", "gemm", "norm", "page", "rope", "topk"])
def test_samples_on_a_driver_that_launches_nothing(monkeypatch, rng, family):
    """The CUDA path of the same calls, first and remembered: no GPU is needed to see it build its parameters."""
    from tests import stub_driver

    submitted = stub_driver.install(monkeypatch)
    given = samples(rng)
    for name in FUNCTIONS[family]:
        for args, kwargs in given[name]:
            args, kwargs = moved((args, kwargs), "cpu")
            public(family, name)(*args, **kwargs)
            first = len(submitted)
            public(family, name)(*args, **kwargs)
            assert len(submitted) == 2 * first > 0, name
            assert submitted[0][0] == submitted[first][0]
            submitted.clear()


@pytest.mark.cpu
def test_opcheck(rng):
    """torch's own checks of schema and fake, for one operator of each kind."""
    pyinfer.torch_ops.register()
    ops = torch.ops.pyinfer
    x, r, w, out = floats(rng, 5, 32), floats(rng, 5, 32), floats(rng, 32), torch.empty(5, 32)
    q, k, positions = floats(rng, 5, 4, 16), floats(rng, 5, 2, 16), torch.arange(5, dtype=torch.int32)
    indices, kv_indptr, last = page_table()
    cache = floats(rng, 3, 4, 2, 16), floats(rng, 3, 4, 2, 16)
    requests, at = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 2])
    probs, kept = torch.softmax(floats(rng, 6, 40), -1), torch.linspace(0, 1, 6)
    calls = [
        (ops.rmsnorm, (x, w, 1e-6, None)),
        (ops.rmsnorm_out, (x, w, 1e-6, out, None)),
        (ops.fused_add_rmsnorm, (x, r, w, 1e-6, None)),
        (ops.apply_rope_pos_ids, (q, k, positions, None, False, 1.0, 1e4, None)),
        (
            ops.append_paged_kv_cache,
            (k, k, requests, at, *cache, indices, kv_indptr, last, "NHD", None, None, None, None, None),
        ),
        (ops.top_p_sampling_from_probs_return_valid, (probs, kept, None, None, True, False, None, 3, None, 4)),
        (ops.packbits, (floats(rng, 21) > 0, "big")),
    ]
    for op, args in calls:
        torch.library.opcheck(
            op.default, args, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
        )


# ---- a block of a model ----------------------------------------------------------------------------------------------
HQ, HK, D, PAGE = 8, 2, 64, 4


class Block(torch.nn.Module):
    """A layer of a decoder around a planned wrapper."""

    def __init__(self, wrapper, device):
        super().__init__()
        hidden = HQ * D
        make = dict(bias=False, dtype=torch.bfloat16, device=device)
        self.wrapper = wrapper
        self.norm = torch.nn.Parameter(torch.ones(hidden, dtype=torch.bfloat16, device=device))
        self.post = torch.nn.Parameter(torch.ones(hidden, dtype=torch.bfloat16, device=device))
        self.qkv = torch.nn.Linear(hidden, (HQ + 2 * HK) * D, **make)
        self.o, self.up, self.down = (
            torch.nn.Linear(a, b, **make) for a, b in ((hidden, hidden), (hidden, 512), (256, hidden))
        )

    def forward(self, x, residual, cache, requests, positions, indices, indptr, last):
        y = pyinfer.rmsnorm(x, self.norm)
        q, k, v = self.qkv(y).split([HQ * D, HK * D, HK * D], -1)
        q, k, v = q.view(-1, HQ, D), k.view(-1, HK, D), v.view(-1, HK, D)
        q, k = pyinfer.apply_rope_pos_ids(q, k, positions)
        pyinfer.append_paged_kv_cache(k, v, requests, positions, cache, indices, indptr, last)
        out = self.wrapper.run(q, cache)
        y = self.o(out.view(x.shape))
        pyinfer.fused_add_rmsnorm(y, residual, self.post)
        return self.down(pyinfer.silu_and_mul(self.up(y))), residual


def batch(rng, device, lengths, pages):
    """Page table, positions of the last tokens, inputs."""
    lengths = np.asarray(lengths)
    counts = -(-lengths // PAGE)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    indices = rng.permutation(pages)[: indptr[-1]].astype(np.int32)
    last = ((lengths - 1) % PAGE + 1).astype(np.int32)
    host = indptr, indices, last
    ours = [
        torch.from_numpy(x).to(device)
        for x in (np.arange(len(lengths), dtype=np.int32), (lengths - 1).astype(np.int32), indices, indptr, last)
    ]
    x, residual = (floats(rng, len(lengths), HQ * D, dtype=torch.bfloat16).to(device) for _ in range(2))
    return host, ours, x, residual


def close(a, b, device):
    # Inductor may fuse what stands around the operators and round once where eager code rounds twice.
    torch.testing.assert_close(a, b, rtol=0 if device == "cpu" else 0.02, atol=0 if device == "cpu" else 0.02)


@pytest.mark.parametrize("pair", [False, True], ids=["one cache", "pair"])
def test_a_block_without_a_graph_break(compile_whole, rng, device, pair):
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    block = Block(wrapper, device)
    compiled = compile_whole(block, "inductor" if device == "cuda" else "aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    whole = floats(rng, 12, 2, PAGE, HK, D, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        for lengths in ([5, 9, 1], [6, 10, 2], [12, 8, 4]):  # plans of one size, one graph
            host, index, x, residual = batch(rng, device, lengths, 12)
            wrapper.plan(*host, HQ, HK, D, PAGE, q_data_type="bfloat16")
            caches = [whole.clone(), whole.clone()]
            if pair:
                caches = [(c[:, 0].clone(), c[:, 1].clone()) for c in caches]
            residuals = residual.clone(), residual.clone()
            want, _ = block(x, residuals[0], caches[0], *index)
            got, back = compiled(x, residuals[1], caches[1], *index)
            close(got, want, device)
            close(residuals[1], residuals[0], device)
            assert back is residuals[1]
            for a, b in zip(leaves(caches[1]), leaves(caches[0]), strict=True):
                close(a, b, device)
            assert not torch.equal(leaves(caches[0])[0], leaves([whole[:, 0]] if pair else [whole])[0])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1


def test_another_batch_size_compiles_once_more(compile_whole, rng, device):
    """Then sizes are symbols: no compilation for each."""
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    block = Block(wrapper, device)
    compiled = compile_whole(block, "inductor" if device == "cuda" else "aot_eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    whole = floats(rng, 16, 2, PAGE, HK, D, dtype=torch.bfloat16).to(device)
    with torch.no_grad():
        for n in (3, 5, 4, 7, 6):
            host, index, x, residual = batch(rng, device, rng.integers(1, 8, n), 16)
            wrapper.plan(*host, HQ, HK, D, PAGE, q_data_type="bfloat16")
            want, _ = block(x, residual.clone(), whole.clone(), *index)
            got, _ = compiled(x, residual.clone(), whole.clone(), *index)
            close(got, want, device)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


# ---- wrappers --------------------------------------------------------------------------------------------------------
def test_outputs_given_and_lse(compile_whole, rng, device):
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    host, _, _, _ = batch(rng, device, [5, 2], 5)
    wrapper.plan(*host, HQ, HK, D, PAGE, q_data_type="float16", o_data_type="float32")
    q, cache = (floats(rng, *shape, dtype=torch.float16).to(device) for shape in ((2, HQ, D), (5, 2, PAGE, HK, D)))
    scales = {"k_scale": 0.5, "v_scale": torch.tensor(2.0, device=device), "sinks": floats(rng, HQ).to(device)}
    for given, return_lse, more in (
        ("", False, {}), ("", True, scales), ("out", False, scales), ("out", True, {}), ("lse", True, {}), ("lse", False, {}), ("out lse", True, scales),
    ):  # fmt: skip
        shapes = {"out": (2, HQ, D), "lse": (2, HQ)}
        ours, theirs = ({x: torch.full(shapes[x], 7.0, device=device) for x in given.split()} for _ in range(2))
        torch._dynamo.reset()
        call = compile_whole(lambda q, cache, **kw: wrapper.run(q, cache, **kw))
        got = call(q, cache, **ours, return_lse=return_lse, **more)
        assert_equal(got, wrapper.run(q, cache, **theirs, return_lse=return_lse, **more))
        assert_equal(ours, theirs)
        if "out" in given:
            assert leaves(got)[0] is ours["out"]


def test_other_wrappers(compile_whole, rng, device):
    half = dict(dtype=torch.float16)
    host, _, _, _ = batch(rng, device, [5, 2], 5)
    indptr, indices, last = host
    cache = floats(rng, 5, 2, PAGE, HK, D, **half).to(device)
    qo_indptr = np.array([0, 2, 3], np.int32)
    q = floats(rng, 3, HQ, D, **half).to(device)
    calls = []
    paged = pyinfer.BatchPrefillWithPagedKVCacheWrapper(None, "NHD")
    paged.plan(qo_indptr, indptr, indices, last, HQ, HK, D, PAGE, causal=True, q_data_type="float16")
    calls.append((lambda q, c: paged.run(q, c, return_lse=True), (q, cache)))
    ragged = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(None, "NHD")
    ragged.plan(qo_indptr, np.array([0, 4, 9], np.int32), HQ, HK, D, q_data_type="float16")
    k, v = (floats(rng, 9, HK, D, **half).to(device) for _ in range(2))
    calls.append((lambda q, k, v: ragged.run(q, k, v), (q, k, v)))
    mixed = pyinfer.BatchAttention("NHD", device)
    mixed.plan(
        qo_indptr,
        indptr,
        indices,
        np.array([5, 2], np.int32),
        HQ,
        HK,
        D,
        D,
        PAGE,
        causal=True,
        q_data_type="float16",
        kv_data_type="float16",
    )
    calls.append((lambda q, c: mixed.run(q, c), (q, cache)))
    levels = pyinfer.MultiLevelCascadeAttentionWrapper(2, None, "NHD")
    levels.plan(
        [np.array([0, 3], np.int32), qo_indptr], [np.array([0, 1], np.int32), indptr], [indices[:1], indices],
        [np.array([PAGE], np.int32), last], HQ, HK, D, PAGE, q_data_type="float16",
    )  # fmt: skip
    calls.append((lambda q, c: levels.run(q, c, return_lse=True), (q, cache)))
    sparse = pyinfer.BlockSparseAttentionWrapper(None)
    sparse.plan(np.array([0, 1, 2], np.int32), np.array([1, 0], np.int32), 4, 8, 2, 4, HQ, HK, D, q_data_type="float16")
    calls.append((lambda q, k, v: sparse.run(q, k, v), (torch.cat([q, q[:1]]), k[:8], v[:8])))
    latent = pyinfer.BatchMLAPagedAttentionWrapper(None)
    latent.plan(
        qo_indptr, indptr, indices, np.array([5, 2], np.int32), 4, 512, 64, PAGE, True, 0.07, "float16", "float16"
    )
    mla = (
        floats(rng, 3, 4, 512, **half),
        floats(rng, 3, 4, 64, **half),
        floats(rng, 5, PAGE, 512, **half),
        floats(rng, 5, PAGE, 64, **half),
    )
    calls.append((lambda *a: latent.run(*a, return_lse=True), tuple(x.to(device) for x in mla)))
    both = pyinfer.PODWithPagedKVCacheWrapper(None, "NHD")
    both.plan(indptr, indices, last, HQ, HK, D, PAGE, q_data_type="float16")
    pod = lambda qp, k, v, qd, c: both.run(qp, k, v, qd, c, causal_p=True, return_lse_p=True)  # noqa: E731
    calls.append((pod, (q, k, v, q[:2], cache)))
    for call, args in calls:
        got, want = compile_whole(call)(*args), call(*args)
        assert_equal(got, want)


@pytest.mark.cpu
def test_two_wrappers_do_not_share_a_graph(compile_whole, rng):
    made = []
    for lengths in ([5, 2], [1, 7]):
        wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
        wrapper.plan(*batch(rng, "cpu", lengths, 5)[0], HQ, HK, D, PAGE, q_data_type="float16")
        made.append(wrapper)
    q, cache = floats(rng, 2, HQ, D, dtype=torch.float16), floats(rng, 5, 2, PAGE, HK, D, dtype=torch.float16)
    compiled = compile_whole(lambda wrapper, q, cache: wrapper.run(q, cache))
    for _ in range(2):
        for wrapper in made:
            assert_equal(compiled(wrapper, q, cache), wrapper.run(q, cache))
    assert not torch.equal(made[0].run(q, cache), made[1].run(q, cache))


@pytest.mark.cpu
def test_a_wrapper_not_made_by_its_constructor_is_refused(compile_whole, rng):
    import copy

    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    wrapper.plan(*batch(rng, "cpu", [5, 2], 5)[0], HQ, HK, D, PAGE, q_data_type="float16")
    q, cache = floats(rng, 2, HQ, D, dtype=torch.float16), floats(rng, 5, 2, PAGE, HK, D, dtype=torch.float16)
    other = copy.copy(wrapper)
    with pytest.raises(
        RuntimeError, match=r"the wrapper of a compiled run\(\) is not known: got a copy or one that is gone"
    ):
        compile_whole(lambda q, cache: other.run(q, cache))(q, cache)


@pytest.mark.cpu
def test_wrappers_are_not_kept_alive():
    from pyinfer.torch_ops.registry import _wrappers

    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(None, "NHD")
    address = id(wrapper)
    assert _wrappers[address] is wrapper
    del wrapper
    gc.collect()
    assert address not in _wrappers


# ---- refusals, errors ------------------------------------------------------------------------------------------------
@pytest.mark.cpu
def test_a_generator_is_refused_with_the_way_out(compile_whole, rng):
    probs, generator = torch.softmax(floats(rng, 2, 8), -1), torch.Generator()
    with pytest.raises(
        Exception,
        match=r"generator is not supported under torch.compile: got a value, wanted its default. Pass seed and offset",
    ):
        compile_whole(lambda p: pyinfer.sampling_from_probs(p, generator=generator))(probs)


@pytest.mark.cpu
def test_numbers_of_numpy_are_refused(compile_whole, rng):
    probs, k = torch.softmax(floats(rng, 2, 8), -1), np.int64(3)
    with pytest.raises(Exception, match=r"a number is of an unsupported type: got \w+, wanted int, float or a tensor"):
        compile_whole(lambda p, k: pyinfer.top_k_sampling_from_probs(p, k, seed=1))(probs, k)


@pytest.mark.cpu
def test_without_a_seed_every_call_draws_anew(compile_whole, rng):
    probs = torch.softmax(floats(rng, 64, 50), -1)
    compiled = compile_whole(lambda p: pyinfer.sampling_from_probs(p) + pyinfer.sampling_from_probs(p) * 1000)
    torch.manual_seed(1)
    first, second = compiled(probs), compiled(probs)
    assert (first % 1000 != first // 1000).any(), "two draws were taken for one"
    assert (first != second).any()
    torch.manual_seed(1)
    assert_equal(compiled(probs), first)


@pytest.mark.cpu
def test_bad_input_raises_the_operators_error(compile_whole, rng):
    with pytest.raises(ValueError, match=r"rmsnorm: weight has the wrong shape: got \(3"):
        compile_whole(pyinfer.rmsnorm)(floats(rng, 2, 4), floats(rng, 3))


@pytest.mark.cpu
def test_export(rng):
    class Model(torch.nn.Module):
        def forward(self, x, w):
            return pyinfer.rmsnorm(x, w) + 1

    args = floats(rng, 3, 16), floats(rng, 16)
    exported = torch.export.export(Model(), args, strict=True)
    assert torch.ops.pyinfer.rmsnorm.default in [node.target for node in exported.graph.nodes]
    assert_equal(exported.module()(*args), Model()(*args))
    with pytest.raises(
        ValueError, match=r"input has no values: got a FakeTensor, wanted a tensor in memory. Trace through Dynamo"
    ):
        torch.export.export(Model(), args, strict=False)


@pytest.mark.cpu
def test_results_need_no_gradient(compile_whole, rng):
    x, w = floats(rng, 2, 4), torch.nn.Parameter(floats(rng, 4))
    got = compile_whole(pyinfer.rmsnorm)(x, w)
    assert got.requires_grad == pyinfer.rmsnorm(x, w).requires_grad


def test_numpy_and_eager_are_as_before(device):
    """Eager calls do not know of any of this."""
    x, w = np.ones((2, 4), np.float32), np.ones(4, np.float32)
    assert isinstance(pyinfer.rmsnorm(x, w), np.ndarray)
    there = Backend("torch", device)
    assert pyinfer.rmsnorm(there.array(x), there.array(w)).device.type == device
