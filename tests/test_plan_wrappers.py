"""plan()'s contract, wrapper by wrapper: copies and waits, `strict`, the workspace's size to the byte, capacity in CUDA graph mode.

The GPU path runs on host memory (tests/stub_runtime.py); tests marked `gpu` count on a real one.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

import pyinfer
from pyinfer.core.imagined import Imagined, Reached, imagining
from tests import stub_runtime
from tests.stub_runtime import H2D

LENGTHS = (3000, 17)  # tokens of two requests: the first is split on 132 multiprocessors
PAGE = 16


class Case(NamedTuple):
    """A wrapper and the arguments of its plan(): metadata by name, then the rest."""

    cls: str
    metadata: dict[str, Any]
    rest: dict[str, Any]
    copies: int = 1
    own: dict[str, Any] = {}  # noqa: RUF012 - never changed


def _pages(page: int = PAGE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts = np.array([-(-n // page) for n in LENGTHS], np.int32)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    last = np.array([n - (c - 1) * page for n, c in zip(LENGTHS, counts, strict=True)], np.int32)
    return indptr, np.arange(indptr[-1], dtype=np.int32), last


def _cases() -> dict[str, Case]:
    indptr, indices, last = _pages()
    lens, qo = np.array(LENGTHS, np.int32), np.array([0, 1, 2], np.int32)
    heads = {"num_qo_heads": 8, "num_kv_heads": 2}
    decode = {"indptr": indptr, "indices": indices, "last_page_len": last}
    paged = {"qo_indptr": qo, **{f"paged_kv_{k}": v for k, v in decode.items()}}
    mixed = {"qo_indptr": qo, "kv_indptr": indptr, "kv_indices": indices, "kv_len_arr": lens}
    plain = {**heads, "head_dim": 64, "page_size": PAGE}
    qk = {**heads, "head_dim_qk": 64}
    mla = {"page_size": PAGE, "sm_scale": 0.1}
    ragged = {"qo_indptr": qo, "kv_indptr": np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)}
    levels = {
        "qo_indptr_arr": [np.array([0, 2], np.int32), qo],
        "paged_kv_indptr_arr": [np.array([0, len(indices)], np.int32), indptr],
        "paged_kv_indices_arr": [indices, indices],
        "paged_kv_last_page_len": [np.array([PAGE], np.int32), last],
    }
    blocks = {"indptr": np.array([0, 100, 101], np.int32), "indices": np.r_[np.arange(100), 3].astype(np.int32)}
    variable = {
        "block_mask_map": np.ones((2, 1, 100), bool),
        "block_row_sz": np.full((2, 1), 4),
        "block_col_sz": np.full((2, 100), 32),
    }
    mask = np.ones(sum(LENGTHS), bool)
    graph = "CUDAGraphBatchDecodeWithPagedKVCacheWrapper"
    return {
        "decode": Case("BatchDecodeWithPagedKVCacheWrapper", decode, plain),
        "paged": Case("BatchPrefillWithPagedKVCacheWrapper", paged, {**qk, "page_size": PAGE}),
        "paged with a mask": Case(
            "BatchPrefillWithPagedKVCacheWrapper", paged, {**qk, "page_size": PAGE, "custom_mask": mask}, 2
        ),
        "ragged": Case("BatchPrefillWithRaggedKVCacheWrapper", ragged, qk),
        "sinks": Case(
            "BatchAttentionWithAttentionSinkWrapper",
            paged,
            {**heads, "page_size": PAGE},
            own={"head_dim_qk": 64, "head_dim_vo": 64},
        ),
        "BatchAttention": Case("BatchAttention", mixed, {**qk, "head_dim_vo": 64, "page_size": PAGE}),
        "POD": Case("PODWithPagedKVCacheWrapper", decode, plain),
        "batch POD": Case(
            "BatchPODWithPagedKVCacheWrapper",
            {f"{k}_{x}": v for x in "pd" for k, v in zip(("qo_indptr", "kv_indptr", "kv_indices", "last_page_len"), (qo, *decode.values()), strict=True)},
            plain,
        ),
        "cascade": Case("MultiLevelCascadeAttentionWrapper", levels, plain, 2, {"num_levels": 2}),
        "block sparse": Case(
            "BlockSparseAttentionWrapper",
            blocks,
            {"M": 32, "N": 3200, "R": 16, "C": 32, **heads, "head_dim": 64},
        ),
        "variable block sparse": Case("VariableBlockSparseAttentionWrapper", variable, {**heads, "head_dim": 64}),
        "MLA": Case(
            "BatchMLAPagedAttentionWrapper",
            mixed,
            {**mla, "num_heads": 16, "head_dim_ckv": 512, "head_dim_kpe": 64, "causal": True, "q_data_type": "float16", "kv_data_type": "float16"},
        ),
        "decode MLA": Case(
            "BatchDecodeMlaWithPagedKVCacheWrapper",
            decode,
            {**mla, "num_qo_heads": 16, "head_dim_compressed_kv": 512},
            own={"use_tensor_cores": True},
        ),
        "graph decode": Case(graph, decode, plain, 4),
    }  # fmt: skip


CASES = _cases()
WITH_WORKSPACE = [name for name in CASES if name not in ("BatchAttention", "batch POD")]  # its own; a half for each


def _int32(n: int, device: str) -> Any:
    import torch

    return torch.zeros(n, dtype=torch.int32, device=device)


def make(case: Case, workspace: Any = None, device: str = "cpu") -> Any:
    own = dict(case.own)
    if case.cls.startswith("CUDAGraph"):
        batch, pages = len(LENGTHS), len(case.metadata["indices"])
        own |= {"workspace_buffer": workspace, "indptr_buffer": _int32(batch + 1, device)}
        own |= {"indices_buffer": _int32(pages + 8, device), "last_page_len_buffer": _int32(batch, device)}
    elif case.cls != "BatchAttention":
        own["float_workspace_buffer"] = workspace
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return getattr(pyinfer, case.cls)(**own)


def plan(case: Case, wrapper: Any, **changes: Any) -> None:
    wrapper.plan(**{**case.metadata, **case.rest, **changes})


def need_of(wrapper: Any) -> int:
    """The workspace that a wrapper's plans need: the levels of a cascade share one."""
    info = getattr(getattr(wrapper, "_inner", wrapper), "plan_info", None) or wrapper.plan_info
    return max(p.workspace_bytes for p in info) if isinstance(info, tuple) else info.workspace_bytes


