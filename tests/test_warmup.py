"""Warm-up compiles what a model's operators then ask for, and nothing is left to compile."""

from __future__ import annotations

import dataclasses
import types

import numpy as np
import pytest

import pyinfer
from pyinfer.core.dtypes import canonical_dtype
from pyinfer.jit import attention_sm90, compiler, env
from pyinfer.jit.attention import SOURCES, attention_config, gen_attention
from pyinfer.jit.attention_config import cluster_configs, wide_decode_config
from pyinfer.jit.warmup import ModelConfig, model_specs, warmup

SMOLLM2 = ModelConfig(num_qo_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536)
LLAMA3 = ModelConfig(num_qo_heads=32, num_kv_heads=8, head_dim=128, hidden_size=4096, intermediate_size=14336)
SHARE = ModelConfig(
    num_qo_heads=16,
    num_kv_heads=1,
    head_dim=256,
    hidden_size=3072,
    intermediate_size=24576,
    activation="gelu_pytorch_tanh",
    gemma_norm=True,
)
ARCHS = [env.arch_number(a) for a in env.NATIVE_ARCHS]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "model",
    [SMOLLM2, LLAMA3, SHARE, dataclasses.replace(LLAMA3, num_qo_heads=64, num_kv_heads=1)],
    ids=["smollm2", "llama3", "share", "mqa64"],
)
def test_every_attention_configuration_is_covered(model, arch):
    """Whatever the lengths of a batch, its configuration is one of those compiled, and none is compiled for nothing."""
    names = {s.name for s in model_specs(model, arch)}
    group = model.num_qo_heads // model.num_kv_heads
    rows = {group * n for n in (*range(1, 300), 1000, 8192, 131072)}
    configs = {attention_config(arch, model.dtype, model.head_dim, model.head_dim, r) for r in rows}
    reachable = {
        gen_attention(c, model.dtype, model.head_dim, model.head_dim, s).name for c in configs for s in SOURCES
    }
    dim = model.head_dim
    if group <= 16:  # decode plans: of their list or without it, a wide block for few requests, clusters
        decode = {attention_config(arch, model.dtype, dim, dim, group), wide_decode_config(arch, dim, dim)} - {None}
        made = {(c, source) for c in decode for source in ("plan", "even")}
        made |= {(c, source) for c in cluster_configs(arch, dim, dim) for source in ("even", "even_plan")}
        reachable |= {gen_attention(c, model.dtype, dim, dim, source).name for c, source in made}
    hopper = {attention_sm90.config_for(arch, canonical_dtype(model.dtype), dim, dim, r) for r in rows} - {None}
    for page_size, sources in ((0, SOURCES), (16, ["plan"]), (1, ["plan"])):
        kernels = {(attention_sm90.for_pages(c, page_size), source) for c in hopper for source in sources}
        reachable |= {attention_sm90.gen_prefill_sm90(c, model.dtype, source).name for c, source in kernels}
    assert bool(hopper) == (arch == 90)
    assert {n for n in names if n.startswith(("decode_sm", "prefill"))} == reachable


def test_specs_of_a_model():
    def stems(model):
        return {s.template.split("/")[1].split(".")[0] for s in model_specs(model, 90)}

    everything = {"rmsnorm", "fused_add_rmsnorm", "act_and_mul", "rope", "append", "batch_positions", "seq_lens"}
    everything |= {
        "decode_sm80",
        "replan",
        "prefill_sm80",
        "merge_state",
        "merge_states",
        "sample",
        "softmax",
        "renorm",
        "mask_logits",
    }
    assert stems(SMOLLM2) >= everything
    specs = model_specs(LLAMA3, 90)
    assert len(set(specs)) == len(specs) and all(s.min_arch <= 90 for s in specs)
    names = {s.name for s in model_specs(SHARE, 90)}
    assert any(n.startswith("gemma_rmsnorm_bf16") for n in names) and any(
        n.startswith("gelu_tanh_and_mul_bf16") for n in names
    )
    capped = {s.name for s in model_specs(dataclasses.replace(LLAMA3, logits_soft_cap=30.0), 90)}
    assert any("softcap" in n for n in capped) and not any("softcap" in s.name for s in specs)
    assert {s.name for s in model_specs(dataclasses.replace(LLAMA3, qk_norm=True), 90)} - {s.name for s in specs}
    assert {s.name for s in model_specs(dataclasses.replace(LLAMA3, rope_interleave=True, rotary_dim=64), 90)} - {
        s.name for s in specs
    }


