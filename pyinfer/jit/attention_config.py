"""How the sm80 attention kernels are cut: tiles, warps, stages and the shared memory they need, by architecture and case."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, DType, canonical_dtype
from pyinfer.core.errors import fail, fail_type
from pyinfer.jit.attention_options import PLAIN, AttentionOptions

HEAD_DIMS = (64, 128, 256)
"""The usual head dimensions: what is compiled ahead. Any multiple of 8 up to `MAX_HEAD_DIM` has a kernel."""
MAX_HEAD_DIM = 256
DTYPES = (FLOAT16, BFLOAT16)
"""Of queries."""
FP8_DTYPES = (FLOAT8_E4M3, FLOAT8_E5M2)
"""Of keys and values, beside the queries' own."""
OUT_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
DECODE_ROWS = 16
"""Packed rows of a decode tile: one mma row block."""
CLUSTER = 8
"""Blocks in a cluster (`cluster_configs`): the most that every device takes."""
ROW_CLASSES = (DECODE_ROWS, 64, 128)
"""Values of max_packed_rows that stand for all: each has its own configuration."""

# Shared memory that one block may have, and that all blocks of a multiprocessor share (bytes; each block costs 1 KiB more there). CUDA programming guide,
# "Technical specifications per compute capability". Not listed: the smallest.
_SMEM = {
    80: (163 << 10, 164 << 10),
    87: (163 << 10, 164 << 10),
    90: (227 << 10, 228 << 10),
    100: (227 << 10, 228 << 10),
    103: (227 << 10, 228 << 10),
}
_SMEM_SMALL = (99 << 10, 100 << 10)
STATIC_SMEM = 128
"""What a kernel has beside its dynamic shared memory, rounded up (bytes): a flag, and in prefill the block's work."""


def smem_limits(arch: int) -> tuple[int, int]:
    """Shared memory per block and per multiprocessor of an architecture (80, 89, 90, ...), in bytes."""
    return _SMEM.get(arch, _SMEM_SMALL)


def fits(arch: int, config: AttentionConfig) -> bool:
    """Whether a multiprocessor has the shared memory for a configuration's blocks."""
    per_block, per_sm = smem_limits(arch)
    smem = config.smem + STATIC_SMEM
    return smem <= per_block and config.ctas_per_sm * (smem + 1024) <= per_sm