@pytest.fixture
def runtime(monkeypatch):
    return stub_runtime.install(monkeypatch)[0]


def at_home(wrapper: Any) -> Any:
    """Without a workspace a wrapper learns where it is from the first tensor; here it is told."""
    from pyinfer.core.dtypes import BFLOAT16
    from pyinfer.core.tensor import TensorView

    home = TensorView(None, 0, (), (), BFLOAT16, 0, "torch")
    if type(wrapper) is pyinfer.BatchAttention:
        wrapper._home = home
    for owner in (
        wrapper,
        *getattr(wrapper, "_levels", ()),
        *(getattr(wrapper, k, None) for k in ("_inner", "_decode", "_prefill")),
    ):
        if getattr(owner, "_ref", 0) is None:
            owner._ref = home
    return wrapper


@pytest.mark.cpu
@pytest.mark.parametrize("name", list(CASES))
def test_host_metadata_costs_one_copy_and_no_wait(runtime, name):
    """One host-to-device copy a plan (a level, a mask, each buffer of a caller's), and nothing that waits."""
    import torch

    case = CASES[name]
    wrapper = at_home(make(case, torch.empty(64 << 20, dtype=torch.uint8)))
    for _ in range(3):
        runtime.clear()
        plan(case, wrapper, strict=True)
        assert runtime.copies() == [H2D] * case.copies
        assert runtime.waits() == []


