"""The attention kernels compile everywhere, within registers and shared memory, without spills, in under two seconds of one core. No GPU needed."""

from __future__ import annotations

import os
import time

import pytest

from pyinfer.core.params import f32, ptr
from pyinfer.jit import attention, compiler, env
from pyinfer.jit.attention_options import PLAIN, AttentionExtras, AttentionOptions, UserVariant, check_extras
from pyinfer.jit.spec import JitSpec, build_jit_specs

pytestmark = pytest.mark.compile

REGISTERS_PER_SM = 65536
STATIC_SMEM = 128  # one flag, aligned as the dynamic part
LIMIT_SECONDS = 2.0


def covering_specs(arch: int) -> list[JitSpec]:
    """A spec of every head dimension and tile height, the other constants taking turns."""
    found = []
    for i, (dim, rows) in enumerate((d, r) for d in attention.HEAD_DIMS for r in attention.ROW_CLASSES):
        dtype = attention.DTYPES[i % 2]
        config = attention.attention_config(arch, dtype, dim, dim, rows)
        source = ("plan", "single")[(i // 2) % 2]
        variant = ("plain", "softcap")[(i + arch) // 3 % 2]
        found.append(attention.gen_attention(config, dtype, dim, dim, source, variant))
    return found


def check_resources(spec: JitSpec, arch: str) -> str:
    """One line of the table; asserts what the compiler reports."""
    used = spec.build(arch).resources
    threads = spec.block[0]
    blocks = dict(spec.constants)["CTAS_PER_SM"]
    per_block, per_sm = attention.smem_limits(env.arch_number(arch))
    line = (
        f"{arch:5s} {spec.name:75s} {used.registers:3d} registers {(spec.smem + used.smem) / 1024:6.1f} KiB x {blocks}"
    )
    assert used.spill_stores == used.spill_loads == used.stack == 0, f"{line}: {used}"
    assert used.registers > 0 and -(-used.registers // 8) * 8 * threads * blocks <= REGISTERS_PER_SM, line
    assert used.smem <= STATIC_SMEM, line
    assert spec.smem + used.smem <= per_block and blocks * (spec.smem + used.smem + 1024) <= per_sm, line
    return line


@pytest.mark.parametrize("arch", env.NATIVE_ARCHS)
def test_compiles_without_spills(arch: str) -> None:
    lines = [check_resources(spec, arch) for spec in covering_specs(env.arch_number(arch))]
    print("\n" + "\n".join(lines))


@pytest.mark.parametrize("arch", ["80", "90a"])
def test_options_compile_without_spills(arch: str) -> None:
    """Every option, alone or where it costs most."""
    number = env.arch_number(arch)
    everything = AttentionOptions(alibi=True, mask=True, multi_item=True, sinks=True)
    config = attention.attention_config(number, "bfloat16", 128, 128, 128, None, everything)
    largest = attention.gen_attention(config, "bfloat16", 128, 128, "plan", "softcap", options=everything)
    lines = [check_resources(spec, arch) for spec in (*attention.option_specs(number), largest)]
    print("\n" + "\n".join(lines))


def test_user_variant() -> None:
    """A user's source with all hooks, extra tensors and scalars, on both phases; its line breaks stay out of the source's head comment."""
    source = """
PYINFER_DEVICE float user_logits_transform(const Params& p, float logit, const VariantPlace& at) {
    return logit + p.bias[at.qo_head] * p.strength;
}
PYINFER_DEVICE bool user_mask(const Params& p, const VariantPlace& at) {
    return (at.q_token + at.kv_token) % 2 == 0;
}
PYINFER_DEVICE float user_output_transform(const Params& p, float value, const VariantPlace& at, int column) {
    return value * p.strength;
}
"""
    fields = (ptr("bias", "const float"), f32("strength"))
    options = AttentionOptions(user=UserVariant("biased", source, ("logits", "mask", "output"), fields))
    for i, rows in enumerate(attention.ROW_CLASSES):
        config = attention.attention_config(90, "bfloat16", 128, 128, rows, None, options)
        spec = attention.gen_attention(config, "bfloat16", 128, 128, ("plan", "single")[i % 2], options=options)
        assert "user_biased" in spec.name
        check_resources(spec, "90a")
    text = spec.source("90a")
    assert text.count("user_mask(const Params") == 1 and "p.strength" in text


@pytest.mark.slow
@pytest.mark.parametrize("arch", env.NATIVE_ARCHS)
def test_every_spec_compiles_without_spills(arch: str) -> None:
    """All of them for each architecture; a fifth, in turns, with PYINFER_COMPILE_ALL=0 (as in test_compile_all)."""
    specs = attention.all_specs((env.arch_number(arch),))
    if os.environ.get("PYINFER_COMPILE_ALL", "1") == "0":
        specs = specs[env.NATIVE_ARCHS.index(arch) :: len(env.NATIVE_ARCHS)]
    build_jit_specs(specs, archs=[arch])  # on all cores; the rest finds them built
    lines = [check_resources(spec, arch) for spec in specs]
    print("\n" + "\n".join(lines))


def test_compiles_as_ptx() -> None:
    """The PTX of 8.0, which the driver compiles for any newer GPU."""
    config = attention.attention_config(80, "bfloat16", 128, 128, 128)
    code = attention.gen_attention(config, "bfloat16", 128, 128).build("compute_80").code
    assert b".target sm_80" in code and b"griddepcontrol" not in code


@pytest.mark.parametrize("dim", attention.HEAD_DIMS)
def test_compile_time(dim: int) -> None:
    """The largest kernel of each head dimension, compiled afresh, in time of this thread's core (other tests may share the machine)."""
    config = attention.attention_config(90, "bfloat16", dim, dim, 128)
    spec = attention.gen_attention(config, "bfloat16", dim, dim, "plan", "softcap")
    source = compiler.render(spec, "90a")
    headers = compiler.included_headers(source)
    start = time.thread_time()
    compiler.compile_source(source, f"{spec.name}.cu", headers, compiler.options_for(spec, "90a"), spec, "90a")
    seconds = time.thread_time() - start
    print(f"\n{spec.name}: {seconds:.2f} s")
    assert 0.05 < seconds < LIMIT_SECONDS


@pytest.mark.parametrize("arch", [80, 86, 87, 89, 90, 100, 120])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 5000])
@pytest.mark.parametrize(
    "dims", [(64, 64), (128, 128), (256, 256), (8, 8), (72, 200), (192, 128), (104, 256), (256, 8)]
)
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(rope=(1.0, 1e4)), AttentionOptions(mask=True)])
def test_config(arch: int, dims: tuple[int, int], rows: int, kv_dtype: str | None, options: AttentionOptions) -> None:
    """Every candidate fits the architecture; the heights are those the scheduler and the launch functions rely on."""
    per_block, per_sm = attention.smem_limits(arch)
    candidates = attention.candidate_configs(arch, *dims, rows, 2 if kv_dtype is None else 1, options)
    assert attention.attention_config(arch, "float16", *dims, rows, kv_dtype, options) == candidates[0]
    for c in candidates:
        assert c.kind == ("decode" if rows <= 16 else "prefill")
        assert c.tile_q == 16 if rows <= 16 else c.tile_q in (64, 128)
        assert c.smem + STATIC_SMEM <= per_block and c.ctas_per_sm * (c.smem + 1024 + STATIC_SMEM) <= per_sm
        assert c.ctas_per_sm * c.block[0] * 64 <= REGISTERS_PER_SM
    # A plan knows only its tile_q: that must lead back to the same configuration.
    again = attention.attention_config(arch, "float16", *dims, candidates[0].tile_q, kv_dtype, options)
    assert again == candidates[0]
    # Sinks come with a run, when the plan is made: they must not change the tiles.
    with_sinks = options._replace(sinks=True)
    assert attention.attention_config(arch, "float16", *dims, rows, kv_dtype, with_sinks) == candidates[0]


