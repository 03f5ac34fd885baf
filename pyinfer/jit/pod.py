"""The kernel whose blocks take prefill or decode items: its configurations, specs and launch. Used by `pod` and by `attention.BatchAttention`."""

from __future__ import annotations

import functools
import struct
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.errors import fail, fail_type
from pyinfer.core.params import ParamStruct, u32
from pyinfer.jit.attention import gen_attention
from pyinfer.jit.attention_config import (
    DTYPES,
    HEAD_DIMS,
    AttentionConfig,
    decode_config,
    prefill_config,
    smem_limits,
)
from pyinfer.jit.attention_launch import LOG2_E, _is_aligned, divisor
from pyinfer.jit.spec import JitSpec
from pyinfer.schedulers.plan import SINGLE_SEMAPHORE_BYTES, AttentionPlan, partial_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyinfer.core.launch import BoundLaunch, Kernel
    from pyinfer.core.tensor import TensorView

_STATIC_SMEM = 256  # bytes at most


class PodConfig(NamedTuple):
    """How the two kinds of block are cut. They share threads, blocks per multiprocessor and shared memory.

    Attributes
    ----------
    prefill, decode
        The two configurations.
    ctas_per_sm
        Blocks that a multiprocessor holds at once.
    smem
        Dynamic shared memory per block in bytes.
    """

    prefill: AttentionConfig
    decode: AttentionConfig
    ctas_per_sm: int
    smem: int


@functools.cache
def pod_config(arch: int, dtype: DType | str, head_dim_qk: int, head_dim_vo: int) -> PodConfig:
    """The configuration for a case.

    Parameters
    ----------
    arch
        Architecture number: 80, 89, 90, ...
    dtype
        float16 or bfloat16.
    head_dim_qk, head_dim_vo
        Head dimensions; equal, 64, 128 or 256.

    Raises
    ------
    TypeError, ValueError
        For a dtype or head dimensions without a kernel.
    """
    dt = canonical_dtype(dtype)
    if dt not in DTYPES:
        fail_type("pod", "dtype", "has no CUDA kernel", dt.name, "float16 or bfloat16", "Cast q, k and v.")
    if head_dim_qk != head_dim_vo or head_dim_qk not in HEAD_DIMS:
        got = f"qk {head_dim_qk}, vo {head_dim_vo}"
        fail("pod", "head_dim", "has no CUDA kernel", got, "qk = vo, one of 64, 128, 256")
    # (tile_q, tile_kv, warps, blocks per SM, stages, queries in registers); decode: keys per warp, stages
    if head_dim_qk <= 64:
        shapes = [(128, 64, 4, 2, 2, True), (128, 64, 4, 1, 2, True)]
        slabs = [(32, 3), (32, 2), (16, 3)]
    elif head_dim_qk <= 128:
        # NOTE: 64 keys a tile would spill a few bytes, but for bfloat16 on 9.0: beside the other part there is no register to spare.
        shapes = [(128, 32, 4, 2, 3, False), (128, 32, 4, 1, 3, False)]
        slabs = [(16, 3), (16, 2)]
    else:
        shapes = [(64, 32, 4, 1, 2, False), (32, 32, 2, 1, 2, False)]
        slabs = [(16, 3), (16, 2)]
    per_block, per_sm = smem_limits(arch)
    for tile_q, tile_kv, warps, ctas, stages, in_registers in shapes:
        prefill = prefill_config(
            head_dim_qk, head_dim_vo, tile_q=tile_q, tile_kv=tile_kv, num_warps=warps, ctas_per_sm=ctas, stages=stages, q_in_registers=in_registers
        )  # fmt: skip
        for slab, decode_stages in slabs:
            decode = decode_config(
                head_dim_qk, head_dim_vo, tile_kv=slab * warps, num_warps=warps, ctas_per_sm=ctas, stages=decode_stages
            )
            smem = max(prefill.smem, decode.smem)
            if smem + _STATIC_SMEM <= per_block and ctas * (smem + 1024 + _STATIC_SMEM) <= per_sm:
                return PodConfig(prefill, decode, ctas, smem)
    fail("pod", "head_dim", "has no configuration that fits the GPU", f"{head_dim_qk} on sm_{arch}", "64, 128 or 256")


class PodSpec(NamedTuple):
    """The kernel, and the specs of its two parts, whose fields say what a launch packs."""

    spec: JitSpec
    prefill: JitSpec
    decode: JitSpec


