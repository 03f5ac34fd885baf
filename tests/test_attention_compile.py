"""The attention kernels compile everywhere, within registers and shared memory, without spills, in under two seconds of one core. No GPU needed."""

from __future__ import annotations

import time

import pytest

from pyinfer.jit import attention, compiler, env
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


@pytest.mark.slow
@pytest.mark.parametrize("arch", env.NATIVE_ARCHS)
def test_every_spec_compiles_without_spills(arch: str) -> None:
    specs = attention.all_specs((env.arch_number(arch),))
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
@pytest.mark.parametrize("dim", attention.HEAD_DIMS)
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 5000])
def test_config(arch: int, dim: int, rows: int) -> None:
    """Every candidate fits the architecture; the heights are those the scheduler and the launch functions rely on."""
    per_block, per_sm = attention.smem_limits(arch)
    candidates = attention.candidate_configs(arch, dim, dim, rows)
    assert attention.attention_config(arch, "float16", dim, dim, rows) == candidates[0]
    for c in candidates:
        assert c.kind == ("decode" if rows <= 16 else "prefill")
        assert c.tile_q == 16 if rows <= 16 else c.tile_q in (64, 128)
        assert c.smem + STATIC_SMEM <= per_block and c.ctas_per_sm * (c.smem + 1024 + STATIC_SMEM) <= per_sm
        assert c.ctas_per_sm * c.block[0] * 64 <= REGISTERS_PER_SM
    # A plan knows only its tile_q: that must lead back to the same configuration.
    assert attention.attention_config(arch, "float16", dim, dim, candidates[0].tile_q) == candidates[0]


def test_specs_have_distinct_names() -> None:
    specs = attention.all_specs()
    assert len({s.name for s in specs}) == len(specs) >= 72


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("float32", 128, 128), TypeError, "dtype has no CUDA kernel"),
        (("float16", 96, 96), ValueError, "head_dim has no CUDA kernel"),
        (("float16", 128, 64), ValueError, "head_dim has no CUDA kernel"),
    ],
)
def test_config_refuses(arguments: tuple, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        attention.attention_config(90, *arguments, 1)


def test_flashinfer_factories() -> None:
    """FlashInfer's names and argument order give the specs that the launch functions ask for."""
    f16 = "float16"
    decode = attention.gen_batch_decode_module(f16, f16, f16, "int32", 128, 128, 0, True, False)
    prefill = attention.gen_batch_prefill_module("fa2", f16, f16, f16, "int32", 64, 64, 0, False, True, False)
    archs = {env.arch_number(a) for a in env.default_archs()}
    wanted = {attention.gen_attention(attention.attention_config(a, f16, 128, 128, 1), f16, 128, 128) for a in archs}
    assert set(decode.specs) == wanted
    assert all("prefill_sm80" in s.name or "decode_sm80" in s.name for s in prefill.specs)
    assert all("softcap" in s.name and "_plan_" in s.name and "_d64_" in s.name for s in prefill.specs)
    assert all("_single_" in s.name for s in attention.gen_single_decode_module(f16, f16, f16, 256, 256).specs)
    assert all("_single_" in s.name for s in attention.gen_single_prefill_module("auto", f16, f16, f16, 256, 256).specs)
    for bad in (
        ("fa3", f16, f16, f16, "int32"),
        ("fa2", f16, f16, f16, "int64"),
        ("fa2", f16, "bfloat16", f16, "int32"),
    ):
        with pytest.raises((ValueError, TypeError), match="gen_batch_prefill_module"):
            attention.gen_batch_prefill_module(*bad, 128, 128)
    with pytest.raises(ValueError, match="pos_encoding_mode"):
        attention.gen_batch_decode_module(f16, f16, f16, "int32", 128, 128, 1)