@pytest.mark.cpu
def test_runs_copy_nothing(monkeypatch, runtime):
    """What run() needs went with plan(): of the two batches of POD in one copy, unless they must run apart; sinks are used where they lie."""
    import torch

    from pyinfer.core import device
    from pyinfer.jit import attention_launch, pod

    caches = (attention_launch._planned, attention_launch._kernel, attention_launch.prepare_attention, pod.device_pod)
    monkeypatch.setattr(device, "arch_number_of", lambda index: 80)
    for cached in caches:
        cached.cache_clear()
    workspace = torch.empty(64 << 20, dtype=torch.uint8)
    cache = torch.zeros(len(CASES["decode"].metadata["indices"]), 2, PAGE, 2, 64, dtype=torch.float16)
    q = torch.zeros(2, 8, 64, dtype=torch.float16)
    wrapper = at_home(make(CASES["batch POD"], workspace))
    for step in range(2):
        plan(CASES["batch POD"], wrapper)
        runtime.clear()
        for _ in range(2):
            wrapper.run(q, cache, q, cache, causal_p=step == 1)
        assert runtime.copies() == [H2D] * step and not runtime.waits()  # the first causal run comes as a surprise
    plan(CASES["batch POD"], wrapper)
    runtime.clear()
    odd = torch.zeros(2 * 8 * 64 + 1, dtype=torch.float16)[1:].view(2, 8, 64)
    for _ in range(2):
        wrapper.run(odd, cache, q, cache, causal_p=True)
    assert runtime.copies() == [H2D] * 2 and not runtime.waits()
    wrapper.run(odd, cache, q, cache, custom_mask_p=torch.ones(sum(LENGTHS), dtype=torch.bool))
    assert runtime.copies().count(H2D) == 4  # the mask and its plan

    wrapper = at_home(
        make(
            CASES["sinks"]._replace(
                own={"head_dim_qk": 64, "head_dim_vo": 64, "q_data_type": "float16", "kv_data_type": "float16"}
            ),
            workspace,
        )
    )
    plan(CASES["sinks"], wrapper)
    runtime.clear()
    for _ in range(3):
        wrapper.run(q, cache, torch.zeros(8))
    assert not runtime.calls
    for cached in caches:
        cached.cache_clear()


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("name", "arg"),
    [(name, arg) for name, case in CASES.items() if name != "paged with a mask" for arg in case.metadata],
)
def test_strict_refuses_metadata_on_a_gpu(name, arg):
    """All but page indices, which are used where they lie."""
    case = CASES[name]
    value = case.metadata[arg]
    levels = isinstance(value, list)
    shape = np.shape(value[-1] if levels else value)
    dtype = "bool" if arg == "block_mask_map" else "int32"
    there: Any = Imagined(shape, dtype, 0)
    wrapper = make(case) if not case.cls.startswith("CUDAGraph") else pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    changes = {arg: [value[0], there] if levels else there}
    if "indices" in arg and name != "block sparse":
        with pytest.raises(Reached), imagining():  # it was about to use them
            plan(case, wrapper, strict=True, **changes)
            if name == "BatchAttention":
                q = Imagined((2, 8, 64), "bfloat16", 0)
                wrapper.run(q, (Imagined((400, PAGE, 2, 64), "bfloat16", 0),) * 2)
        return
    inner = {"qo_indptr_arr": "qo_indptr", "paged_kv_indptr_arr": "paged_kv_indptr"}.get(arg, arg)
    with pytest.raises(ValueError, match=rf"{inner} is on the GPU under strict=True: got cuda:0, wanted host metadata"):
        plan(case, wrapper, strict=True, **changes)


@pytest.mark.cpu
@pytest.mark.parametrize("name", WITH_WORKSPACE)
def test_the_workspace_to_the_byte(runtime, name):
    """plan_info.workspace_bytes is what a workspace must hold: one byte less is refused with the size, before anything changes."""
    import torch

    case = CASES[name]
    big = make(case, torch.empty(64 << 20, dtype=torch.uint8))
    plan(case, big)
    need = need_of(big)
    assert need > 0, "the case does not split: it tests nothing"
    memory = torch.empty(need + 16, dtype=torch.uint8)
    begin = -memory.data_ptr() % 16
    wrapper = make(case, memory[begin : begin + need])
    plan(case, wrapper)
    assert need_of(wrapper) == need
    wrapper = make(case, memory[begin : begin + need - 1])
    runtime.clear()
    with pytest.raises(ValueError, match=rf"is too small: got {need - 1} bytes, wanted {need} for this plan"):
        plan(case, wrapper)
    # The levels of a cascade plan one after another: those before the refused one have been sent.
    assert len(runtime.copies()) < case.copies or not runtime.copies()
    if name != "cascade":
        owner = getattr(wrapper, "_inner", None) or getattr(wrapper, "_decode", None) or wrapper
        assert owner.plan_info is None


