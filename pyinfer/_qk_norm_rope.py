"""Queries and keys normalised and rotated by their place in a grid, values copied: what `pyinfer.fused_qk_rmsnorm_rope` does."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import MISS, Calls
from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_ndim, check_same_device, check_same_dtype, check_shape, fail
from pyinfer.core.rows import row_layout, vector_length
from pyinfer.core.scales import empty_fp8
from pyinfer.core.tensor import TensorView, empty, view

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel

OP = "fused_qk_rmsnorm_rope"
_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_MAX_HEAD_DIM = 512  # the table of frequencies is a kernel parameter, of which there are 4 KiB
_calls = Calls()


def fused_qk_rmsnorm_rope(
    qkv: Any,
    q_weight: Any,
    k_weight: Any,
    *,
    ppf: int,
    pph: int,
    ppw: int,
    num_frame_channels: int,
    num_height_channels: int,
    num_width_channels: int,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float = 1e-6,
    base: float = 10000.0,
    interleave: bool = True,
    factor: float = 1.0,
    low: float = 0.0,
    high: float = 0.0,
    attention_factor: float = 1.0,
    is_qk_norm: bool = True,
    output_fp8: bool = False,
    output_quant_scale: float = 1.0,
    v_quant_scale: float = 1.0,
    q_out: Any = None,
    k_out: Any = None,
    v_out: Any = None,
) -> tuple[Any, Any, Any]:
    """Self-attention's inputs of a video model (Wan) in one launch: RMS norm of q and of k over all heads, rotation in three dimensions, v copied.

    Token t of a sequence lies at frame ``t // (pph * ppw)``, height ``t // ppw % pph`` and width ``t % ppw``. Of a head's pairs the first
    ``num_frame_channels / 2`` turn with the frame, the next with the height, the last with the width; pair j of a coordinate with n channels turns by
    ``base^(-2 j / n)`` a step. Everything is computed in float32 and rounded once.

    Parameters
    ----------
    qkv
        [batch, ppf * pph * ppw, (num_heads_q + num_heads_k + num_heads_v) * head_dim], or [tokens, ...] with whole sequences one after another; float16,
        bfloat16 or float32, any strides but a contiguous last axis.
    q_weight, k_weight
        [num_heads_q * head_dim] and [num_heads_k * head_dim], dtype of qkv.
    ppf, pph, ppw
        Frames, height and width of the grid.
    num_frame_channels, num_height_channels, num_width_channels
        Even, together head_dim.
    head_dim
        Even, to 512.
    interleave
        Pairs are neighbours (2 i, 2 i + 1); else (i, i + head_dim / 2).
    factor, low, high, attention_factor
        YaRN, where factor is not 1: from pair `low` to pair `high` of a coordinate frequencies go over to theirs divided by factor, and cosines and sines are
        multiplied by attention_factor.
    is_qk_norm
        False: rotate only.
    output_fp8, output_quant_scale, v_quant_scale
        Results as float8_e4m3fn, saturating, after a multiplication: of q and k by the first, of v by the second scale.
    q_out, k_out, v_out
        Where to write: [batch, ppf * pph * ppw, heads, head_dim] or [tokens, heads, head_dim], contiguous. Allocated if None.

    Returns
    -------
    (q, k, v)

    Raises
    ------
    TypeError
        For a dtype not listed, or dtypes that differ.
    ValueError
        For shapes, numbers or devices that do not fit.
    """
    channels = (num_frame_channels, num_height_channels, num_width_channels)
    heads, scales = (num_heads_q, num_heads_k, num_heads_v), (output_quant_scale, v_quant_scale)
    return _qk_norm_rope(
        qkv, (q_weight, k_weight), (ppf, pph, ppw), channels, heads, head_dim, eps, (base, factor, low, high), attention_factor, interleave, is_qk_norm,
        output_fp8, scales, (q_out, k_out, v_out),
    )  # fmt: skip


def _qk_norm_rope(
    qkv: Any,
    weights: tuple[Any, Any],
    grid: tuple[int, int, int],
    channels: tuple[int, int, int],
    heads: tuple[int, int, int],
    head_dim: int,
    eps: float,
    yarn: tuple[float, float, float, float],
    attention_factor: float,
    interleave: bool,
    norm: bool,
    to_fp8: bool,
    scales: tuple[float, float],
    outputs: tuple[Any, Any, Any],
) -> tuple[Any, Any, Any]:
    """`grid`: frames, height, width. `channels`: elements of a head that turn with each. `yarn`: base, factor, low, high. `outputs`: of q, k and v, or None."""
    scalars = (grid, channels, heads, head_dim, eps, yarn, attention_factor, interleave, norm, to_fp8, scales)
    given = [o for o in outputs if o is not None]
    known = (qkv, *weights, *given)
    if len(given) in (0, 3):
        result = _calls.run(scalars, known)
        if result is not MISS:
            return outputs if given else result
    _check_numbers(grid, channels, heads, head_dim, yarn, attention_factor, scales)
    x = view(qkv, OP, "qkv")
    check_ndim(OP, "qkv", x, (2, 3))
    check_dtype(OP, "qkv", x, _DTYPES)
    check_shape(OP, "qkv", x, (*(None,) * (len(x.shape) - 1), sum(heads) * head_dim))
    places = grid[0] * grid[1] * grid[2]
    if x.shape[-2] != places if len(x.shape) == 3 else x.shape[0] % places:
        wanted = f"{places} (ppf * pph * ppw)" if len(x.shape) == 3 else f"a multiple of {places} (ppf * pph * ppw)"
        fail(OP, "qkv", "has another number of tokens", x.shape[-2], wanted)
    q_weight, k_weight = view(weights[0], OP, "q_weight"), view(weights[1], OP, "k_weight")
    for arg, w, n in (("q_weight", q_weight, heads[0]), ("k_weight", k_weight, heads[1])):
        check_shape(OP, arg, w, (n * head_dim,))
        check_same_dtype(OP, arg, w, "qkv", x)
        check_same_device(OP, {"qkv": x, arg: w})
        row_layout(OP, arg, w)  # raises unless contiguous
    rows = row_layout(OP, "qkv", x)
    dtype = FLOAT8_E4M3 if to_fp8 else x.dtype
    made: list[Any] = []
    outs: list[TensorView] = []
    for arg, n, out in zip(("q_out", "k_out", "v_out"), heads, outputs, strict=True):
        shape = (*x.shape[:-1], n, head_dim)
        if out is None:
            out = empty_fp8(OP, "qkv", x, shape, dtype) if to_fp8 else empty(x, shape)
        made.append(out)
        outs.append(_check_out(arg, view(out, OP, arg), shape, dtype, x))
    if rows[0]:
        options = (interleave, norm, eps, attention_factor, scales)
        if x.device < 0:
            _run_cpu(x, (q_weight, k_weight), outs, rows, grid, channels, heads, yarn, *options)
        else:
            shapes = () if given else tuple((o.shape, dtype) for o in outs)
            memory = (scalars, known, shapes, len(given) in (0, 3))
            _launch(x, (q_weight, k_weight), outs, rows, grid, channels, heads, head_dim, yarn, *options, memory)
    return made[0], made[1], made[2]


def _check_numbers(
    grid: tuple[int, int, int],
    channels: tuple[int, int, int],
    heads: tuple[int, int, int],
    head_dim: int,
    yarn: tuple[float, float, float, float],
    attention_factor: float,
    scales: tuple[float, float],
) -> None:
    for arg, n in zip(("ppf", "pph", "ppw"), grid, strict=True):
        if n < 1:
            fail(OP, arg, "is too small", n, "1 or more")
    for arg, n in zip(("num_heads_q", "num_heads_k", "num_heads_v"), heads, strict=True):
        if n < 1:
            fail(OP, arg, "is no head count", n, "1 or more")
    if head_dim < 2 or head_dim % 2 or head_dim > _MAX_HEAD_DIM:
        fail(OP, "head_dim", "cannot be rotated", head_dim, f"an even number from 2 to {_MAX_HEAD_DIM}")
    for arg, n in zip(("num_frame_channels", "num_height_channels", "num_width_channels"), channels, strict=True):
        if n < 0 or n % 2:
            fail(OP, arg, "does not make pairs", n, "an even number, 0 or more")
    if sum(channels) != head_dim:
        got = " + ".join(map(str, channels))
        fail(
            OP,
            "num_frame_channels",
            "and those of height and width are not a head's",
            got,
            f"head_dim {head_dim} in all",
        )
    factor = yarn[1]
    for arg, value in (("base", yarn[0]), ("factor", factor), ("attention_factor", attention_factor)):
        if not 0.0 < value < float("inf"):
            fail(OP, arg, "is no positive number", value, "a positive, finite number")
    if factor == 1.0 and attention_factor != 1.0:
        fail(OP, "attention_factor", "is given without YaRN", attention_factor, "1.0 where factor is 1.0")
    for arg, scale in zip(("output_quant_scale", "v_quant_scale"), scales, strict=True):
        if not 0.0 < scale < float("inf"):
            fail(OP, arg, "is no scale", scale, "a positive, finite number")


def _check_out(arg: str, out: TensorView, shape: tuple[int, ...], dtype: Any, x: TensorView) -> TensorView:
    check_dtype(OP, arg, out, (dtype,))
    check_shape(OP, arg, out, shape)
    check_same_device(OP, {"qkv": x, arg: out})
    wanted, stride = [], 1
    for n in reversed(shape):
        wanted.append(stride)
        stride *= n
    if stride and any(n > 1 and s != w for n, s, w in zip(shape, out.strides, reversed(wanted), strict=True)):
        fail(OP, arg, "is not contiguous", f"strides {tuple(out.strides)}", f"{tuple(reversed(wanted))}")
    return out


def _run_cpu(
    x: TensorView,
    weights: tuple[TensorView, TensorView],
    outs: list[TensorView],
    rows: tuple[int, int, int, int],
    grid: tuple[int, int, int],
    channels: tuple[int, int, int],
    heads: tuple[int, int, int],
    yarn: tuple[float, float, float, float],
    interleave: bool,
    norm: bool,
    eps: float,
    attention_factor: float,
    scales: tuple[float, float],
) -> None:
    from pyinfer.cpu import qk_norm_rope as cpu
    from pyinfer.jit.rope import grid_frequency_table

    table = grid_frequency_table(channels, *yarn)
    axes = (channels[0] // 2, (channels[0] + channels[1]) // 2)
    factors = (attention_factor, *(scales if outs[0].dtype is FLOAT8_E4M3 else (1.0, 1.0)))
    places = grid[0] * grid[1] * grid[2]
    cpu.qk_norm_rope(
        x, weights, (outs[0], outs[1], outs[2]), rows, heads, (grid[1], grid[2], places), axes, table, bool(interleave), bool(norm), eps, factors
    )  # fmt: skip


def _launch(
    x: TensorView,
    weights: tuple[TensorView, TensorView],
    outs: list[TensorView],
    rows: tuple[int, int, int, int],
    grid: tuple[int, int, int],
    channels: tuple[int, int, int],
    heads: tuple[int, int, int],
    head_dim: int,
    yarn: tuple[float, float, float, float],
    interleave: bool,
    norm: bool,
    eps: float,
    attention_factor: float,
    scales: tuple[float, float],
    memory: tuple[Any, tuple[Any, ...], tuple[Any, ...], bool],
) -> None:
    """`memory`: what `Calls.run` will be asked with, what the call allocated, and whether to remember it."""
    n, inner, x_outer, x_inner = rows
    size, out_dtype = x.dtype.itemsize, outs[0].dtype
    bits = x.ptr | weights[0].ptr | weights[1].ptr | (head_dim // 2 | x_outer | x_inner) * size
    for o in (
        outs
    ):  # an access of an 8-bit result is as many elements as one of the input, so half or a quarter of its bytes
        bits |= o.ptr * (size // out_dtype.itemsize)
    vec = vector_length(size, bits)
    kernel, table, has_pdl = _kernel(
        x.device, x.dtype.name, out_dtype.name, head_dim, max(heads), bool(interleave), bool(norm), vec, channels, yarn
    )
    pointers = (x.ptr, weights[0].ptr, weights[1].ptr, *(o.ptr for o in outs))
    frame, pairs = grid[1] * grid[2], (channels[0] // 2, (channels[0] + channels[1]) // 2)
    shape = (inner, grid[0] * frame, frame, grid[2], *heads, *pairs)
    values = (*pointers, table, x_outer, x_inner, *shape, eps, attention_factor, *scales)
    scalars, known, shapes, remember = memory
    aligned = remember and vec * size == 16
    _calls.launch(scalars, known, x, kernel, n * 3, values, len(pointers), has_pdl, aligned, shapes)


@functools.cache
def _kernel(
    device: int,
    dtype: str,
    out: str,
    head_dim: int,
    max_heads: int,
    interleave: bool,
    norm: bool,
    vec: int,
    channels: tuple[int, int, int],
    yarn: tuple[float, float, float, float],
) -> tuple[Kernel, bytes, bool]:
    """Kernel, its table of frequencies, whether the device has programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.qk_norm_rope import gen_qk_norm_rope
    from pyinfer.jit.rope import grid_frequency_table

    spec = gen_qk_norm_rope(dtype, out, head_dim, max_heads, interleave, norm, vec)
    return spec.build_and_load(device), grid_frequency_table(channels, *yarn).tobytes(), pdl_supported(device)
