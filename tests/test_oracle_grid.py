"""Every operator of attention against float64: a grid in which every two values of its options meet, and random cases beside it.

On the CPU a cut of the grid runs (`oracle_grid.KERNELS`: each combination of options is a kernel to compile); all of it with PYINFER_FULL_GRID=1, and on a
GPU.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyinfer.jit.attention_config import MAX_HEAD_DIM
from tests import oracle_cases, oracle_grid
from tests.arrays import assert_same_bits
from tests.covering import covering_array, missing_pairs
from tests.oracle_cases import Draw

EXAMPLES = int(os.environ.get("PYINFER_GRID_EXAMPLES", "0"))
"""Random cases in each part of `test_random_cases`; 0: 25 on a GPU, 2 on the CPU."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        device = metafunc.config.getoption("--device")
        found = oracle_grid.cases(device, oracle_grid.FULL)
        metafunc.parametrize("case", found, ids=[f"{i}-{c}" for i, c in enumerate(found)])


def run(case, rng, device, **kind) -> float:
    """`run_case`; where a GPU has no kernel of the family that is asked for, and says so, with the family that it chooses itself."""
    if case.backend == "fa3" and device == "cuda":
        try:
            return run_case(case, rng, device, **kind)
        except ValueError as error:
            if not oracle_cases.refused(error):
                raise
            case = case._replace(backend="auto")
    return run_case(case, rng, device, **kind)


def run_case(case, rng, device, *, again: bool = False, **kind) -> float:
    """Run a case: within its bounds and, `again`, a second time with the same bits. Returns the share of rows that the reference decides about."""
    name = f"{case} {kind}"
    d = Draw(case, rng, device, **kind)
    prepared = oracle_cases.RUNNERS[case.op](d)
    first = prepared.run()
    assert len(first) == len(prepared.wanted)
    shares = [oracle_cases.check(d, wanted, *got, name) for wanted, got in zip(prepared.wanted, first, strict=True)]
    if again:
        for (out, lse), (out2, lse2) in zip(first, prepared.run(), strict=True):
            assert_same_bits(d.b.numpy(out2), d.b.numpy(out), f"{name}, second run")
            if lse is not None:
                assert_same_bits(d.b.numpy(lse2), d.b.numpy(lse), f"{name}, second run's lse")
    return min(shares)


def test_grid(request, case, rng, device):
    """Each case with scores as usual, twice; with scores of +-1e30; and without any key (on the CPU every third)."""
    assert run(case, rng, device, again=True) > 0.99
    if case.pos != "ROPE_LLAMA":  # a GPU rounds rotated keys: with scores of 1e30 that decides which is the largest
        share = run(case, rng, device, extreme=True)
        assert share > 0.8 or case.shape == "shared"  # there the largest score may stand twice, and rounding decide
    if oracle_grid.FULL or device == "cuda" or request.node.callspec.indices["case"] % 3 == 0:
        run(case, rng, device, empty=True)


# ---- random cases ----------------------------------------------------------------------------------------------------------------
HOPPER = {
    "dims": ("64", "128"),
    "kv": ("same",),
    "out": ("same",),
    "form": ("plain", "combined", "strided"),
    "backend": ("fa3",),
}


@pytest.mark.gpu
def test_grid_of_the_hopper_family(rng):
    """More of what sm90 kernels do, by name: at least half of these rows, or they are refused."""
    from pyinfer.core.device import arch_number_of

    if arch_number_of(0) != 90:
        pytest.skip("no Hopper GPU, or its kernels are compiled for another architecture")
    factors = oracle_grid.on_device("cuda") | HOPPER | {"op": ("single_prefill", "paged", "ragged", "sinks")}
    found, turn, refused = covering_array(factors, oracle_grid.allowed, seed=9), {}, 0
    for row in found:
        case = oracle_grid.case_of(row, turn)
        for extreme in (False, True) if case.pos != "ROPE_LLAMA" else (False,):
            try:
                run_case(case, rng, "cuda", extreme=extreme)
            except ValueError as error:
                if not oracle_cases.refused(error):
                    raise
                refused += not extreme
    print(f"{len(found) - refused} of {len(found)} rows by the sm90 family")
    assert 0 < refused < len(found)


RUN_TIME = (
    "group",
    "page",
    "layout",
    "form",
    "causal",
    "window",
    "scale",
    "scales",
    "split",
    "index",
    "results",
    "shape",
    "workspace",
)
"""Factors that change no kernel, beside alignment."""


