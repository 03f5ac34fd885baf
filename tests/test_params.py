"""Host and device agree about parameter structs: the C++ compiler's offsets are those of the packed bytes."""

from __future__ import annotations

import pickle
import struct

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyinfer.core.params import Field, ParamStruct, f32, i32, i64, ptr, u32, u64, u64_array
from pyinfer.jit import compiler

KINDS = {"ptr": ("Q", 8), "i32": ("i", 4), "u32": ("I", 4), "i64": ("q", 8), "u64": ("Q", 8), "f32": ("f", 4)}


def offsets_of(params: ParamStruct) -> list[int]:
    """Where each field's bytes lie in what `pack` gives, found by packing one value other than zero at a time."""
    found = []
    for i, f in enumerate(params.fields):
        values: list = [bytes(8 * g.count) if g.count else 0 for g in params.fields]
        values[i] = (
            b"\xff" * (8 * f.count)
            if f.count
            else {"f32": float("nan"), "i32": -1, "i64": -1}.get(f.kind, 2 ** (8 * KINDS[f.kind][1]) - 1)
        )
        packed = np.frombuffer(params.pack(*values), np.uint8)
        size = 8 * f.count if f.count else KINDS[f.kind][1]
        used = np.flatnonzero(packed)
        # A float NaN is 0x7fc00000: its two low bytes are zero, its highest stands last.
        begin = int(used[-1]) + 1 - size
        assert packed[: max(begin, 0)].sum() == 0 and packed[begin + size :].sum() == 0
        found.append(begin)
    return found


def check_with_the_compiler(params: ParamStruct) -> None:
    source = '#include "common/types.cuh"\nusing scalar_t = float;\n' + params.cpp_source()
    # __INTADDR__ is what offsetof stands for in the front end of NVRTC, which has no stddef.h.
    for f, offset in zip(params.fields, offsets_of(params), strict=True):
        source += f'\nstatic_assert(__INTADDR__(&(((Params*)0)->{f.name})) == {offset}, "{f.name}");'
    # The size the host packs is what the driver reads: no tail may be missing.
    source += f"\nstatic_assert(sizeof(Params) == {len(params.pack(*[bytes(8 * f.count) if f.count else 0 for f in params.fields]))} && alignof(Params) == 8);"
    compiler.compile_source(
        source, "params.cu", compiler.included_headers(source), ("-arch=compute_80", "-std=c++17", "-default-device")
    )


fields = st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=24)


@pytest.mark.compile
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(kinds=fields, arrays=st.lists(st.integers(1, 16), max_size=2))
def test_layout_agrees_with_the_compiler(kinds, arrays):
    head = [u64_array(f"array{i}", n) for i, n in enumerate(arrays)]
    check_with_the_compiler(
        ParamStruct(
            "Random",
            *head,
            *[Field(f"f{i}", kind, "const scalar_t" if kind == "ptr" else "") for i, kind in enumerate(kinds)],
        )
    )


@pytest.mark.compile
def test_wrong_layout_is_noticed(monkeypatch):
    """The check above can fail: a packer that does not align is caught by the compiler."""
    params = ParamStruct("Wrong", i32("a"), ptr("b"), i32("c"))
    object.__setattr__(params, "packer", struct.Struct("<iQi"))
    with pytest.raises(compiler.JitError, match="static assertion failed"):
        check_with_the_compiler(params)


def test_values_arrive():
    params = ParamStruct("All", ptr("p"), i32("i"), u32("u"), i64("l"), u64("s"), f32("f"))
    data = params.pack(2**63 + 1, -5, 2**32 - 1, -(2**40), 2**64 - 1, 1.5)
    assert struct.unpack("@QiIqQf0P", data) == (2**63 + 1, -5, 2**32 - 1, -(2**40), 2**64 - 1, 1.5)
    assert len(data) == params.size == 40


def test_cpp_source():
    params = ParamStruct(
        "Doc", ptr("x", "const scalar_t", "[rows, n]"), ptr("raw"), i64("stride", "elements"), i32("rows")
    )
    source = params.cpp_source()
    assert (
        "const scalar_t* x;" in source
        and "// [rows, n]" in source
        and "const void* raw;" in source
        and "int64_t stride;" in source
    )
    assert (
        source.splitlines()[0] == "struct alignas(8) Params {"
        and "sizeof(Params) == 32" in source
        and "disagree about Doc" in source
    )


@pytest.mark.parametrize("values", [(1,), (1, 2, 3), (1, 2**31), (1, 1.5), (None, 1), (-1, "x")])
def test_wrong_values_do_not_pack(values):
    with pytest.raises((struct.error, OverflowError, TypeError)):
        ParamStruct("Two", ptr("p"), i32("n")).pack(*values)


def test_declaration_errors():
    with pytest.raises(ValueError, match="Twice: field a is declared twice"):
        ParamStruct("Twice", ptr("a"), i32("a"))
    with pytest.raises(ValueError, match="Empty: there are no fields"):
        ParamStruct("Empty")
    with pytest.raises(ValueError, match="Late: arrays must come first"):
        ParamStruct("Late", i32("a"), u64_array("b", 2))


def test_is_a_value():
    params = ParamStruct("V", ptr("a", "const float"), f32("b"))
    twin = pickle.loads(pickle.dumps(params))
    assert twin == params and hash(twin) == hash(params) and twin.pack(1, 2.0) == params.pack(1, 2.0)
    assert ParamStruct("V", ptr("a", "float"), f32("b")) != params
