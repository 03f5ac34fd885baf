"""The kernels of multi-head latent attention: configurations, parameters, spec and launch of the sm80 family, and the choice of the family.

The sm90 family is in `mla_sm90`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, DType, canonical_dtype
from pyinfer.core.params import ParamStruct, f32, i64, ptr
from pyinfer.jit.attention import SHAPE_FIELDS, SOURCE_FIELDS, smem_limits
from pyinfer.jit.mla_sm90 import (
    MlaSm90Config,
    PreparedMlaSm90,
    box_rows,
    encodable,
    gen_mla_sm90,
    launch_mla_sm90,
    mla_sm90_config,
    prepare_mla_sm90,
)
from pyinfer.jit.spec import JitModule, JitSpec

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView
    from pyinfer.schedulers.plan import AttentionPlan

HEAD_DIM_CKV, HEAD_DIM_KPE = 512, 64
DTYPES = (FLOAT16, BFLOAT16)
CACHE_DTYPES = (FLOAT8_E4M3, FLOAT8_E5M2)
"""Of a cache whose queries have another dtype, one of `DTYPES`."""
FEW_ROWS = 16
"""Packed rows (query tokens x heads of a request) up to which the small tile is taken: 16 heads at decode."""

BACKENDS = ("auto", "fa2", "fa3")
LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453


@dataclass(frozen=True)
class MlaConfig:
    """How the kernel is cut: tile_q packed rows x tile_kv keys, `stages` tiles in the ring, one copy of each latent row in shared memory.

    With kv_itemsize 1 the ring holds 8-bit rows, and one more tile their 16-bit form.
    """

    tile_q: int
    tile_kv: int
    num_warps: int
    ctas_per_sm: int
    stages: int
    kv_itemsize: int = 2

    @property
    def smem(self) -> int:
        """Dynamic shared memory per block in bytes: `SharedMemory` of the template."""
        elements = HEAD_DIM_CKV + HEAD_DIM_KPE
        key_parts = self.num_warps // (self.tile_q // 16)
        converted = self.tile_kv if self.kv_itemsize == 1 else 0
        size = 2 * (self.tile_q + converted) * elements + self.stages * self.tile_kv * elements * self.kv_itemsize
        size += self.tile_q * (128 + 4 * key_parts + 4)
        return -(-size // 128) * 128

    @property
    def tag(self) -> str:
        """Short form for kernel names."""
        return f"q{self.tile_q}_kv{self.tile_kv}_w{self.num_warps}_c{self.ctas_per_sm}_s{self.stages}"


def candidate_configs(arch: int, max_packed_rows: int, kv_itemsize: int = 2) -> tuple[MlaConfig, ...]:
    """The configurations worth timing for a case, the preferred one first; all fit the architecture (80, 89, 90, ...)."""
    if max_packed_rows <= FEW_ROWS:
        # Few rows: the bytes of the keys decide. Two blocks take turns at waiting where they fit.
        shapes = [(16, 32, 4, 2, 2), (16, 32, 4, 1, 4), (16, 32, 4, 1, 3), (16, 64, 4, 1, 2), (16, 32, 4, 1, 2)]
    else:
        shapes = [(64, 64, 8, 1, 2), (64, 32, 8, 1, 3), (64, 32, 8, 1, 2), (32, 16, 4, 1, 3)]
    per_block, per_sm = smem_limits(arch)
    found = [MlaConfig(*shape, kv_itemsize) for shape in shapes]
    return tuple(c for c in found if c.smem <= per_block and c.ctas_per_sm * (c.smem + 1024) <= per_sm)


@functools.cache
def mla_config(arch: int, max_packed_rows: int, kv_itemsize: int = 2) -> MlaConfig:
    """The configuration for an architecture number and the largest qo_len * num_heads of the requests."""
    return candidate_configs(arch, max_packed_rows, kv_itemsize)[0]


def choose_config(
    arch: int, max_packed_rows: int, page_size: int, backend: str = "auto", kv_itemsize: int = 2
) -> MlaConfig | MlaSm90Config:
    """The configuration of the family that is faster, or that `backend` names: "fa2" is sm80's, "fa3" sm90's. PYINFER_SM90=0: sm80's for "auto".

    Raises
    ------
    ValueError
        If "fa3" is asked for where it cannot run.
    """
    from pyinfer.core.errors import fail

    possible = arch == 90 and box_rows(page_size) > 0 and kv_itemsize == 2
    if backend == "fa3" and not possible:
        op = "BatchMLAPagedAttentionWrapper"
        if arch != 90:
            fail(op, "backend", "needs a Hopper GPU", f"'fa3' on architecture {arch}", "'auto' or 'fa2'")
        if kv_itemsize == 1:
            fail(
                op,
                "kv_data_type",
                "is not covered by backend 'fa3'",
                "8-bit floats",
                "float16 or bfloat16",
                "Pass backend='auto'.",
            )
        fail(op, "page_size", "is not covered by backend 'fa3'", page_size, "a multiple of 8", "Pass backend='auto'.")
    from pyinfer.jit.attention_sm90 import enabled

    if possible and (backend == "fa3" or (backend == "auto" and enabled(arch))):
        return mla_sm90_config()
    return mla_config(arch, max_packed_rows, kv_itemsize)


PARAMS = ParamStruct(
    "MlaParams",
    ptr("q_nope", "const scalar_t", "[tokens, heads, 512]"),
    ptr("q_pe", "const scalar_t", "[tokens, heads, 64]"),
    ptr("ckv", "const kv_t", "[pages, page_size, 512]: keys and values"),
    ptr("kpe", "const kv_t", "[pages, page_size, 64]"),
    ptr("out", "scalar_t", "[tokens, heads, 512]"),
    ptr("lse", "float", "[tokens, heads], or null"),
    ptr("kv_indices", "const int32_t", "page ids"),
    ptr("partial_o", "float", "[max_partials, 1, TILE_Q, 512]"),
    ptr("partial_lse", "float", "[max_partials, 1, TILE_Q], base 2"),
    ptr("semaphore", "int32_t", "[max_partials], zero between launches"),
    i64("q_nope_stride_token", "strides in elements"),
    i64("q_nope_stride_head"),
    i64("q_pe_stride_token"),
    i64("q_pe_stride_head"),
    i64("ckv_stride_page"),
    i64("ckv_stride_token"),
    i64("kpe_stride_page"),
    i64("kpe_stride_token"),
    i64("out_stride_token"),
    i64("out_stride_head"),
    f32("logit_scale", "sm_scale * log2(e); soft cap: 2 log2(e) sm_scale / cap; times ckv_scale"),
    f32("soft_cap_log2", "cap * log2(e)"),
    f32("lse_scale", "1: base 2; ln 2: base e"),
    f32("kpe_factor", "kpe_scale / ckv_scale; 8-bit caches alone"),
    f32("value_scale", "ckv_scale; 8-bit caches alone"),
    *SHAPE_FIELDS,  # one kv head, a group of all heads
    *SOURCE_FIELDS["plan"],
)


@functools.cache
def gen_mla(
    config: MlaConfig, dtype: DType | str, soft_cap: bool = False, kv_dtype: DType | str | None = None
) -> JitSpec:
    """The spec of one kernel.

    Parameters
    ----------
    config
        From `mla_config` or `candidate_configs`.
    dtype
        float16 or bfloat16: of the queries, the output and, without kv_dtype, the caches.
    soft_cap
        Logits are soft-capped.
    kv_dtype
        float8_e4m3fn or float8_e5m2, of the caches; the configuration is one of their size.
    """
    dt = canonical_dtype(dtype)
    kv = dt if kv_dtype is None else canonical_dtype(kv_dtype)
    assert kv.itemsize == config.kv_itemsize
    constants: dict[str, Any] = {
        "scalar_t": dt.ctype,
        "kv_t": kv.ctype,
        "TILE_Q": config.tile_q,
        "TILE_KV": config.tile_kv,
        "WARPS": config.num_warps,
        "CTAS_PER_SM": config.ctas_per_sm,
        "STAGES": config.stages,
        "SOFT_CAP": soft_cap,
        "smem": config.smem,
    }
    return JitSpec(
        name=f"mla_sm80_{dt.short}{f'_kv_{kv.short}' if kv is not dt else ''}{'_softcap' if soft_cap else ''}_{config.tag}",
        template="mla/mla_sm80.cu.jinja",
        params=PARAMS,
        constants=tuple(constants.items()),
        block=(32 * config.num_warps, 1, 1),
        smem=config.smem,
    )


def all_specs(archs: Iterable[int] = (80, 89, 90)) -> list[JitSpec]:
    """Every spec the launch can ask for, but for e5m2 caches, which differ from e4m3 in one conversion, only those of bfloat16 queries.

    The default architectures stand for the three sizes of shared memory.
    """
    found: dict[JitSpec, None] = {}
    for arch in archs:
        for rows in (FEW_ROWS, FEW_ROWS + 1):
            for dtype in DTYPES:
                for soft_cap in (False, True):
                    found[gen_mla(mla_config(arch, rows), dtype, soft_cap)] = None
                for kv_dtype in CACHE_DTYPES[: 1 + (dtype is BFLOAT16)]:
                    found[gen_mla(mla_config(arch, rows, 1), dtype, False, kv_dtype)] = None
    return list(found) + hopper_specs()


def hopper_specs() -> list[JitSpec]:
    """Every spec of the sm90 family that the launch can ask for, for 9.0a alone."""
    return [gen_mla_sm90(mla_sm90_config(), dtype, soft_cap) for dtype in DTYPES for soft_cap in (False, True)]


def gen_batch_mla_module(
    backend: str, dtype_q: DType | str, dtype_kv: DType | str, dtype_o: DType | str, dtype_idx: DType | str = "int32",
    head_dim_ckv: int = HEAD_DIM_CKV, head_dim_kpe: int = HEAD_DIM_KPE, use_profiler: bool = False,
) -> JitModule:  # fmt: skip
    """The kernels of `BatchMLAPagedAttentionWrapper`, by FlashInfer's name and argument order (API.md section 19)."""
    from pyinfer.core.dtypes import INT32
    from pyinfer.core.errors import fail, fail_type
    from pyinfer.jit import env

    op = "gen_batch_mla_module"
    dtype = canonical_dtype(dtype_q, op, "dtype_q")
    if dtype not in DTYPES:
        fail_type(op, "dtype_q", "has no CUDA kernel", dtype.name, "float16 or bfloat16")
    if canonical_dtype(dtype_o, op, "dtype_o") is not dtype:
        fail_type(op, "dtype_o", "differs from dtype_q", dtype_o, dtype.name, "Queries and the output have one dtype.")
    kv_dtype = canonical_dtype(dtype_kv, op, "dtype_kv")
    if kv_dtype is not dtype and kv_dtype not in CACHE_DTYPES:
        fail_type(op, "dtype_kv", "differs from dtype_q", kv_dtype.name, f"{dtype.name}, float8_e4m3fn or float8_e5m2")
    if canonical_dtype(dtype_idx, op, "dtype_idx") is not INT32:
        fail_type(op, "dtype_idx", "has no CUDA kernel", dtype_idx, "int32")
    if backend not in BACKENDS:
        fail(op, "backend", "is not available", repr(backend), "'auto', 'fa2' or 'fa3'")
    if (head_dim_ckv, head_dim_kpe) != (HEAD_DIM_CKV, HEAD_DIM_KPE):
        fail(op, "head_dim", "has no CUDA kernel", f"{head_dim_ckv} (ckv), {head_dim_kpe} (kpe)", "512 and 64")
    if use_profiler:
        fail(op, "use_profiler", "is not supported yet", True, False)
    specs: dict[JitSpec, None] = {}
    size = kv_dtype.itemsize
    if backend == "fa3" and size == 1:
        fail(op, "dtype_kv", "is not covered by backend 'fa3'", kv_dtype.name, dtype.name, "Pass backend='auto'.")
    for number in map(env.arch_number, env.default_archs()):
        for soft_cap in (False, True) if size == 2 else (False,):
            if backend != "fa3":
                for rows in (FEW_ROWS, FEW_ROWS + 1):
                    specs[gen_mla(mla_config(number, rows, size), dtype, soft_cap, kv_dtype)] = None
            if backend != "fa2" and number == 90 and size == 2:
                specs[gen_mla_sm90(mla_sm90_config(), dtype, soft_cap)] = None
    if not specs:
        fail(op, "backend", "needs a Hopper GPU", repr(backend), "'auto' or 'fa2'")
    return JitModule(f"batch_mla_{dtype.short}{f'_kv_{kv_dtype.short}' if size == 1 else ''}", tuple(specs))


