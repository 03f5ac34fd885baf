"""Multi-head latent attention for Hopper: when the sm90 kernel is taken, its spec and launch."""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.core import tensormap
from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.params import ParamStruct, f32, i32, i64, ptr, tensor_map
from pyinfer.jit.attention import SHAPE_FIELDS, SOURCE_FIELDS
from pyinfer.jit.spec import JitSpec

if TYPE_CHECKING:
    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView
    from pyinfer.schedulers.plan import AttentionPlan

TILE_KV = 64
ROWS = 64  # packed rows of a block
BLOCK = TILE_KV * 128  # bytes of 64 columns of a tile
STAGES = 3
_LEADING = struct.Struct(f"@8P{tensormap.BYTES}s{tensormap.BYTES}s")  # the pointers and the two maps behind them


@dataclass(frozen=True)
class MlaSm90Config:
    """How the kernel is cut: blocks of 64 packed rows x 64 keys.

    Attributes
    ----------
    score_registers, output_registers
        Of a thread of the score warpgroup, and of the two output warpgroups: 504 for three warpgroups is what they get at launch.
    """

    score_registers: int = 184
    output_registers: int = 160

    @property
    def tile_q(self) -> int:
        """Packed query rows of a work item."""
        return ROWS

    @property
    def tile_kv(self) -> int:
        """Keys of a tile."""
        return TILE_KV

    @property
    def ctas_per_sm(self) -> int:
        """Blocks on a multiprocessor."""
        return 1

    @property
    def smem(self) -> int:
        """Dynamic shared memory per block in bytes: `SharedMemory` of the template."""
        return (8 * STAGES + 4) * BLOCK + 3072  # all there is

    @property
    def tag(self) -> str:
        """Short form for kernel names."""
        return f"q{ROWS}_kv{TILE_KV}"


def mla_sm90_config() -> MlaSm90Config:
    """The configuration that is taken."""
    return MlaSm90Config()


def box_rows(page_size: int) -> int:
    """Keys of a TMA box: the most that divides both page and tile. 0: pages too small or odd for boxes."""
    rows = math.gcd(page_size, TILE_KV)
    return rows if rows % 8 == 0 else 0  # the swizzle repeats every 8 rows


PARAMS = ParamStruct(
    "MlaSm90Params",
    ptr("q_nope", "const scalar_t", "[tokens, heads, 512]"),
    ptr("q_pe", "const scalar_t", "[tokens, heads, 64]"),
    ptr("out", "scalar_t", "[tokens, heads, 512]"),
    ptr("lse", "float", "[tokens, heads], or null"),
    ptr("kv_indices", "const int32_t", "page ids"),
    ptr("partial_o", "float", "[max_partials, 1, TILE_Q, 512]"),
    ptr("partial_lse", "float", "[max_partials, 1, TILE_Q], base 2"),
    ptr("semaphore", "int32_t", "[max_partials], zero between launches"),
    tensor_map("ckv_map", "3-D: column, token, page; keys and values"),
    tensor_map("kpe_map"),
    i64("q_nope_stride_token", "strides in elements"),
    i64("q_nope_stride_head"),
    i64("q_pe_stride_token"),
    i64("q_pe_stride_head"),
    i64("out_stride_token"),
    i64("out_stride_head"),
    f32("logit_scale", "sm_scale * log2(e); soft cap: 2 log2(e) sm_scale / cap"),
    f32("soft_cap_log2", "cap * log2(e)"),
    f32("lse_scale", "1: base 2; ln 2: base e"),
    *SHAPE_FIELDS,  # one kv head, a group of all heads
    *SOURCE_FIELDS["plan"],
    i32("box_rows", "keys of a TMA box"),
    i32("slots", "work items that the device runs at a time"),
)


@functools.cache
def gen_mla_sm90(config: MlaSm90Config, dtype: DType | str, soft_cap: bool = False) -> JitSpec:
    """The spec of one kernel; parameters as `mla.gen_mla`."""
    dt = canonical_dtype(dtype)
    constants = {
        "scalar_t": dt.ctype,
        "SOFT_CAP": soft_cap,
        "SCORE_REGISTERS": config.score_registers,
        "OUTPUT_REGISTERS": config.output_registers,
        "smem": config.smem,
    }
    return JitSpec(
        name=f"mla_sm90_{dt.short}{'_softcap' if soft_cap else ''}_{config.tag}",
        template="mla/mla_sm90.cu.jinja",
        params=PARAMS,
        constants=tuple(constants.items()),
        block=(384, 1, 1),
        smem=config.smem,
        min_arch=90,
        max_arch=90,
    )


