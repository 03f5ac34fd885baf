"""Variants in CUDA kernels without a GPU: what is linked, for every architecture, what the cache takes for the same kernel, and FlashInfer's structs."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import pyinfer
from pyinfer import AttentionVariant
from pyinfer.core.dtypes import BFLOAT16
from pyinfer.jit import attention, compiler, env, variant_link
from pyinfer.jit.attention_options import AttentionOptions
from pyinfer.jit.customize import gen_customize_batch_prefill_module, gen_customize_single_decode_module
from pyinfer.jit.spec import JitSpec
from tests.arrays import Backend, assert_close
from tests.reference.variants import variant_attention
from tests.variant_cases import EXAMPLES

ARCHS = ("80", "90a", "100a", "120a", "compute_80")


def spec_of(variant: AttentionVariant, arch: str, rows: int, source: str = "plan", dim: int = 128) -> JitSpec:
    options = AttentionOptions(user=variant.user)
    config = attention.attention_config(env.arch_number(arch), "bfloat16", dim, dim, rows, None, options)
    return attention.gen_attention(config, "bfloat16", dim, dim, source, options=options)


@pytest.mark.compile
@pytest.mark.parametrize("arch", ARCHS)
def test_linked_for_every_architecture(arch: str) -> None:
    """Both phases: a cubin without spills, or PTX; the user's function is no call any more, and nothing is computed in float64."""
    variant = EXAMPLES["softcap_alibi"].variant
    for rows, source in ((16, "plan"), (128, "single")):
        spec = spec_of(variant, arch, rows, source)
        built = spec.build(arch)
        assert built.seconds < 30
        if arch.startswith("compute_"):
            text = built.code.decode()
            assert f".entry {spec.name}(" in text and ".target sm_80" in text
            assert "pyinfer_user" not in text and "call" not in re.findall(r"^\s+(call)", text, re.MULTILINE)
            assert ".f64" not in text
        else:
            assert built.resources.registers > 64, "read from the linker's log"
            assert built.resources.spill_stores == built.resources.spill_loads == built.resources.stack == 0
            assert built.code[:4] == b"\x7fELF" and spec.name.encode() in built.code
            assert b"pyinfer_user" not in built.code, "inlined, and removed"