@functools.cache
def gen_pod(
    config: PodConfig,
    dtype: DType | str,
    head_dim_qk: int,
    head_dim_vo: int,
    prefill_source: str = "plan",
    variant: str = "plain",
) -> PodSpec:
    """The spec of one kernel.

    Parameters
    ----------
    config
        From `pod_config`.
    dtype
        float16 or bfloat16: of q, k, v and the output.
    prefill_source
        "plan": prefill items come from an AttentionPlan; "single": from arithmetic on one request's lengths. Decode items always come from a plan.
    variant
        "plain" or "softcap", of both parts.
    """
    dt = canonical_dtype(dtype)
    prefill = gen_attention(config.prefill, dt, head_dim_qk, head_dim_vo, prefill_source, variant)
    decode = gen_attention(config.decode, dt, head_dim_qk, head_dim_vo, "plan", variant)
    params = ParamStruct(
        "PodParams",
        *(replace(f, name=f"prefill_{f.name}") for f in prefill.params.fields),
        *_tail("prefill", prefill.params),
        *(replace(f, name=f"decode_{f.name}") for f in decode.params.fields),
        *_tail("decode", decode.params),
        u32("prefill_blocks"),
        u32("decode_blocks"),
        u32("prefill_rate", "of 65536"),
    )
    spec = JitSpec(
        name=f"pod_sm80_{dt.short}_d{head_dim_qk}_{prefill_source}_{variant}_p{config.prefill.tag}_d{config.decode.tag}",
        template="pod/pod_sm80.cu.jinja",
        params=params,
        constants=(("prefill", prefill), ("decode", decode), ("CTAS_PER_SM", config.ctas_per_sm), ("params_size", params.size)),
        block=config.prefill.block,
        smem=config.smem,
    )  # fmt: skip
    return PodSpec(spec, prefill, decode)