def covers(config: MlaConfig | MlaSm90Config, cache: TensorView) -> bool:
    """Whether a configuration's kernel can read a cache. Rows that are not aligned are not its business: the launch refuses them in both families."""
    return isinstance(config, MlaConfig) or encodable(cache)


# ---- launch ----------------------------------------------------------------------------------------------------------------------
@functools.cache
def _kernel(device: int, config: MlaConfig, dtype: DType, soft_cap: bool, kv_dtype: DType | None = None) -> Kernel:
    return gen_mla(config, dtype, soft_cap, kv_dtype).build_and_load(device)


class PreparedMla(NamedTuple):
    """All of a launch that a plan fixes: kernel, grid, the tail of the parameter struct."""

    kernel: Kernel
    grid: int
    constants: tuple[int, ...]
    partial_lse_offset: int
    semaphore: int


@functools.lru_cache(maxsize=16)
def prepare_mla(
    device: int,
    plan: AttentionPlan,
    plan_buffer_ptr: int,
    dtype: DType,
    soft_cap: bool,
    config: MlaConfig | MlaSm90Config | None = None,
    kv_dtype: DType | None = None,
) -> PreparedMla | PreparedMlaSm90:
    """Fetch (or compile) a plan's kernel and fill in what stays the same from run to run.

    `config` None: the sm80 family's. `kv_dtype` None: the caches have the queries' dtype.
    """
    from pyinfer.core.device import arch_number_of
    from pyinfer.core.errors import fail
    from pyinfer.jit.attention_launch import plan_values, shape_values

    if isinstance(config, MlaSm90Config):
        return prepare_mla_sm90(device, plan, plan_buffer_ptr, dtype, soft_cap, config)
    config = config or mla_config(arch_number_of(device), plan.tile_q, (kv_dtype or dtype).itemsize)
    if config.tile_q != plan.tile_q:
        fail("mla", "plan", "was made for another tile", plan.tile_q, f"tile_q {config.tile_q} of {config.tag}")
    shape = shape_values(plan.num_qo_heads, 1, plan.causal, plan.window_left, plan.page_size)
    kernel, semaphore = _kernel(device, config, dtype, soft_cap, kv_dtype), plan_buffer_ptr + 4 * plan.offsets.semaphore
    constants = shape + plan_values(plan, plan_buffer_ptr)
    return PreparedMla(kernel, plan.max_work, constants, plan.partial_lse_offset, semaphore)