@dataclass(frozen=True)
class AttentionConfig:
    """How one attention kernel is cut.

    Attributes
    ----------
    kind
        "decode" (16 packed rows, warps share out the keys) or "prefill" (warps share out the rows).
    tile_q
        Packed query rows of a tile: what the scheduler must use.
    tile_kv
        Keys a block takes at a time (decode: all warps together).
    num_warps
        Warps per block.
    ctas_per_sm
        Blocks that a multiprocessor holds at once; caps the registers at 65536 / threads.
    stages
        K and V tiles in the ring.
    smem
        Dynamic shared memory per block in bytes.
    q_in_registers
        Query fragments are kept in registers instead of being read from shared memory for every tile.
    cluster
        Blocks of a cluster, which share a request's keys (decode of few requests; `cluster_configs`).
    """

    kind: str
    tile_q: int
    tile_kv: int
    num_warps: int
    ctas_per_sm: int
    stages: int
    smem: int
    q_in_registers: bool = False
    cluster: int = 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Threads per block."""
        return (32 * self.num_warps, 1, 1)

    @property
    def tag(self) -> str:
        """Short form for kernel names."""
        return f"q{self.tile_q}_kv{self.tile_kv}_w{self.num_warps}_c{self.ctas_per_sm}_s{self.stages}" + (
            ("_qreg" if self.q_in_registers else "") + (f"_x{self.cluster}" if self.cluster > 1 else "")
        )


def row_bytes(head_dim: int, itemsize: int) -> int:
    """Bytes of a row in shared memory: whole blocks of 128, as the swizzle wants."""
    return -(-head_dim * itemsize // 128) * 128


def slab_rows(head_dim_qk: int, head_dim_vo: int, kv_itemsize: int) -> int:
    """Keys that a warp of the decode kernel takes at a time up to head_dim 128: 8 KiB of K and V, but 32 at most."""
    return 32 if max(head_dim_qk, head_dim_vo) * kv_itemsize <= 128 else 16


def _rope_bytes(head_dim_qk: int, keys: int, kv_itemsize: int) -> int:
    """Shared memory for rotation: the table of frequencies and, for 8-bit keys, `keys` of them in 16 bits."""
    return (keys * row_bytes(head_dim_qk, 2) if kv_itemsize == 1 else 8) + head_dim_qk // 2 * 8


def decode_config(
    head_dim_qk: int,
    head_dim_vo: int,
    *,
    tile_kv: int,
    num_warps: int,
    ctas_per_sm: int,
    stages: int,
    kv_itemsize: int = 2,
    rope: bool = False,
    cluster: int = 1,
) -> AttentionConfig:
    """A decode configuration with its shared memory.

    Rings of K and V, beyond head_dim 128 each warp's queries too, all of which the merge of the warps overlays; and what a cluster's blocks send each other.
    """
    q_in_registers = head_dim_qk <= 128  # at 256 the queries would take 64 registers beside the output's 128
    ring = stages * tile_kv * (row_bytes(head_dim_qk, kv_itemsize) + row_bytes(head_dim_vo, kv_itemsize))
    if not q_in_registers:
        ring += num_warps * DECODE_ROWS * row_bytes(head_dim_qk, 2)
    if rope:
        ring += _rope_bytes(head_dim_qk, tile_kv, kv_itemsize)
    merge = 4 * (num_warps * DECODE_ROWS * (-(-head_dim_vo // 16) * 16 + 8 + 2) + DECODE_ROWS)
    smem = -(-max(ring, merge) // 128) * 128
    if cluster > 1:  # 4 columns, reference and sum for each of a block's share of the tasks, from every block
        tasks = -(-DECODE_ROWS * (head_dim_vo // 4) // cluster)
        smem += -(-cluster * tasks * 24 // 128) * 128
    return AttentionConfig(
        "decode", DECODE_ROWS, tile_kv, num_warps, ctas_per_sm, stages, smem, q_in_registers, cluster
    )


def prefill_config(
    head_dim_qk: int,
    head_dim_vo: int,
    *,
    tile_q: int,
    tile_kv: int,
    num_warps: int,
    ctas_per_sm: int,
    stages: int = 2,
    q_in_registers: bool = False,
    kv_itemsize: int = 2,
    rope: bool = False,
) -> AttentionConfig:
    """A prefill configuration with its shared memory: the queries (later the output), and rings of K and V."""
    smem = tile_q * max(row_bytes(head_dim_qk, 2), row_bytes(head_dim_vo, 2))
    smem += stages * tile_kv * (row_bytes(head_dim_qk, kv_itemsize) + row_bytes(head_dim_vo, kv_itemsize))
    if rope:
        smem = -(-(smem + _rope_bytes(head_dim_qk, 2 * tile_kv, kv_itemsize)) // 128) * 128
    return AttentionConfig("prefill", tile_q, tile_kv, num_warps, ctas_per_sm, stages, smem, q_in_registers)


def candidate_configs(
    arch: int,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_itemsize: int = 2,
    options: AttentionOptions = PLAIN,
) -> tuple[AttentionConfig, ...]:
    """The configurations worth timing for a case, the preferred one first; all of them fit the architecture.

    Parameters
    ----------
    arch
        Architecture number: 80, 89, 90, ...
    head_dim_qk, head_dim_vo
        Head dimensions.
    max_packed_rows
        Largest qo_len * group over the requests.
    kv_itemsize
        Bytes of an element of K and V.
    options
        Those that look at a score's place cost registers, RoPE shared memory too; sinks cost neither.
    """
    candidates = _decode_candidates if max_packed_rows <= DECODE_ROWS else _prefill_candidates
    rope = options.rope is not None
    placed = options.alibi or options.mask or options.multi_item or (options.user is not None and options.user.places)
    wide = rope or placed or kv_itemsize == 1
    tight = rope and (kv_itemsize == 1 or (options.mask and max(head_dim_qk, head_dim_vo) > 64))
    found = candidates(head_dim_qk, head_dim_vo, max_packed_rows, kv_itemsize, rope, wide, tight)
    if 100 <= arch < 120 and max(head_dim_qk, head_dim_vo) > 64:
        # NOTE: for sm_100 ptxas spills 20 bytes in the tile that fills 255 registers elsewhere: the others come first.
        found.sort(key=lambda c: (c.tile_q, c.tile_kv, c.num_warps) == (128, 64, 4))
    if arch >= 120 and rope:
        # NOTE: and for sm_120 as many where rotated queries of 128 rows meet a ring of three stages.
        found.sort(key=lambda c: (c.tile_q, c.stages) == (128, 3))
    found += [replace(c, ctas_per_sm=1) for c in found if c.ctas_per_sm > 1]
    return tuple(dict.fromkeys(c for c in found if fits(arch, c)))


def _decode_candidates(
    head_dim_qk: int, head_dim_vo: int, max_packed_rows: int, kv_itemsize: int, rope: bool, wide: bool, tight: bool
) -> list[AttentionConfig]:
    # (tile_kv, warps, blocks per SM, stages). A warp's slab of tile_kv / warps keys is 8 KiB of K and V up to head_dim 128, 16 KiB beyond.
    largest = max(head_dim_qk, head_dim_vo)
    if largest > 128:
        shapes = [(64, 4, 1, 3), (32, 2, 2, 3), (32, 2, 1, 3), (32, 2, 1, 2)]
        if kv_itemsize == 1:
            shapes = [(64, 4, 1, 4), (64, 4, 1, 3), *shapes]
    else:
        rows = slab_rows(head_dim_qk, head_dim_vo, kv_itemsize)
        shapes = [
            (4 * rows, 4, 2, 3),
            (4 * rows, 4, 1, 4),
            (4 * rows, 4, 3, 2),
            (8 * rows, 8, 1, 3),
            (2 * rows, 2, 4, 3),
        ]
        if (
            kv_itemsize == 1
        ):  # conversion keeps the warps busier: more blocks even out their phases (H200, 64 x 4096 keys: 136.4 us, not 138.9)
            shapes = shapes[-1:] + shapes[:-1]
    return [
        decode_config(
            head_dim_qk,
            head_dim_vo,
            tile_kv=kv,
            num_warps=w,
            ctas_per_sm=c,
            stages=n,
            kv_itemsize=kv_itemsize,
            rope=rope,
        )
        for kv, w, c, n in shapes
    ]


def _prefill_candidates(
    head_dim_qk: int, head_dim_vo: int, max_packed_rows: int, kv_itemsize: int, rope: bool, wide: bool, tight: bool
) -> list[AttentionConfig]:
    # (tile_q, tile_kv, warps, blocks per SM, stages, queries in registers)
    largest = max(head_dim_qk, head_dim_vo)
    if largest <= 128 and wide and (max_packed_rows <= 64 or tight):
        # Rotation out of 8 bits, or together with a mask and a soft cap, would spill at 128 rows.
        shapes = [(64, 32, 4, 2, 3, False), (64, 32, 4, 2, 2, False)]
    elif largest <= 128 and max_packed_rows <= 64:
        shapes = [(64, 64, 4, 2, 2, True), (64, 64, 4, 3, 2, False), (64, 32, 4, 2, 3, True)]
    elif wide and largest <= 128:
        shapes = [(128, 32, 4, 2, 3, False), (128, 32, 4, 2, 2, False)]
    elif largest <= 64:
        shapes = [
            (128, 64, 4, 2, 2, True),
            (128, 64, 4, 2, 3, True),
            (128, 64, 4, 3, 2, False),
            (128, 32, 4, 3, 3, False),
        ]
    elif largest <= 128:
        shapes = [
            (128, 64, 4, 2, 2, False),
            (128, 32, 4, 2, 3, False),
            (128, 32, 4, 2, 2, False),
            (128, 64, 8, 1, 2, True),
        ]
    elif max_packed_rows <= 64 or wide:
        shapes = [(64, 32, 4, 2, 2, False), (64, 32, 4, 1, 2, False)]
    else:
        shapes = [(128, 64, 8, 1, 2, False), (64, 32, 4, 2, 2, False), (64, 32, 4, 1, 2, False)]
    return [
        prefill_config(
            head_dim_qk,
            head_dim_vo,
            tile_q=q,
            tile_kv=kv,
            num_warps=w,
            ctas_per_sm=c,
            stages=n,
            q_in_registers=r,
            kv_itemsize=kv_itemsize,
            rope=rope,
        )
        for q, kv, w, c, n, r in shapes
    ]


@functools.cache
def wide_decode_config(
    arch: int, head_dim_qk: int, head_dim_vo: int, kv_itemsize: int = 2, options: AttentionOptions = PLAIN
) -> AttentionConfig | None:
    """The decode configuration of one block of 8 warps per multiprocessor; None where there is no room for it.

    It is for batches whose requests and heads do not fill the device: half as many blocks as with two on each multiprocessor, so half as many splits to be
    merged, or none.
    """
    found = candidate_configs(arch, head_dim_qk, head_dim_vo, DECODE_ROWS, kv_itemsize, options)
    return next((c for c in found if c.num_warps == 8 and c.ctas_per_sm == 1), None)


@functools.cache
def cluster_configs(
    arch: int, head_dim_qk: int, head_dim_vo: int, kv_itemsize: int = 2, options: AttentionOptions = PLAIN
) -> tuple[AttentionConfig, ...]:
    """Decode configurations of clusters, which share a request's keys evenly: two blocks of 4 warps on a multiprocessor, and one of 8, as far as they fit."""
    if arch < 90 or max(head_dim_qk, head_dim_vo) > 128:
        return ()
    rows = slab_rows(head_dim_qk, head_dim_vo, kv_itemsize)
    made = (
        decode_config(
            head_dim_qk, head_dim_vo, tile_kv=rows * warps, num_warps=warps, ctas_per_sm=8 // warps, stages=3, kv_itemsize=kv_itemsize,
            rope=options.rope is not None, cluster=CLUSTER,
        )
        for warps in (4, 8)
    )  # fmt: skip
    return tuple(c for c in made if fits(arch, c))