def tma_view(x: TensorView) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """[pages, page_size, columns] as TMA wants it: shape (column, token, page), strides of the outer two axes."""
    pages, tokens, columns = x.shape
    return (columns, tokens, pages), (x.strides[1], x.strides[0])


def encodable(x: TensorView) -> bool:
    """Whether TMA can read a cache, were its rows aligned."""
    (_, tokens, pages), strides = tma_view(x)
    return pages > 0 and all(
        n == 1 or 0 < s * x.dtype.itemsize < 1 << 40 for n, s in zip((tokens, pages), strides, strict=True)
    )


def cache_maps(x: TensorView, rows: int) -> tensormap.Maps:
    """The tensor maps of a cache of this layout, by address, in boxes of 64 columns x `rows` keys."""
    return tensormap.table(x.dtype, *tma_view(x), (64, rows, 1))


# ---- launch ----------------------------------------------------------------------------------------------------------------------
@functools.cache
def _kernel(device: int, config: MlaSm90Config, dtype: DType, soft_cap: bool) -> Kernel:
    return gen_mla_sm90(config, dtype, soft_cap).build_and_load(device)


class PreparedMlaSm90(NamedTuple):
    """All of a launch that a plan fixes: kernel, grid, the tail of the parameter struct, the height of a box."""

    kernel: Kernel
    grid: int
    constants: tuple[int, ...]
    partial_lse_offset: int
    semaphore: int
    box_rows: int


@functools.lru_cache(maxsize=16)
def prepare_mla_sm90(
    device: int, plan: AttentionPlan, plan_buffer_ptr: int, dtype: DType, soft_cap: bool, config: MlaSm90Config
) -> PreparedMlaSm90:
    """Fetch (or compile) a plan's kernel and fill in what stays the same from run to run."""
    from pyinfer.core.device import num_sms
    from pyinfer.core.errors import fail
    from pyinfer.jit.attention_launch import plan_values, shape_values

    if config.tile_q != plan.tile_q:
        fail("mla", "plan", "was made for another tile", plan.tile_q, f"tile_q {config.tile_q} of {config.tag}")
    rows = box_rows(plan.page_size)
    if not rows:
        fail("mla", "page_size", "is too small or odd for TMA", plan.page_size, "a multiple of 8")
    constants = (
        *shape_values(plan.num_qo_heads, 1, plan.causal, plan.window_left, plan.page_size),
        *plan_values(plan, plan_buffer_ptr),
        rows,
        num_sms(device),
    )
    kernel = _kernel(device, config, dtype, soft_cap)
    semaphore = plan_buffer_ptr + 4 * plan.offsets.semaphore
    return PreparedMlaSm90(kernel, plan.max_work, constants, plan.partial_lse_offset, semaphore, rows)


def launch_mla_sm90(
    ready: PreparedMlaSm90,
    stream: int,
    q_nope: TensorView,
    q_pe: TensorView,
    ckv: TensorView,
    kpe: TensorView,
    kv_indices_ptr: int,
    out: TensorView,
    lse_ptr: int,
    workspace_ptr: int,
    scales: tuple[float, float, float],
    pdl: bool,
    bind: bool = False,
) -> BoundLaunch | None:
    """Run a prepared plan on checked tensors; `scales`: the parameters from logit_scale to lse_scale. The rest as `mla.launch_mla`."""
    pointers = (q_nope.ptr, q_pe.ptr, out.ptr, lse_ptr, kv_indices_ptr)
    partials = (workspace_ptr, workspace_ptr + ready.partial_lse_offset, ready.semaphore)
    of_ckv, of_kpe = cache_maps(ckv, ready.box_rows), cache_maps(kpe, ready.box_rows)
    maps = (of_ckv[ckv.ptr], of_kpe[kpe.ptr])
    strides = (*q_nope.strides[:2], *q_pe.strides[:2], *out.strides[:2])
    values = pointers + partials + maps + strides + scales + ready.constants
    if not bind:
        ready.kernel(stream, ready.grid, values, pdl)
        return None
    bound, fixed, pack_into = ready.kernel.bind(ready.grid, values, 4, pdl), values[4:8], _LEADING.pack_into

    def pack(buffer: Any, at: int, q: int, pe: int, c: int, k: int, o: int, lse: int) -> None:
        pack_into(buffer, at, q, pe, o, lse, *fixed, of_ckv[c], of_kpe[k])

    bound.pack_with(pack)
    return bound