@pytest.mark.cpu
def test_without_a_workspace_the_library_allocates(runtime):
    for name, case in CASES.items():
        wrapper = at_home(make(case))
        plan(case, wrapper)
        if name == "BatchAttention":
            plans = wrapper.plan_info
            assert wrapper._workspace.nbytes >= plans.prefill.workspace_bytes + plans.decode.workspace_bytes > 0
            continue
        if name == "batch POD":
            assert wrapper._memory.nbytes >= sum(p.workspace_bytes for p in wrapper.plan_info) > 0
            continue
        owners = getattr(
            wrapper, "_levels", [getattr(wrapper, "_inner", None) or getattr(wrapper, "_decode", None) or wrapper]
        )
        for owner in owners:
            assert owner._own_workspace.nbytes >= owner.plan_info.workspace_bytes
        assert need_of(wrapper) > 0, name


# ---- CUDA graph mode: what the first plan fixes ---------------------------------------------------------------------------------
def graph_wrapper(kind: str, device: str = "cpu") -> tuple[Any, dict[str, Any]]:
    """A wrapper in graph mode with room for a few pages more, planned once; and what it was planned with."""
    case = CASES[kind]
    batch, tokens = len(LENGTHS), sum(LENGTHS)
    sizes = {"indptr": batch + 1, "indices": len(_pages()[1]) + 8, "last_page_len": batch}
    paged = {k: _int32(n, device) for k, n in sizes.items()}
    qo = _int32(batch + 1, device)
    if kind in ("decode", "POD"):
        own = {f"paged_kv_{k}_buffer": v for k, v in paged.items()}
    elif kind == "ragged":
        own = {"qo_indptr_buf": qo, "kv_indptr_buf": _int32(batch + 1, device)}
    elif kind == "MLA":
        own = {
            "qo_indptr": qo,
            "kv_indptr": paged["indptr"],
            "kv_indices": paged["indices"],
            "kv_len_arr": paged["last_page_len"],
        }
    elif kind == "decode MLA":
        own = {"use_tensor_cores": True, **{f"paged_kv_{k}_buffer": v for k, v in paged.items()}}
    elif kind == "cascade":
        one = {k: _int32(n, device) for k, n in {"qo": 2, "indptr": 2, "indices": 200, "last_page_len": 1}.items()}
        own = {"num_levels": 2, "qo_indptr_buf_arr": [one["qo"], qo]}
        own |= {f"paged_kv_{k}_buf_arr": [one[k], paged[k]] for k in sizes}
    else:
        own = {"qo_indptr_buf": qo, **{f"paged_kv_{k}_buf": v for k, v in paged.items()}}
        if kind == "sinks":
            own |= case.own
    assert tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        wrapper = getattr(pyinfer, case.cls)(use_cuda_graph=True, **own)
    wrapper.plan(**case.metadata, **case.rest)
    return wrapper, {**case.metadata, **case.rest}


GRAPH_KINDS = ["decode", "paged", "sinks", "ragged", "POD", "cascade", "MLA", "decode MLA"]