def test_specs_have_distinct_names() -> None:
    specs = attention.all_specs()
    assert len({s.name for s in specs}) == len(specs) >= 72


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("float32", 128, 128), TypeError, "dtype has no CUDA kernel"),
        (("float16", 100, 96), ValueError, "head_dim has no CUDA kernel: got qk 100, vo 96, wanted multiples of 8"),
        (("float16", 128, 264), ValueError, "head_dim has no CUDA kernel"),
        (("float16", 0, 64), ValueError, "head_dim has no CUDA kernel"),
        (
            ("float16", 64, 64, 1, "bfloat16"),
            TypeError,
            "kv_dtype has no CUDA kernel: got bfloat16, wanted float16, float8",
        ),
    ],
)
def test_config_refuses(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        attention.attention_config(90, *(*arguments, 1)[:4], *arguments[4:])


def test_output_dtype_refused() -> None:
    config = attention.attention_config(90, "float16", 64, 64, 1)
    with pytest.raises(
        TypeError, match="out_dtype has no CUDA kernel: got float8_e4m3fn, wanted float16, bfloat16 or float32"
    ):
        attention.gen_attention(config, "float16", 64, 64, out_dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    ("options", "extras", "text"),
    [
        (
            AttentionOptions(mask=True),
            AttentionExtras(),
            "mask is missing: got no address, wanted a tensor on the device",
        ),
        (AttentionOptions(sinks=True), AttentionExtras(), "sinks is missing"),
        (
            PLAIN,
            AttentionExtras(sinks_ptr=16),
            "sinks was not planned: got an address, wanted none. Ask for it in the options.",
        ),
        (AttentionOptions(multi_item=True), AttentionExtras(prefix_len_ptr=16), "token_pos_in_items_ptr is missing"),
        (PLAIN, AttentionExtras(user=(1.0,)), "extra arguments do not fit the variant: got 1, wanted 0"),
    ],
)
def test_extras_must_fit(options: AttentionOptions, extras: AttentionExtras, text: str) -> None:
    with pytest.raises(ValueError, match=f"attention: {text}"):
        check_extras("attention", options, extras)


@pytest.mark.parametrize("source", attention.SOURCES)
def test_parameters_of_options(source: str) -> None:
    """A plain kernel's struct has no field of an option; the five addresses that a bound launch rewrites stay in front."""
    plain = [f.name for f in attention.attention_params(source).fields]
    options = AttentionOptions(True, (1.0, 1e4), True, True, True)
    full = [f.name for f in attention.attention_params(source, options, 128).fields]
    added = ["rope_frequency", "mask", "mask_indptr", "prefix_len", "token_pos", "token_pos_len", "sinks"]
    assert sorted(set(full) - set(plain)) == sorted(added) and [n for n in full if n in plain] == plain
    assert full[:5] == plain[:5] == ["q", "k", "v", "out", "lse"]
    assert full.index("rope_frequency") == plain.index("logit_scale")


def test_flashinfer_factories() -> None:
    """FlashInfer's names and argument order give the specs that the launch functions ask for."""
    f16 = "float16"
    decode = attention.gen_batch_decode_module(f16, f16, f16, "int32", 128, 128, 0, True, False)
    prefill = attention.gen_batch_prefill_module("fa2", f16, f16, f16, "int32", 64, 64, 0, False, True, False)
    archs = {env.arch_number(a) for a in env.default_archs()}
    wanted = {attention.gen_attention(attention.attention_config(a, f16, 128, 128, 1), f16, 128, 128) for a in archs}
    assert wanted <= set(decode.specs) == {s for a in archs for s in attention.planned_decode_specs(a, f16, 128, 128)}
    assert all("prefill_sm80" in s.name or "decode_sm80" in s.name for s in prefill.specs)
    assert all("softcap" in s.name and "_single_" not in s.name and "_d64_" in s.name for s in prefill.specs)
    assert all("_single_" in s.name for s in attention.gen_single_decode_module(f16, f16, f16, 256, 256).specs)
    assert all("_single_" in s.name for s in attention.gen_single_prefill_module("auto", f16, f16, f16, 256, 256).specs)
    for bad in (
        ("cutlass", f16, f16, f16, "int32"),
        ("fa2", f16, f16, f16, "int64"),
    ):
        with pytest.raises((ValueError, TypeError), match="gen_batch_prefill_module"):
            attention.gen_batch_prefill_module(*bad, 128, 128)
    with pytest.raises(TypeError, match="kv_dtype"):
        attention.gen_batch_prefill_module("fa2", f16, "bfloat16", f16, "int32", 128, 128)
    with pytest.raises(ValueError, match="pos_encoding_mode is no positional encoding"):
        attention.gen_batch_decode_module(f16, f16, f16, "int32", 128, 128, 3)
    rotated = attention.gen_batch_decode_module(f16, "float8_e5m2", "float32", "int32", 128, 128, 1)
    assert all("_kve5m2_of32_" in s.name and "_rope_" in s.name for s in rotated.specs)
    biased = attention.gen_single_prefill_module("auto", f16, f16, f16, 96, 64, 2, False, True, True)
    assert all("_d96x64_" in s.name and "_softcap_alibi_" in s.name for s in biased.specs)