@pytest.mark.parametrize(
    ("source", "want"),
    [
        (
            {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576, "intermediate_size": 1536, "torch_dtype": "bfloat16"},
            SMOLLM2,
        ),
        (
            {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096, "intermediate_size": 14336, "dtype": "torch.float16"},
            dataclasses.replace(LLAMA3, dtype="float16"),
        ),
        (
            {
                "model_type": "gemma2", "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "hidden_size": 3584, "intermediate_size": 14336,
                "hidden_activation": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0,
            },
            ModelConfig(16, 8, 256, 3584, 14336, activation="gelu_pytorch_tanh", logits_soft_cap=50.0, gemma_norm=True),
        ),
        (
            {"model_type": "phi", "num_attention_heads": 32, "hidden_size": 2048, "intermediate_size": 8192, "partial_rotary_factor": 0.5},
            ModelConfig(32, 32, 64, 2048, 8192, rotary_dim=32),
        ),
    ],
    ids=["smollm2", "llama3", "gemma2", "partial rotary"],
)  # fmt: skip
def test_config_of_transformers(source, want):
    assert ModelConfig.of(source) == want
    assert ModelConfig.of(types.SimpleNamespace(**source)) == want
    assert ModelConfig.of(want) is not None and ModelConfig.of(want, dtype="float16").dtype == "float16"


def test_real_transformers_config():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_attention_heads=9, num_key_value_heads=3, hidden_size=576, intermediate_size=1536
    )
    assert ModelConfig.of(config, dtype="bfloat16") == SMOLLM2


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        ({"num_qo_heads": 0}, ValueError, "ModelConfig: num_qo_heads is no size: got 0"),
        ({"hidden_size": 1.5}, ValueError, "hidden_size is no size: got 1.5"),
        ({"num_kv_heads": 4}, ValueError, "num_qo_heads is no multiple of num_kv_heads: got 9, wanted a multiple of 4"),
        ({"activation": "relu"}, ValueError, "activation is unknown: got 'relu', wanted one of silu"),
        ({"rotary_dim": 65}, ValueError, "rotary_dim is out of range: got 65"),
        ({"dtype": "int3"}, TypeError, "ModelConfig: dtype is no element type"),
        ({"no_such": 1}, TypeError, "no_such"),
    ],
)
def test_bad_config(values, error, text):
    with pytest.raises(error, match=text):
        ModelConfig.of(SMOLLM2, **values)


def test_incomplete_config():
    with pytest.raises(
        ValueError,
        match="warmup: model does not say everything: got no num_qo_heads, num_kv_heads, head_dim, intermediate_size",
    ):
        warmup({"hidden_size": 64})
    with pytest.raises(ValueError, match="does not say everything"):
        pyinfer.warmup()


@pytest.mark.parametrize(("values", "error"), [({"head_dim": 84}, ValueError), ({"dtype": "float32"}, TypeError)])
def test_model_without_cuda_kernels(values, error):
    with pytest.raises(error, match="has no CUDA kernel"):
        warmup(SMOLLM2, archs=["8.0"], **values)