def _more_pages(args: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """A table of more pages than the buffer holds, and the argument that names it."""
    n = len(_pages()[1]) + 9
    indptr, indices = np.array([0, n - 2, n], np.int32), np.arange(n, dtype=np.int32)
    lens = np.array([(n - 2) * PAGE, 2 * PAGE], np.int32)
    if "kv_len_arr" in args:
        return {"kv_indptr": indptr, "kv_indices": indices, "kv_len_arr": lens}, "kv_indices"
    prefix = "paged_kv_" if "paged_kv_indptr" in args else ""
    last = np.full(2, PAGE, np.int32)
    buffer = "paged_kv_indices_buf" if prefix else "paged_kv_indices_buffer"
    if "qo_indptr_arr" in args:
        tables = {k: args[k][0] for k in args if k.endswith("_arr") or k == "paged_kv_last_page_len"}
        return {
            "paged_kv_indptr_arr": [tables["paged_kv_indptr_arr"], indptr],
            "paged_kv_indices_arr": [tables["paged_kv_indices_arr"], indices],
            "paged_kv_last_page_len": [tables["paged_kv_last_page_len"], last],
        }, "paged_kv_indices_buf"
    return {f"{prefix}indptr": indptr, f"{prefix}indices": indices, f"{prefix}last_page_len": last}, buffer


@pytest.mark.cpu
@pytest.mark.parametrize("kind", [k for k in GRAPH_KINDS if k != "ragged"])
def test_a_replan_of_too_many_pages_names_the_buffer(runtime, kind):
    wrapper, args = graph_wrapper(kind)
    before = wrapper.plan_info
    changes, buffer = _more_pages(args)
    with pytest.raises(ValueError, match=rf"{buffer} is too small: got \d+ entries, wanted \d+ for this plan"):
        wrapper.plan(**{**args, **changes})
    assert kind == "cascade" or wrapper.plan_info is before


@pytest.mark.cpu
@pytest.mark.parametrize("kind", ["paged", "sinks", "ragged", "MLA"])
def test_a_replan_of_too_many_rows_names_qo_indptr(runtime, kind):
    wrapper, args = graph_wrapper(kind)
    before = wrapper.plan_info
    with pytest.raises(ValueError, match="qo_indptr has more query rows than the first plan: got 5, wanted at most 2"):
        wrapper.plan(**{**args, "qo_indptr": np.array([0, 1, 5], np.int32)})
    assert wrapper.plan_info is before
    wrapper.plan(**{**args, "qo_indptr": np.array([0, 0, 2], np.int32)})  # as many, otherwise distributed


@pytest.mark.cpu
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_a_replan_of_other_options_names_them(runtime, kind):
    wrapper, args = graph_wrapper(kind)
    heads = "num_heads" if kind == "MLA" else "num_qo_heads"
    with pytest.raises(
        ValueError, match=rf"{heads} differs from the first plan: got 4, wanted (8|16)\. In CUDA graph mode the first"
    ):
        wrapper.plan(**{**args, heads: 4})
    if "causal" in wrapper.plan.__annotations__ and kind not in ("cascade", "MLA"):
        with pytest.raises(ValueError, match="causal differs from the first plan: got True, wanted False"):
            wrapper.plan(**{**args, "causal": True})


@pytest.mark.cpu
@pytest.mark.parametrize("kind", GRAPH_KINDS)
def test_a_replan_of_another_batch_names_the_buffer(runtime, kind):
    wrapper, args = graph_wrapper(kind)
    shorter = {}
    for name, value in CASES[kind].metadata.items():
        level = value[-1] if isinstance(value, list) else value
        if not name.startswith(("paged_kv_indices", "indices", "kv_indices")):
            shorter[name] = [value[0], level[:-1]] if isinstance(value, list) else level[:-1]
    if kind == "cascade":
        shorter["qo_indptr_arr"] = [np.array([0, 1], np.int32), shorter["qo_indptr_arr"][1]]
    with pytest.raises(
        ValueError,
        match=r"does not fit the plan: got \d entries, wanted \d for this plan. The buffers fix the batch size",
    ):
        wrapper.plan(**{**args, **shorter})


# ---- on a GPU -------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def gpu_copies(monkeypatch):
    """Copies and waits through CuPy's runtime on a real GPU."""
    import cupy

    seen: list[tuple[str, Any]] = []
    for name, at in (("memcpy", 3), ("memcpyAsync", 3), ("deviceSynchronize", None), ("streamSynchronize", None)):
        original = getattr(cupy.cuda.runtime, name)

        def call(*args, name=name, at=at, original=original):
            seen.append((name, None if at is None else args[at]))
            return original(*args)

        monkeypatch.setattr(cupy.cuda.runtime, name, call)
    return seen


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CASES))
def test_on_a_gpu_host_metadata_costs_one_copy_and_no_wait(gpu_copies, name):
    import torch

    case = CASES[name]
    wrapper = at_home(make(case, torch.empty(64 << 20, dtype=torch.uint8, device="cuda"), "cuda"))
    for _ in range(3):  # the first compiles
        torch.cuda.synchronize()
        gpu_copies.clear()
        torch.cuda.set_sync_debug_mode("error")
        try:
            plan(case, wrapper, strict=True)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert gpu_copies == [("memcpyAsync", H2D)] * case.copies


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["decode", "paged", "ragged", "sinks", "BatchAttention", "POD", "MLA", "decode MLA"])
def test_on_a_gpu_device_metadata_costs_one_copy_to_the_host(monkeypatch, name):
    """Page indices stay where they are; the rest comes over together."""
    import torch

    case = CASES[name]
    wrapper = at_home(make(case, torch.empty(64 << 20, dtype=torch.uint8, device="cuda"), "cuda"))
    on_device = {k: torch.from_numpy(np.ascontiguousarray(v)).cuda() for k, v in case.metadata.items()}
    fetched: list[Any] = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args: (fetched.append(self.shape), original(self, *args))[1])
    plan(case, wrapper, **on_device)
    assert len(fetched) == 1
