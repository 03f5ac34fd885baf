"""Gated activations of feed-forward layers: ``act(gate) * up``, gate and up side by side in one tensor."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import Calls
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32
from pyinfer.core.errors import check_dtype, check_same_device, check_same_dtype, check_shape, fail
from pyinfer.core.rows import common_row_layout, vector_length
from pyinfer.core.tensor import empty, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel
    from pyinfer.jit.spec import JitModule

__all__ = ["gelu_and_mul", "gelu_tanh_and_mul", "silu_and_mul"]

_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
_calls = Calls()


def silu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """SwiGLU's elementwise part: ``silu(input[..., :d]) * input[..., d:]`` with ``silu(x) = x / (1 + exp(-x))``.

    Computed in float32, rounded once. Formula: Shazeer, arXiv 2002.05202.

    Parameters
    ----------
    input
        [..., 2d], float16, bfloat16 or float32, last axis contiguous and a multiple of 16 bytes long; rows may be strided.
    out
        Where to write: [..., d], dtype of input. Allocated if None.
    enable_pdl
        CUDA: let the kernel start while the one before it ends (programmatic dependent launch). None: wherever the GPU has it.

    Returns
    -------
    Tensor [..., d] of input's dtype and framework (`out` if given).

    Raises
    ------
    TypeError
        For a dtype not listed, or an `out` of another dtype.
    ValueError
        If the last axis is no multiple of 16 bytes, or shapes or devices do not fit.
    """
    return _act_and_mul("silu_and_mul", "silu", input, out, enable_pdl)


def gelu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """As `silu_and_mul` with ``gelu(x) = x (1 + erf(x / sqrt 2)) / 2``."""
    return _act_and_mul("gelu_and_mul", "gelu", input, out, enable_pdl)


def gelu_tanh_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """As `silu_and_mul` with ``gelu(x) = x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``."""
    return _act_and_mul("gelu_tanh_and_mul", "gelu_tanh", input, out, enable_pdl)


def _act_and_mul(op: str, act: str, input: Any, out: Any, enable_pdl: bool | None) -> Any:
    scalars = (act, enable_pdl is not False)
    tensors = (input,) if out is None else (input, out)
    call = _calls.find(scalars, tensors)
    if call is not None:
        result = call.new() if out is None else out
        x_ptr, out_ptr = call.ptr(input), call.ptr(result)
        if not (x_ptr | out_ptr) & 15:
            call.launch(call.stream(call.device), x_ptr, out_ptr)
            return result
    x = view(input, op, "input")
    check_dtype(op, "input", x, _DTYPES)
    size = x.dtype.itemsize
    shape = tuple(x.shape)
    if not shape or shape[-1] * size % 16:
        got = f"{shape[-1] * size} bytes (shape {shape}, {x.dtype.name})" if shape else "a tensor without axes"
        fail(
            op,
            "input",
            "has a last axis of the wrong length",
            got,
            "a multiple of 16 bytes",
            "Pad the hidden dimension.",
        )
    width = shape[-1] // 2
    out_shape = (*shape[:-1], width)
    if out is None:
        out = empty(x, out_shape)
        o = view(out)
    else:
        o = view(out, op, "out")
        check_shape(op, "out", o, out_shape)
        check_same_dtype(op, "out", o, "input", x)
        if o.device != x.device:
            check_same_device(op, {"input": x, "out": o})
    rows, out_rows = common_row_layout(op, "input", x, "out", o)
    n, inner, x_outer, x_inner = rows
    if not n:
        return out
    if x.device < 0:
        from pyinfer.cpu import activation as cpu

        cpu.act_and_mul(act, x, o, rows, out_rows)
        return out
    _, _, o_outer, o_inner = out_rows
    vec = vector_length(size, x.ptr | o.ptr | (width | x_outer | x_inner | o_outer | o_inner) * size)
    kernel, per_block, chunks, has_pdl = _act_and_mul_kernel(x.device, act, x.dtype.name, width, vec)
    values = (x.ptr, o.ptr, x_outer, x_inner, o_outer, o_inner, n, inner, chunks, width)
    aligned = not (x.ptr | o.ptr) & 15
    outputs = ((out_shape, x.dtype),) if len(tensors) == 1 else ()
    pdl = has_pdl and scalars[1]
    _calls.launch(scalars, tensors, x, kernel, -(-n // per_block) * chunks, values, 2, pdl, aligned, outputs)
    return out


@functools.cache
def _act_and_mul_kernel(device: int, act: str, dtype: str, width: int, vec: int) -> tuple[Kernel, int, int, bool]:
    """Kernel, rows per block, blocks per row, whether it was built for programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.activation import act_config, gen_act_and_mul

    config = act_config(width // vec)
    return (
        gen_act_and_mul(act, dtype, width, vec).build_and_load(device),
        config.rows,
        config.chunks,
        pdl_supported(device),
    )


def gen_act_and_mul_module(act_func_name: str) -> JitModule:
    """`pyinfer.jit.activation.gen_act_and_mul_module`."""
    from pyinfer.jit.activation import gen_act_and_mul_module as gen

    return gen(act_func_name)


def __getattr__(name: str) -> Any:
    if name == "act_func_def_str":  # lives with the specs; looked up here by users of FlashInfer
        from pyinfer.jit.activation import act_func_def_str

        return act_func_def_str
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


attach(__name__)  # what torch.compile traces in the place of these functions