def launch_mla(
    device: int,
    stream: int,
    plan_buffer_ptr: int,
    plan: AttentionPlan,
    q_nope: TensorView,
    q_pe: TensorView,
    ckv: TensorView,
    kpe: TensorView,
    kv_indices_ptr: int,
    out: TensorView,
    lse: TensorView | None,
    workspace_ptr: int,
    *,
    sm_scale: float,
    logits_soft_cap: float = 0.0,
    lse_base_e: bool = False,
    pdl: bool = False,
    config: MlaConfig | MlaSm90Config | None = None,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
    bind: bool = False,
) -> BoundLaunch | None:
    """Run a plan on checked tensors; or, with `bind`, return its launch bound but for the addresses of q_nope, q_pe, ckv, kpe, out and lse.

    Parameters
    ----------
    q_nope, q_pe, out
        [tokens, heads, 512], [tokens, heads, 64], [tokens, heads, 512].
    ckv, kpe
        [pages, page_size, 512], [pages, page_size, 64]; each row on a multiple of 16 bytes.
    kv_indices_ptr
        Device address of the int32 page ids.
    lse
        float32 [tokens, heads], contiguous; None: not wanted. `lse_base_e`: natural logarithm instead of base 2.
    workspace_ptr
        plan.workspace_bytes bytes, 16-byte aligned; not read if nothing is split.
    config
        What the plan was made for; None: the sm80 family's.
    ckv_scale, kpe_scale
        What a stored value of a cache of 8-bit floats is worth.

    Raises
    ------
    ValueError
        If a pointer or stride is no multiple of 16 bytes, or a cache is none that TMA can read (sm90; `covers` says so before).
    """
    from pyinfer.jit.attention_launch import ALIGNMENT, _check_alignment

    kv_dtype = ckv.dtype if ckv.dtype is not q_nope.dtype else None
    ready = prepare_mla(device, plan, plan_buffer_ptr, q_nope.dtype, logits_soft_cap > 0.0, config, kv_dtype)
    ours, cached = (*q_nope.strides[:2], *q_pe.strides[:2], *out.strides[:2]), (*ckv.strides[:2], *kpe.strides[:2])
    together = 0
    for stride in ours:
        together |= 2 * stride
    for stride in cached:
        together |= ckv.dtype.itemsize * stride
    if (q_nope.ptr | q_pe.ptr | ckv.ptr | kpe.ptr | out.ptr | together) % ALIGNMENT:
        _check_alignment(q_nope=q_nope, q_pe=q_pe, ckv_cache=ckv, kpe_cache=kpe, out=out)
    sm_scale *= ckv_scale
    if logits_soft_cap > 0.0:
        logit_scale, cap = 2.0 * LOG2_E * sm_scale / logits_soft_cap, LOG2_E * logits_soft_cap
    else:
        logit_scale, cap = LOG2_E * sm_scale, 0.0
    lse_ptr = lse.ptr if lse is not None else 0
    scales = (logit_scale, cap, LN_2 if lse_base_e else 1.0)
    if isinstance(ready, PreparedMlaSm90):
        return launch_mla_sm90(
            ready, stream, q_nope, q_pe, ckv, kpe, kv_indices_ptr, out, lse_ptr, workspace_ptr, scales, pdl, bind
        )
    pointers = (q_nope.ptr, q_pe.ptr, ckv.ptr, kpe.ptr, out.ptr, lse_ptr, kv_indices_ptr)
    partials = (workspace_ptr, workspace_ptr + ready.partial_lse_offset, ready.semaphore)
    strides = ours[:4] + cached + ours[4:]
    values = pointers + partials + strides + scales + (kpe_scale / ckv_scale, ckv_scale) + ready.constants
    if bind:
        return ready.kernel.bind(ready.grid, values, 6, pdl)
    ready.kernel(stream, ready.grid, values, pdl)
    return None