@st.composite
def random_cases(draw, device):
    """A row of the grid, with other values where these select no other kernel, and any member of a class."""
    row = dict(draw(st.sampled_from(oracle_grid.rows(device, oracle_grid.FULL or device == "cuda"))))
    for factor in RUN_TIME:
        values = [v for v in oracle_grid.OPS[row["op"]][factor] if v in oracle_grid.on_device(device)[factor]]
        if factor == "form" and device == "cuda":
            values = [v for v in values if (v == "unaligned") == (row["form"] == "unaligned")]
        others = [f for f in oracle_grid.FACTORS if f not in ("op", factor)]
        values = [v for v in values if all(oracle_grid.allowed(factor, v, f, row[f]) for f in others)]
        if factor == "shape" and row["mask"] != "none":
            values = [v for v in values if v != "decode"]
        row[factor] = draw(st.sampled_from(values))
    turn = {kind + row[kind]: draw(st.integers(0, 20)) for kind in ("group", "page")}
    return oracle_grid.case_of(row, turn)


@pytest.mark.parametrize("part", range(6))
def test_random_cases(device, part):
    """Seeds are hypothesis's: what fails is printed, and tried again. In parts, for the sake of parallel runs."""

    @settings(
        max_examples=EXAMPLES or (25 if device == "cuda" else 2), deadline=None, database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(random_cases(device), st.integers(0, 2**32 - 1), st.booleans())
    def one(case, seed, extreme):
        extreme = extreme and case.pos != "ROPE_LLAMA"
        run(case, np.random.default_rng(seed), device, extreme=extreme)

    one()


# ---- sizes that no kernel is compiled for ----------------------------------------------------------------------------------------
def _plain(op: str, device: str, **changes) -> oracle_grid.Case:
    row = {f: values[0] for f, values in oracle_grid.OPS[op].items()}
    row |= {"op": op, "dtype": "float32" if device == "cpu" else "bfloat16", "shape": "mixed", "results": "both"}
    scale = oracle_grid.OPS[op]["scale"][-1]
    return oracle_grid.case_of({**row, **oracle_grid.OFF, "results": "both", "scale": scale}, {})._replace(**changes)


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("op", ["decode", "paged"])
def test_every_group_size(rng, device, op, part):
    for group in range(1 + part, 129, 4):
        run(_plain(op, device, dims=(64, 64), group=group, kv_heads=1, page=16, shape="short", causal=op == "paged"), rng, device)  # fmt: skip


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("op", ["decode", "paged"])
def test_every_page_size(rng, device, op, part):
    pages = [*range(1, 257), 400, 1024][part::4]
    for page in pages if device == "cuda" or oracle_grid.FULL else pages[::3]:
        run(_plain(op, device, dims=(64, 64), group=2, kv_heads=1, page=page, shape="mixed", causal=op == "paged"), rng, device)  # fmt: skip


@pytest.mark.parametrize("op", ["mla", "mla_decode"])
def test_many_mla_heads(rng, device, op):
    """MLA's heads are rows of a tile: there is no largest number of them."""
    for heads in (129, 160, 256):
        run(_plain(op, device, dims=(576, 512), group=heads, kv_heads=1, page=64, shape="short", causal=op == "mla"), rng, device)  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("op", ["decode", "paged"])
def test_every_head_dimension(rng, device, op):
    """On the CPU a head dimension is a number like any other; the grid has every one that a GPU has."""
    for dim in range(1, MAX_HEAD_DIM + 1, 1 if oracle_grid.FULL else 3):
        dims = (dim, MAX_HEAD_DIM + 1 - dim if op == "paged" else dim)
        run(_plain(op, device, dims=dims, group=2, kv_heads=1, page=16, shape="short"), rng, device)


# ---- the grid itself -------------------------------------------------------------------------------------------------------------
@pytest.mark.cpu
@pytest.mark.parametrize("device_of_grid", ["cpu", "cuda"])
def test_every_pair_is_covered(device_of_grid):
    factors = oracle_grid.on_device(device_of_grid)
    rows = oracle_grid.rows(device_of_grid, True)
    assert missing_pairs(rows, factors, oracle_grid.allowed) == []
    for row in rows:
        assert all(row[f] in values for f, values in oracle_grid.OPS[row["op"]].items())


@pytest.mark.cpu
def test_the_cut_covers_every_pair_but_of_kernels():
    rows = oracle_grid.rows("cpu", False)
    cut = {f: v for f, v in oracle_grid.on_device("cpu").items() if f not in oracle_grid.KERNEL}
    missing = missing_pairs(rows, cut | {"kernel": oracle_grid.KERNELS}, oracle_grid._allowed_kernel)
    assert missing == []
    assert {row["op"] for row in rows} == set(oracle_grid.OPS)


@pytest.mark.cpu
def test_the_grid_has_every_size():
    cases = oracle_grid.cases("cuda", True)
    for phase in ({"decode", "single_decode", "pod"}, {"paged", "ragged", "single_prefill", "block_sparse", "cascade"}):
        mine = [c for c in cases if c.op in phase]
        assert {c.dtype for c in mine} == {"float16", "bfloat16"}
    equal = {c.dims[0] for c in cases if c.dims[0] == c.dims[1]}
    assert equal == set(range(8, MAX_HEAD_DIM + 1, 8))