@pytest.mark.compile
@pytest.mark.parametrize("name", [n for n in EXAMPLES if n != "softcap_alibi"])
def test_examples_do_not_spill(name: str) -> None:
    """Each on one architecture and phase, in turns."""
    i = list(EXAMPLES).index(name)
    arch = ARCHS[i % 4]
    built = spec_of(EXAMPLES[name].variant, arch, (128, 16)[i // 4 % 2]).build(arch)
    assert built.resources.spill_stores == built.resources.stack == 0


@pytest.mark.compile
def test_64_bits_stay_away() -> None:
    """Mixed arithmetic, of which Python's own types would make float64 and int64, in the PTX of the function alone."""

    def mixed(score, q_pos, kv_idx):
        distance = q_pos - kv_idx
        x = 0.5
        if distance % 3 == 0 and distance // 2 < 100:
            x += 2 * distance / 3
        return score * 1.5 - x + (1 if kv_idx > 7 else 0.25)

    variant = AttentionVariant("mixed", logits=mixed)
    plain = (
        spec_of(AttentionVariant("same", logits=lambda score: score), "compute_80", 16)
        .build("compute_80")
        .code.decode()
    )
    text = spec_of(variant, "compute_80", 16).build("compute_80").code.decode()
    assert ".f64" not in text
    assert text.count("rem.s64") == text.count("div.s64") == 0
    assert text.count(".s64") <= plain.count(".s64") + 2  # addresses have some of their own


@pytest.mark.compile
def test_cache_key_holds_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another function, constant or toolchain is another kernel; the same function written twice is the same one."""

    def make(factor: float) -> AttentionVariant:
        return AttentionVariant("scaled", logits=lambda score: score * factor)

    one, same, other = (spec_of(make(f), "90a", 16) for f in (2.0, 2.0, 3.0))
    assert one == same and one != other and one.name == other.name
    keys = {compiler.cache_key(s, "90a") for s in (one, other)}
    assert len(keys) == 2 and compiler.cache_key(same, "90a") in keys
    quick = {compiler._quick_key(s, "90a") for s in (one, other)}
    assert len(quick) == 2
    built = one.build("90a")
    assert not built.cached or built.key == compiler.cache_key(same, "90a")
    compiler.forget()
    again = same.build("90a")
    assert again.cached and again.code == built.code, "found on disk"

    monkeypatch.setattr(variant_link, "toolchain", lambda: "numba-cuda 99")
    compiler.cache_key.cache_clear()
    assert compiler.cache_key(one, "90a") not in keys
    monkeypatch.undo()
    compiler.cache_key.cache_clear()


@pytest.mark.compile
def test_no_numba_cuda_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(AttentionVariant("nowhere", logits=lambda score: score + 0.0625), "90a", 16)
    variant_link._numba_cuda.cache_clear()
    variant_link._operations.cache_clear()
    variant_link.compile_function.cache_clear()
    monkeypatch.setitem(sys.modules, "numba_cuda", None)
    try:
        with pytest.raises(
            pyinfer.jit.JitError,
            match=r"Numba-CUDA is not installed .*pip install 'pyinfer-kernels\[cu12,variants-cu12\]'",
        ):
            spec.build("90a")
    finally:
        variant_link._numba_cuda.cache_clear()
        variant_link._operations.cache_clear()


@pytest.mark.compile
def test_no_nvjitlink_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(AttentionVariant("unlinked", logits=lambda score: score + 0.03125), "90a", 16)
    variant_link._operations()  # Numba-CUDA imports the binding, too
    variant_link._nvjitlink.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvjitlink", None)
    monkeypatch.delattr("cuda.bindings.nvjitlink", raising=False)
    try:
        with pytest.raises(pyinfer.jit.JitError, match="nvJitLink library could not be loaded"):
            spec.build("90a")
    finally:
        variant_link._nvjitlink.cache_clear()


@pytest.mark.compile
def test_linker_and_compiler_errors_are_told() -> None:
    """A function that Numba cannot type; a source that declares what nobody defines."""

    def sometimes(score):
        if score > 0:
            return score

    with pytest.raises(pyinfer.jit.JitError, match="Numba-CUDA could not compile pyinfer_user_logits"):
        spec_of(AttentionVariant("sometimes", logits=sometimes), "90a", 16).build("90a")
    variant = AttentionVariant("linked", logits=lambda score: score + 0.015625)
    broken = variant.user._replace(
        name="broken",
        source=variant.user.source.replace("pyinfer_user_logits", "pyinfer_nobody"),
    )
    options = AttentionOptions(user=broken)
    config = attention.attention_config(90, "bfloat16", 128, 128, 16, None, options)
    with pytest.raises(
        pyinfer.jit.JitError,
        match=r"(?s)nvJitLink could not link .*user_broken.*for 90a.*pyinfer_nobody.*as new as .*NVRTC \d+",
    ):
        attention.gen_attention(config, "bfloat16", 128, 128, options=options).build("90a")


# ---- FlashInfer's structs -----------------------------------------------------------------------------------------------------------
SIGMOID = """
struct FlashSigmoid : AttentionVariantBase {
    static constexpr bool use_softmax = false;
    uint32_t window_left, qo_len, kv_len;
    float scale, bias;
    template <typename Params>
    __device__ __host__ FlashSigmoid(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
        qo_len = params.get_qo_len(batch_idx);
        kv_len = params.get_kv_len(batch_idx);
        window_left = kv_len;
        scale = params.logits_scale * math::log2e;
        bias = params.sigmoid_bias * math::log2e;
    }
    REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
        return math::ptx_rcp(1.f + math::ptx_exp2(-float(logits * scale + bias)));
    })
};
"""
EVEN = """
struct EvenKeys : AttentionVariantBase {
    uint32_t qo_len, kv_len;
    float sm_scale_log2;
    template <typename Params>
    __device__ __host__ EvenKeys(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
        qo_len = params.get_qo_len(batch_idx);
        kv_len = params.get_kv_len(batch_idx);
        sm_scale_log2 = params.sm_scale * math::log2e;
    }
    REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
        if (params.maybe_bias != nullptr) {
            return logits + params.maybe_bias[qo_head_idx] * (kv_len - qo_len + qo_idx - kv_idx);
        }
        return logits;
    })
    REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
        return kv_idx % 2 == 0;
    })
};
"""
SIGMOID_ARGS: tuple[Any, ...] = (
    [],
    [],
    ["logits_scale", "sigmoid_bias"],
    ["double", "double"],
    "FlashSigmoid",
    SIGMOID,
)
EVEN_ARGS: tuple[Any, ...] = (["maybe_bias"], ["float"], ["sm_scale"], ["double"], "EvenKeys", EVEN)
F16 = ("float16", "float16", "float16")


@pytest.mark.compile
def test_structs_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    for arch, module in (
        ("80", gen_customize_single_decode_module("sigmoid", *F16, 64, 64, *SIGMOID_ARGS)),
        ("90a", pyinfer.jit.gen_customize_batch_decode_module("even", *F16, "int32", 64, 64, *EVEN_ARGS)),
    ):
        monkeypatch.setenv("PYINFER_CUDA_ARCH_LIST", arch)
        assert {s.name.split("_f16")[0] for s in module.specs} == {"decode_sm80"}
        assert module.specs[0].build(arch).resources.spill_stores == 0
    wide = gen_customize_batch_prefill_module("fa2", "even", *F16, "int32", 64, 64, *EVEN_ARGS)
    assert wide.specs and all("user_even" in s.name and s.name.startswith("prefill") for s in wide.specs)


@pytest.mark.gpu
def test_structs_run(backend_arrays: Backend, device: str, rng: np.random.Generator) -> None:
    """On every operator that takes one, with an optional tensor and without."""
    backend = backend_arrays

    def draw(*shape: int) -> tuple[Any, np.ndarray]:
        x = backend.array(rng.standard_normal(shape), "float16")
        return x, backend.float64(x)

    q, q64 = draw(20, 4, 64)
    k, k64 = draw(75, 2, 64)
    v, v64 = draw(75, 2, 64)
    bias = (rng.standard_normal(4) / 16).astype(np.float32)
    loose = {"rtol": 4e-3, "atol": 2e-3}

    def even(causal: bool, with_bias: bool, rows: slice = slice(None)) -> np.ndarray:
        def logits(s: np.ndarray, at: Any) -> np.ndarray:
            return (s + with_bias * bias[at.head] * (at.position - at.j)) * 0.1

        return variant_attention(
            q64[rows], k64, v64, causal=causal, sm_scale=1.0, logits=logits, mask=lambda at: at.j % 2 == 0
        )[0]

    def gates(causal: bool, rows: slice = slice(None)) -> np.ndarray:
        options: dict[str, Any] = dict(causal=causal, sm_scale=1.0, softmax=False)
        return variant_attention(
            q64[rows], k64, v64, logits=lambda s, at: 1 / (1 + np.exp(-(s * 0.125 - 1))), **options
        )[0]

    sigmoid = pyinfer.jit.gen_customize_single_prefill_module("auto", "sigmoid", *F16, 64, 64, *SIGMOID_ARGS)
    got = pyinfer.prefill.single_prefill_with_kv_cache_with_jit_module(
        sigmoid.build_and_load(), q, k, v, 0.125, -1.0, mask_mode=1
    )
    assert_close(backend.float64(got), gates(True), **loose)
    module = gen_customize_single_decode_module("even", *F16, 64, 64, *EVEN_ARGS).build_and_load()
    for tensor in (None, backend.array(bias)):
        got = pyinfer.decode.single_decode_with_kv_cache_with_jit_module(module, q[-1], k, v, tensor, 0.1)
        assert_close(backend.float64(got), even(False, tensor is not None, slice(-1, None))[0], **loose)
    wrapper = pyinfer.BatchPrefillWithRaggedKVCacheWrapper(jit_args=("even", *F16, "int32", 64, 64, *EVEN_ARGS))
    wrapper.plan([0, 20], [0, 75], 4, 2, 64, causal=True)
    got = wrapper.run(q, k, v, backend.array(bias), 0.1)
    assert_close(backend.float64(got), even(True, True), **loose)
    paged = pyinfer.BatchDecodeWithPagedKVCacheWrapper(
        jit_args=("sigmoid", *F16, "int32", 64, 64, *SIGMOID_ARGS), jit_kwargs={"use_sliding_window": False}
    )
    paged.plan([0, 75], np.arange(75), [1], 4, 2, 64, 1)
    got = paged.run(q[-1:], (k, v), 0.125, -1.0)
    assert_close(backend.float64(got), gates(False, slice(-1, None)), **loose)


@pytest.mark.compile
def test_numba_cuda_beside_a_numpy_without_row_stack() -> None:
    """NumPy 2.5 removed a function that Numba-CUDA decorates: lent to it while it is imported, gone afterwards."""
    code = """