@pytest.mark.compile
@pytest.mark.timeout(600)
def test_warmup_compiles_everything_once(tmp_path, monkeypatch):
    """Also the budget of R2: a set of decode, prefill and all that goes with it takes under 10 s on four cores."""
    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(tmp_path))
    compiler.forget()
    seen = []
    built = pyinfer.warmup(
        LLAMA3, archs=["9.0"], progress=lambda done, total, artifact: seen.append((done, total, artifact.name))
    )
    specs = model_specs(LLAMA3, 90)
    assert [a.name for a in built] == [s.name for s in specs] and {a.arch for a in built} == {"90a"}
    assert [s[:2] for s in seen] == [(i, len(specs)) for i in range(1, len(specs) + 1)]
    assert all(s.is_built("90a") for s in specs)
    compiler.forget()
    monkeypatch.setattr(compiler, "compile_source", lambda *args: pytest.fail("compiled again"))
    assert all(a.cached for a in warmup(LLAMA3, archs=["9.0"]))
    seconds = sum(a.cpu_seconds for a in built)
    assert seconds < 40, f"{seconds:.1f} s of one CPU"
    compiler.forget()


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_nothing_is_left_to_compile(tmp_path, monkeypatch):
    """After a warm-up the operators of a model run with compiling forbidden."""
    import torch

    monkeypatch.setenv("PYINFER_WORKSPACE_BASE", str(tmp_path))
    model = SMOLLM2
    from pyinfer.core import launch

    asked = []
    load = launch.load

    def spy(spec, device=None):
        asked.append(spec)
        return load(spec, device)

    monkeypatch.setattr(launch, "load", spy)
    from pyinfer.core.device import arch_number_of

    warmup(model)
    monkeypatch.setenv("PYINFER_JIT", "error")
    warm = set(model_specs(model, arch_number_of(0)))
    for module in _family_modules():  # kernels that earlier tests loaded must not hide a missing one
        for value in list(vars(module).values()):
            if hasattr(value, "cache_clear") and getattr(value, "__module__", "").startswith("pyinfer."):
                value.cache_clear()
    _run_a_model(torch, model)
    assert asked and set(asked) <= warm, sorted(s.name for s in set(asked) - warm)


def _family_modules():
    import sys

    return [
        m for name, m in sys.modules.items() if name.startswith("pyinfer.") and m is not None and name.count(".") <= 2
    ]


def _run_a_model(torch, model):
    """One layer of everything, prefill and decode, through the public names."""
    dtype, device = getattr(torch, model.dtype), "cuda"
    lengths, page_size = [5, 130, 16], 16
    tokens = sum(lengths)

    def random(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    hidden, weight = random(tokens, model.hidden_size), random(model.hidden_size)
    pyinfer.rmsnorm(hidden, weight)
    pyinfer.fused_add_rmsnorm(hidden, random(tokens, model.hidden_size), weight)
    pyinfer.silu_and_mul(random(tokens, 2 * model.intermediate_size))
    q, k, v = (
        random(tokens, model.num_qo_heads, model.head_dim),
        random(tokens, model.num_kv_heads, model.head_dim),
        random(tokens, model.num_kv_heads, model.head_dim),
    )
    positions = torch.cat([torch.arange(n) for n in lengths]).to(torch.int32).to(device)
    q, k = pyinfer.apply_rope_pos_ids(q, k, positions)

    pages = [-(-(n + 1) // page_size) for n in lengths]
    indptr = torch.tensor(np.cumsum([0, *pages]), dtype=torch.int32)
    indices = torch.arange(sum(pages), dtype=torch.int32)
    last = torch.tensor([(n - 1) % page_size + 1 for n in lengths], dtype=torch.int32)
    cache = torch.zeros(sum(pages), 2, page_size, model.num_kv_heads, model.head_dim, dtype=dtype, device=device)
    qo_indptr = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    batch_indices, where = pyinfer.get_batch_indices_positions(qo_indptr.to(device), seq_lens, tokens)
    pyinfer.append_paged_kv_cache(
        k, v, batch_indices, where, cache, indices.to(device), indptr.to(device), last.to(device)
    )

    heads = (model.num_qo_heads, model.num_kv_heads, model.head_dim)
    workspace = torch.empty(1 << 20, dtype=torch.uint8, device=device)
    prefill = pyinfer.BatchPrefillWithPagedKVCacheWrapper(workspace)
    prefill.plan(qo_indptr, indptr, indices, last, *heads, page_size, causal=True, q_data_type=dtype)
    prefill.run(q, cache)
    decode = pyinfer.BatchDecodeWithPagedKVCacheWrapper(workspace)
    decode.plan(indptr, indices, last, *heads, page_size, q_data_type=dtype)
    out = decode.run(random(3, model.num_qo_heads, model.head_dim), cache)
    lse = torch.zeros(3, model.num_qo_heads, device=device)
    pyinfer.merge_state(out, lse, out, lse)
    pyinfer.single_decode_with_kv_cache(q[0], k, v)
    pyinfer.single_prefill_with_kv_cache(q, k, v, causal=True)

    probs = pyinfer.softmax(torch.randn(3, 1000, device=device))
    pyinfer.sampling_from_probs(probs)
    pyinfer.top_k_top_p_sampling_from_probs(probs, 10, 0.9)
    pyinfer.min_p_sampling_from_probs(probs, 0.1)
    torch.cuda.synchronize()