@functools.cache
def _tail(part: str, params: ParamStruct) -> tuple[Any, ...]:
    """Padding behind a part's fields: in C++ it is a struct of its own, whose size is a multiple of 8."""
    used = struct.calcsize("@" + "".join(f.code for f in params.fields))
    return tuple(u32(f"{part}_tail_{i}") for i in range((params.size - used) // 4))


def all_specs(archs: Iterable[int] = (80, 89, 90)) -> list[JitSpec]:
    """Every spec that the launch functions can ask for on the given architectures. The defaults stand for the three sizes of shared memory."""
    found: dict[JitSpec, None] = {}
    for arch in archs:
        for dim in HEAD_DIMS:
            for dtype in DTYPES:
                config = pod_config(arch, dtype, dim, dim)
                for source, variant in (("plan", "plain"), ("plan", "softcap"), ("single", "plain")):
                    found[gen_pod(config, dtype, dim, dim, source, variant).spec] = None
    return list(found)


# ---- launch ----------------------------------------------------------------------------------------------------------------------
_FIVE = struct.Struct("@5P")
_UNSEEN = 1 << 30  # a window no key lies outside of; larger ones could overflow an index


class Part(NamedTuple):
    """One kind of block in a launch.

    Attributes
    ----------
    values
        The kernel's parameters by field name.
    blocks
        Items times kv heads.
    """

    values: dict[str, int | float]
    blocks: int


def plan_part(
    plan: AttentionPlan, plan_ptr: int, q: TensorView, k: TensorView, v: TensorView, kv_indices_ptr: int, kv_layout: str, out: TensorView,
    lse: TensorView | None, workspace_ptr: int, *, sm_scale: float, logits_soft_cap: float = 0.0, v_scale: float = 1.0,
) -> Part:  # fmt: skip
    """The blocks of a plan over a paged cache; arguments as `attention_launch.launch_attention`."""
    at = plan.offsets
    page, second, third, _ = k.strides
    v_page, v_second, v_third, _ = v.strides
    hnd = kv_layout == "HND"
    values = _common(
        q,
        k,
        v,
        out,
        lse,
        sm_scale,
        logits_soft_cap,
        v_scale,
        plan.num_kv_heads,
        plan.causal,
        plan.window_left,
        plan.page_size,
    )
    values.update(
        kv_indices=kv_indices_ptr, partial_o=workspace_ptr, partial_lse=workspace_ptr + plan.partial_lse_offset, semaphore=plan_ptr + 4 * at.semaphore,
        k_stride_page=page, k_stride_token=third if hnd else second, k_stride_head=second if hnd else third,
        v_stride_page=v_page, v_stride_token=v_third if hnd else v_second, v_stride_head=v_second if hnd else v_third,
        plan_header=plan_ptr, work=plan_ptr + 4 * at.work, qo_indptr=plan_ptr + 4 * at.qo_indptr, kv_indptr=plan_ptr + 4 * at.kv_indptr,
        kv_len=plan_ptr + 4 * at.kv_len, num_indices=plan.total_kv if plan.page_size else 0,
    )  # fmt: skip
    return Part(values, plan.max_work * plan.num_kv_heads)


def single_part(
    config: AttentionConfig, q: TensorView, k: TensorView, v: TensorView, kv_layout: str, out: TensorView, lse: TensorView | None, workspace_ptr: int, *,
    causal: bool, window_left: int, sm_scale: float, v_scale: float = 1.0, kv_chunk: int = 0, num_splits: int = 1,
) -> Part:  # fmt: skip
    """The blocks of one request over dense keys; arguments as `attention_launch.launch_single`."""
    hnd = kv_layout == "HND"
    num_kv_heads, kv_len = (k.shape[0], k.shape[1]) if hnd else (k.shape[1], k.shape[0])
    qo_len, num_qo_heads, _ = q.shape
    tiles = -(-qo_len * (num_qo_heads // num_kv_heads) // config.tile_q)
    partial_o = workspace_ptr + SINGLE_SEMAPHORE_BYTES
    partial_lse = partial_o + partial_bytes(tiles * num_splits, num_kv_heads, config.tile_q, v.shape[2])[0]
    token, head = (1, 0) if hnd else (0, 1)
    values = _common(q, k, v, out, lse, sm_scale, 0.0, v_scale, num_kv_heads, causal, window_left, 0)
    values.update(
        kv_indices=0, partial_o=partial_o, partial_lse=partial_lse, semaphore=workspace_ptr,
        k_stride_page=0, k_stride_token=k.strides[token], k_stride_head=k.strides[head],
        v_stride_page=0, v_stride_token=v.strides[token], v_stride_head=v.strides[head],
        qo_len=qo_len, kv_len=kv_len, kv_chunk=kv_chunk, num_splits=num_splits,
    )  # fmt: skip
    return Part(values, tiles * num_splits * num_kv_heads)


def _common(
    q: TensorView, k: TensorView, v: TensorView, out: TensorView, lse: TensorView | None, sm_scale: float, logits_soft_cap: float, v_scale: float,
    num_kv_heads: int, causal: bool, window_left: int, page_size: int,
) -> dict[str, int | float]:  # fmt: skip
    group = q.shape[1] // num_kv_heads
    group_magic, group_shift = divisor(group)
    page_magic, page_shift = divisor(max(page_size, 1))
    cap = logits_soft_cap > 0.0
    return dict(
        q=q.ptr, k=k.ptr, v=v.ptr, out=out.ptr, lse=0 if lse is None else lse.ptr,
        q_stride_token=q.strides[0], q_stride_head=q.strides[1], out_stride_token=out.strides[0], out_stride_head=out.strides[1],
        logit_scale=(2.0 * LOG2_E * sm_scale / logits_soft_cap) if cap else LOG2_E * sm_scale, soft_cap_log2=LOG2_E * logits_soft_cap if cap else 0.0,
        v_scale=v_scale, num_kv_heads=num_kv_heads, group=group, group_magic=group_magic, group_shift=group_shift, causal=int(causal),
        window_left=min(window_left, _UNSEEN), page_size=page_size, page_magic=page_magic, page_shift=page_shift,
    )  # fmt: skip


def aligned(*views: TensorView) -> bool:
    """Whether the kernel can copy rows of all these 16 bytes at a time."""
    return all(map(_is_aligned, views))


def pack_parts(pod: PodSpec, prefill: Part, decode: Part, prefill_rate: int) -> tuple[int | float, ...]:
    """Values of the parameter struct in field order."""
    return (
        *[prefill.values[f.name] for f in pod.prefill.params.fields],
        *[0 for _ in _tail("prefill", pod.prefill.params)],
        *[decode.values[f.name] for f in pod.decode.params.fields],
        *[0 for _ in _tail("decode", pod.decode.params)],
        prefill.blocks,
        decode.blocks,
        prefill_rate,
    )


@functools.cache
def device_pod(
    device: int, dtype: DType, head_dim: int, source: str, variant: str
) -> tuple[PodConfig, PodSpec, Kernel]:
    """The configuration, specs and loaded kernel for a CUDA device."""
    from pyinfer.core.device import arch_number_of

    config = pod_config(arch_number_of(device), dtype, head_dim, head_dim)
    pod = gen_pod(config, dtype, head_dim, head_dim, source, variant)
    return config, pod, pod.spec.build_and_load(device)


def launch_pod(
    kernel: Kernel,
    pod: PodSpec,
    stream: int,
    prefill: Part,
    decode: Part,
    prefill_rate: int,
    pdl: bool = False,
    bind: bool = False,
) -> BoundLaunch | None:
    """Run both kinds of block in one launch; or, with `bind`, return it bound but for q, k, v, out and lse of prefill, then those of decode.

    Parameters
    ----------
    kernel, pod
        From `device_pod`.
    prefill, decode
        From `plan_part` or `single_part`.
    prefill_rate
        From `schedulers.mixed.rate`.
    """
    blocks = prefill.blocks + decode.blocks
    values = pack_parts(pod, prefill, decode, prefill_rate)
    if not bind:
        kernel(stream, blocks, values, pdl)
        return None
    bound, second, pack_into = kernel.bind(blocks, values, 5, pdl), decode_offset(pod), _FIVE.pack_into

    def pack(buffer: Any, at: int, *pointers: int) -> None:
        pack_into(buffer, at, *pointers[:5])
        pack_into(buffer, second, *pointers[5:])

    bound.pack_with(pack)
    return bound


@functools.cache
def decode_offset(pod: PodSpec) -> int:
    """Where the decode part's fields begin in the parameter struct, with q, k, v, out and lse as those of the prefill part do."""
    fields = (*pod.prefill.params.fields, *_tail("prefill", pod.prefill.params))
    return struct.calcsize("@" + "".join([f.code for f in fields]))