@functools.cache
def attention_config(
    arch: int,
    dtype: DType | str,
    head_dim_qk: int,
    head_dim_vo: int,
    max_packed_rows: int,
    kv_dtype: DType | str | None = None,
    options: AttentionOptions = PLAIN,
) -> AttentionConfig:
    """The configuration for a case.

    Parameters
    ----------
    arch
        Architecture number the code is built for (`core.device.arch_number_of`): 80, 89, 90, ...
    dtype
        Of the queries: float16 or bfloat16.
    head_dim_qk, head_dim_vo
        Head dimensions: multiples of 8 up to 256.
    max_packed_rows
        Largest qo_len * group over the requests: at most 16 takes the decode kernel, more the prefill kernel.
    kv_dtype
        Of keys and values: dtype (the default), float8_e4m3fn or float8_e5m2.
    options
        What the kernel has to do beyond the plain softmax.

    Raises
    ------
    TypeError
        For a dtype without a kernel.
    ValueError
        For head dimensions without a kernel.
    """
    dt = canonical_dtype(dtype)
    kv = dt if kv_dtype is None else canonical_dtype(kv_dtype)
    if dt not in DTYPES:
        fail_type("attention", "dtype", "has no CUDA kernel", dt, "float16 or bfloat16", "Cast q, k and v.")
    if kv is not dt and kv not in FP8_DTYPES:
        fail_type("attention", "kv_dtype", "has no CUDA kernel", kv, f"{dt}, float8_e4m3fn or float8_e5m2")
    if not all(d % 8 == 0 and 8 <= d <= MAX_HEAD_DIM for d in (head_dim_qk, head_dim_vo)):
        fail(
            "attention",
            "head_dim",
            "has no CUDA kernel",
            f"qk {head_dim_qk}, vo {head_dim_vo}",
            f"multiples of 8 from 8 to {MAX_HEAD_DIM}",
        )
    return candidate_configs(arch, head_dim_qk, head_dim_vo, max_packed_rows, kv.itemsize, options)[0]
