"""Small helpers that users of FlashInfer import from its `utils`: enumerations, rounding, questions about a GPU."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

__all__ = [
    "MaskMode",
    "PosEncodingMode",
    "TensorLayout",
    "canonicalize_torch_dtype",
    "ceil_div",
    "determine_attention_backend",
    "determine_mla_backend",
    "device_support_pdl",
    "get_alibi_slopes",
    "get_compute_capability",
    "get_indptr",
    "is_fa3_backend_supported",
    "is_sm90a_supported",
    "is_sm100a_supported",
    "last_positive_power_of_2",
    "next_positive_power_of_2",
    "register_custom_op",
    "register_fake_op",
    "round_up",
    "set_log_level",
]


class PosEncodingMode(enum.Enum):
    """Positional encoding within attention."""

    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class MaskMode(enum.Enum):
    """Kind of mask."""

    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class TensorLayout(enum.Enum):
    """Layout of keys and values."""

    NHD = 0
    HND = 1


# ---- numbers ---------------------------------------------------------------------------------------------------------------------
def ceil_div(x: int, y: int) -> int:
    """x / y rounded up, of integers."""
    return -(-x // y)


def round_up(x: int, y: int) -> int:
    """The smallest multiple of y that is not below x."""
    return -(-x // y) * y


def next_positive_power_of_2(x: int) -> int:
    """The smallest power of 2 that is not below x; 1 for x below 1."""
    return 1 if x < 1 else 1 << (x - 1).bit_length()


def last_positive_power_of_2(x: int) -> int:
    """The largest power of 2 that is not above x, which is 1 or more."""
    if x < 1:
        from pyinfer.core.errors import fail

        fail("last_positive_power_of_2", "x", "has no power of 2 below it", x, "1 or more")
    return 1 << (x.bit_length() - 1)


def get_indptr(x: Any) -> Any:
    """Where segments of these lengths begin: [0, x0, x0 + x1, ...], int64 [batch + 1], in x's framework."""
    from pyinfer.core.dtypes import INT64
    from pyinfer.core.tensor import view, zeros

    v = view(x, "get_indptr", "x")
    out = zeros(v, (v.shape[0] + 1,), INT64)
    out[1:] = x.cumsum(0)
    return out


def get_alibi_slopes(n_heads: int) -> Any:
    """ALiBi slope of every query head (Press et al., arXiv 2108.12409): a float32 tensor [n_heads], of torch where it is installed, else of NumPy."""
    import numpy as np

    if n_heads < 1:
        from pyinfer.core.errors import fail

        fail("get_alibi_slopes", "n_heads", "is no number of heads", n_heads, "1 or more")
    n = last_positive_power_of_2(n_heads)
    first = 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    rest = 2.0 ** (-4.0 / n * np.arange(1, 2 * (n_heads - n) + 1, 2))
    slopes = np.concatenate([first, rest]).astype(np.float32)
    try:
        import torch
    except ImportError:
        return slopes
    return torch.from_numpy(slopes)


def _get_range_buf(seq_len: int, device: Any) -> Any:
    """0 .. seq_len - 1 as an int32 torch tensor."""
    import torch

    return torch.arange(seq_len, dtype=torch.int32, device=device)


def canonicalize_torch_dtype(dtype: Any) -> Any:
    """A torch dtype, from one or from its name."""
    import torch

    from pyinfer.core.dtypes import canonical_dtype

    return getattr(torch, canonical_dtype(dtype, "canonicalize_torch_dtype", "dtype").name)


# ---- devices ---------------------------------------------------------------------------------------------------------------------
def _ordinal(device: Any) -> int:
    """The CUDA ordinal that a torch device, a string or an int names; -1 for the CPU."""
    from pyinfer._support import _device_index

    if isinstance(device, int):
        return device
    index, kind = getattr(device, "index", None), getattr(device, "type", None)
    if kind is not None:
        return -1 if kind == "cpu" else index if index is not None else _current()
    return _current() if device is None or str(device) == "cuda" else _device_index(device)