import numpy
if hasattr(numpy, "row_stack"):
    del numpy.row_stack
from pyinfer.jit.variant_link import compile_function
from tests.variant_cases import EXAMPLES
(function,) = EXAMPLES["sigmoid"].variant.user.functions
assert len(compile_function(function, (9, 0))) > 500
assert "row_stack" not in vars(numpy)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.compile
def test_a_soft_cap_in_python_costs_what_the_built_in_one_costs() -> None:
    """Instructions on floats in the PTX of both: factors that all scores share are multiplied once."""

    def capped(score, cap):
        return cap * math.tanh(score / cap)

    options = AttentionOptions(user=AttentionVariant("capped", logits=capped, params={"cap": "float32"}).user)
    config = attention.attention_config(80, "bfloat16", 128, 128, 128)
    assert config == attention.attention_config(80, "bfloat16", 128, 128, 128, None, options)
    counts = []
    for variant, chosen in (("softcap", AttentionOptions()), ("plain", options)):
        spec = attention.gen_attention(config, "bfloat16", 128, 128, variant=variant, options=chosen)
        text = spec.build("compute_80").code.decode()
        counts.append(len(re.findall(r"^\s+(?:mul|fma|add|sub|ex2|rcp|div|min|max)\.[\w.]*f32", text, re.MULTILINE)))
    assert counts[1] <= counts[0], counts  # of more than a thousand; a multiplication a score would be 32 or 64


@pytest.mark.compile
def test_built_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode and prefill, of plans and of single requests; what is built ahead is not compiled on first use."""
    variant = AttentionVariant("ahead", logits=lambda score: score * 0.75)
    asked: list[JitSpec] = []
    build = pyinfer.jit.spec.build_jit_specs
    own = spec_of(variant, "80", 16, dim=64)

    def one(specs: list[JitSpec], *args: Any, **options: Any) -> Any:
        asked.extend(specs)
        return build([own], *args, **options)

    monkeypatch.setattr("pyinfer.jit.spec.build_jit_specs", one)
    (built,) = variant.build("bfloat16", 64, archs=["8.0"])
    assert built.name == own.name and own in asked and len(set(asked)) == len(asked) >= 2 * len(attention.ROW_CLASSES)
    assert {s.name.split("_sm")[0] for s in asked} == {"decode", "prefill"}
    monkeypatch.setenv("PYINFER_JIT", "error")
    compiler.forget()
    assert spec_of(variant, "80", 16, dim=64).build("80").cached
    with pytest.raises(pyinfer.jit.JitError, match="forbids compiling on first use"):
        spec_of(variant, "80", 16, dim=72).build("80")

    def kinds(arch: str) -> set[str]:
        specs = variant_link.variant_specs(variant.user, arch, (BFLOAT16,) * 3, (128, 128))
        return {s.name.split("_bf16")[0] for s in specs}

    monkeypatch.setattr("pyinfer.jit.attention_sm90.enabled", lambda arch: arch == 90)
    assert kinds("90a") == {"decode_sm80", "prefill_sm80", "prefill_sm90"}
    assert kinds("compute_90") == kinds("80") == {"decode_sm80", "prefill_sm80"}