def _current() -> int:
    from pyinfer.core.device import current_device

    return current_device()


def get_compute_capability(device: Any) -> tuple[int, int]:
    """(major, minor) of a CUDA device: a torch device, "cuda:1" or an ordinal."""
    from pyinfer.core.device import device_info

    index = _ordinal(device)
    if index < 0:
        from pyinfer.core.errors import fail

        fail("get_compute_capability", "device", "is no GPU", str(device), "a CUDA device")
    return divmod(device_info(index).capability, 10)


def is_sm90a_supported(device: Any) -> bool:
    """Whether the device is a Hopper GPU (compute capability 9.x)."""
    return get_compute_capability(device)[0] == 9


def is_sm100a_supported(device: Any) -> bool:
    """Whether the device is a data-centre Blackwell GPU (compute capability 10.x)."""
    return get_compute_capability(device)[0] == 10


def device_support_pdl(device: Any) -> bool:
    """Whether kernels built for the device use programmatic dependent launch."""
    from pyinfer.core.device import pdl_supported

    index = _ordinal(device)
    return index >= 0 and pdl_supported(index)


def is_fa3_backend_supported(
    pos_encoding_mode: int, use_fp16_qk_reductions: bool, use_custom_mask: bool, dtype_q: Any, dtype_kv: Any
) -> bool:
    """Whether FlashInfer's fa3 family takes these options on Hopper: no positional encoding, no custom mask, 16-bit keys."""
    from pyinfer.core.dtypes import canonical_dtype

    names = [canonical_dtype(x, "is_fa3_backend_supported", arg).name for x, arg in ((dtype_q, "dtype_q"), (dtype_kv, "dtype_kv"))]  # fmt: skip
    half = all(name in ("float16", "bfloat16") for name in names)
    return not pos_encoding_mode and not use_fp16_qk_reductions and not use_custom_mask and half


def determine_attention_backend(
    device: Any,
    pos_encoding_mode: int,
    use_fp16_qk_reductions: bool,
    use_custom_mask: bool,
    dtype_q: Any,
    dtype_kv: Any,
) -> str:
    """Return "fa3" on a Hopper GPU where `is_fa3_backend_supported`, else "fa2". Every wrapper of pyinfer takes "auto", which chooses by more."""
    options = (pos_encoding_mode, use_fp16_qk_reductions, use_custom_mask, dtype_q, dtype_kv)
    return "fa3" if is_sm90a_supported(device) and is_fa3_backend_supported(*options) else "fa2"


def determine_mla_backend(device: Any) -> str:
    """Return "fa3" on a Hopper GPU, else "fa2"."""
    return "fa3" if is_sm90a_supported(device) else "fa2"


# ---- logging ---------------------------------------------------------------------------------------------------------------------
def set_log_level(lvl_str: str) -> None:
    """Set the level of pyinfer's logger ("debug", "info", "warning", "error", "critical"): copies and compiles are told at debug and info."""
    import logging

    level = logging.getLevelName(str(lvl_str).upper())
    if not isinstance(level, int):
        from pyinfer.core.errors import fail

        fail(
            "set_log_level",
            "lvl_str",
            "is no level",
            repr(lvl_str),
            "'debug', 'info', 'warning', 'error' or 'critical'",
        )
    logging.getLogger("pyinfer").setLevel(level)


# ---- torch ops -------------------------------------------------------------------------------------------------------------------
def register_custom_op(
    name: str, fn: Callable[..., Any] | None = None, /, *, mutates_args: Any = (), device_types: Any = None, schema: str | None = None
) -> Callable[..., Any]:  # fmt: skip
    """A decorator that returns the function as it is, as FlashInfer's does: nothing is registered."""
    return fn if fn is not None else lambda f: f


def register_fake_op(name: str, fn: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """As `register_custom_op`."""
    return fn if fn is not None else lambda f: f
