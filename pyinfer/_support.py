"""The checks of options that attention operators share, and `support`, which asks an operator what it takes without tensors.

Named with an underscore because `pyinfer.support` is the function: a submodule of that name would replace it when it is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pyinfer.core.dtypes import BFLOAT16, FLOAT8_E4M3, FLOAT8_E5M2, FLOAT16, FLOAT32, DType, canonical_dtype
from pyinfer.core.errors import fail, fail_type

CUDA_DTYPES = (FLOAT16, BFLOAT16)
CPU_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
KV_DTYPES_FP8 = (FLOAT8_E4M3, FLOAT8_E5M2)
OUT_DTYPES = (FLOAT16, BFLOAT16, FLOAT32)
MAX_HEAD_DIM = 256
MAX_GROUP = 128
POS_ENCODING_MODES = ("NONE", "ROPE_LLAMA", "ALIBI")
BACKENDS = ("auto", "fa2", "fa3")
KERNEL_FAMILIES = {"auto": "", "fa2": "sm80", "fa3": "sm90"}
"""`AttentionOptions.family` of a backend. On the CPU there is one family, and every backend is it."""


def check_backend(op: str, backend: str) -> None:
    """ValueError for a backend that is not here."""
    if backend not in BACKENDS:
        fail(op, "backend", "is not available", repr(backend), "'auto', 'fa2' or 'fa3'")


def check_pos_encoding(
    op: str, pos_encoding_mode: str, rope_scale: float | None = None, rope_theta: float | None = None
) -> tuple[str, float, float]:
    """The mode, rope_scale (1 by default) and rope_theta (10,000 by default); ValueError for what is none, or would be ignored."""
    if pos_encoding_mode not in POS_ENCODING_MODES:
        wanted = "'NONE', 'ROPE_LLAMA' or 'ALIBI'"
        fail(op, "pos_encoding_mode", "is no positional encoding", repr(pos_encoding_mode), wanted)
    scale = 1.0 if rope_scale is None else float(rope_scale)
    theta = 1e4 if rope_theta is None else float(rope_theta)
    for arg, value in (("rope_scale", scale), ("rope_theta", theta)):
        if not 0.0 < value < math.inf:
            fail(op, arg, "is no positive number", value, "a positive number, or None")
    if pos_encoding_mode != "ROPE_LLAMA":
        for arg, value, default in (("rope_scale", scale, 1.0), ("rope_theta", theta, 1e4)):
            if value != default:
                fix = "Pass pos_encoding_mode='ROPE_LLAMA', or leave it out if queries and keys are rotated already."
                fail(op, arg, f"does nothing with pos_encoding_mode {pos_encoding_mode!r}", value, "None", fix)
    return pos_encoding_mode, scale, theta


def check_soft_cap(op: str, logits_soft_cap: float | None) -> float:
    """The soft cap, 0.0 for none."""
    cap = 0.0 if logits_soft_cap is None else float(logits_soft_cap)
    if not 0.0 <= cap < math.inf:
        fail(op, "logits_soft_cap", "is no soft cap", logits_soft_cap, "None, 0 (off) or a positive number")
    return cap


def check_window(op: str, window_left: int) -> int:
    """The window: -1 none."""
    if int(window_left) < -1:
        fail(op, "window_left", "is no window", window_left, "-1 (none) or the number of keys to the left, 0 or more")
    return int(window_left)


def check_head_counts(op: str, num_qo_heads: int, num_kv_heads: int, arg: str = "num_qo_heads") -> None:
    """ValueError unless the query heads are a multiple of the kv heads, at most `MAX_GROUP` of them sharing one."""
    if num_kv_heads < 1 or num_qo_heads < 1 or num_qo_heads % num_kv_heads:
        got = f"{num_qo_heads} query heads, {num_kv_heads} kv heads"
        fail(op, arg, "does not divide among the kv heads", got, "a multiple of num_kv_heads")
    if num_qo_heads // num_kv_heads > MAX_GROUP:
        got = f"{num_qo_heads // num_kv_heads} ({num_qo_heads} query heads, {num_kv_heads} kv heads)"
        fail(op, arg, "makes too large a group", got, f"at most {MAX_GROUP} query heads to a kv head")


def plan_dtypes(op: str, q_data_type: Any, kv_data_type: Any, data_type: Any = None) -> tuple[DType, DType]:
    """The element types of q and of the KV cache.

    FlashInfer's older `data_type` named the KV type while q_data_type kept its default of float16; here it names both, unless q_data_type was given.
    """
    if data_type is not None and kv_data_type is None:
        kv_data_type = data_type
        if q_data_type == "float16" and canonical_dtype(data_type, op, "data_type") not in KV_DTYPES_FP8:
            q_data_type = data_type
    q_dtype = canonical_dtype(q_data_type, op, "q_data_type")
    kv_dtype = q_dtype if kv_data_type is None else canonical_dtype(kv_data_type, op, "kv_data_type")
    if q_dtype is not kv_dtype and kv_dtype not in KV_DTYPES_FP8:
        wanted = f"{q_dtype.name} (q's), float8_e4m3fn or float8_e5m2"
        fail_type(op, "kv_data_type", "differs from q_data_type", kv_dtype.name, wanted, "Convert one of them.")
    if q_dtype in KV_DTYPES_FP8 and kv_dtype is not q_dtype:
        fail_type(
            op,
            "kv_data_type",
            "differs from q_data_type",
            kv_dtype.name,
            f"{q_dtype.name} (q's)",
            "Convert one of them.",
        )
    return q_dtype, kv_dtype


def out_dtype(op: str, q_dtype: DType, o_data_type: Any, arg: str = "o_data_type") -> DType:
    """The output's element type: q's by default."""
    if o_data_type is None:
        return q_dtype
    dtype = canonical_dtype(o_data_type, op, arg)
    if dtype not in OUT_DTYPES:
        fail_type(op, arg, "is no output dtype", dtype.name, "None, float16, bfloat16 or float32")
    return dtype


def prefill_out_dtype(op: str, q_dtype: DType, o_data_type: Any, arg: str = "o_data_type") -> DType:
    """The same of an operator that takes float8_e4m3fn queries, whose output needs a type of its own."""
    if q_dtype is not FLOAT8_E4M3:
        return out_dtype(op, q_dtype, o_data_type, arg)
    wanted = "float16 or bfloat16 (queries are float8_e4m3fn)"
    if o_data_type is None:
        fail_type(op, arg, "is missing", "None", wanted)
    dtype = canonical_dtype(o_data_type, op, arg)
    if dtype not in CUDA_DTYPES:
        fail_type(op, arg, "is no output dtype of queries in 8 bits", dtype.name, wanted)
    return dtype


def check_kernel(
    op: str,
    device: int,
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    dtype_arg: str = "q_data_type",
    rope: bool = False,
    fp8_queries: bool = False,
) -> None:
    """TypeError or ValueError if a device has no kernel for q's type or the head dimensions. fp8_queries: the operator has one for float8_e4m3fn."""
    where = "CUDA" if device >= 0 else "CPU"
    allowed = CUDA_DTYPES if device >= 0 else CPU_DTYPES
    if fp8_queries and dtype is FLOAT8_E4M3:
        if device >= 0:
            _check_fp8_kernel(op, device, head_dim_qk, head_dim_vo)
            return
        allowed = (*allowed, dtype)
    if dtype not in allowed:
        names = " or ".join(d.name for d in allowed)
        fail_type(op, dtype_arg, f"has no {where} kernel", dtype.name, names, f"Convert to {names.split(' or ')[0]}.")
    step = 8 if device >= 0 else 1
    for dim in (head_dim_qk, head_dim_vo):
        if not 1 <= dim <= MAX_HEAD_DIM or dim % step:
            wanted = f"multiples of 8 up to {MAX_HEAD_DIM}" if step > 1 else f"1..{MAX_HEAD_DIM}"
            fix = "Pad q, k and v with zeros and pass sm_scale." if dim < MAX_HEAD_DIM else ""
            fail(op, "head_dim", f"has no {where} kernel", f"{head_dim_qk} (qk), {head_dim_vo} (vo)", wanted, fix)
    if rope and head_dim_qk % 2:
        fail(op, "head_dim", "cannot be rotated in pairs", f"{head_dim_qk} (qk)", "an even head_dim_qk")


def _check_fp8_kernel(op: str, device: int, head_dim_qk: int, head_dim_vo: int) -> None:
    """ValueError if a CUDA device has no kernel for float8_e4m3fn queries."""
    from pyinfer.core.device import arch_number_of
    from pyinfer.jit.attention_fp8 import check_case, check_device

    check_case(op, head_dim_qk, head_dim_vo)
    check_device(op, arch_number_of(device))


@dataclass(frozen=True)
class Support:
    """An answer of `support`: true where the configuration can be selected; `reason` is the text of the exception otherwise."""

    selectable: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.selectable


def support(op: str, *, device: str | int | None = None, **config: Any) -> Support:
    """Say whether a configuration of an operator or wrapper can be selected and, if not, why.

    The operator itself is asked, with tensors that have no memory: nothing is allocated, compiled or launched.

    Parameters
    ----------
    op
        Name of an operator or wrapper, e.g. "BatchDecodeWithPagedKVCacheWrapper", "rmsnorm".
    device
        "cpu", "cuda", "cuda:1", or an index; None: "cuda" where there is a GPU, else "cpu". A GPU need not be there to be asked about; what depends on
        its architecture is known only if it is.
    config
        Of a wrapper: any argument of its constructor and of plan() (num_qo_heads, head_dim, page_size, q_data_type, window_left, backend, ...); `head_dim`
        sets head_dim_qk and head_dim_vo; `custom_mask=True` asks whether there may be one.
        Of an operator: any of its arguments but tensors, and what describes these: `dtype`, and `hidden` (norms, activations), `num_qo_heads`,
        `num_kv_heads`, `head_dim` (rope, page), `page_size`, `vocab` (sampling), `num_heads`, `head_dim` (merging), `q_data_type`, `kv_data_type`,
        `o_data_type`, `head_dim` (attention). A tensor argument may also be described by name as (dtype, shape): `input=("float16", (4, 576))`.

    Returns
    -------
    Support
        True if it can be selected. `reason` is the text of the exception that the operator would raise.

    Raises
    ------
    ValueError
        If `op` is no operator or `device` no device.
    TypeError
        For a keyword that the operator does not have.

    Examples
    --------
    >>> import pyinfer
    >>> bool(pyinfer.support("single_prefill_with_kv_cache", device="cuda", head_dim=192))
    True
    >>> pyinfer.support("single_prefill_with_kv_cache", device="cuda", head_dim=100).reason.split(". ")[0]
    'single_prefill_with_kv_cache: head_dim has no CUDA kernel: got 100 (qk), 100 (vo), wanted multiples of 8 up to 256'
    >>> bool(pyinfer.support("softmax", vocab=300_000))
    False
    """
    import pyinfer
    from pyinfer._support_ask import ask

    operators = sorted(name for names in pyinfer._FAMILIES.values() for name in names)
    if op not in operators:
        wanted = "one of " + ", ".join(operators)
        fail("support", "op", "is no operator", repr(op), wanted)
    reason = ask(op, getattr(pyinfer, op), _device_index(device), dict(config))
    return Support(not reason, reason)


def _device_index(device: str | int | None) -> int:
    if device is None:
        from pyinfer.core.device import cuda_available

        return 0 if cuda_available() else -1
    if isinstance(device, int):
        return device
    name, _, number = str(device).partition(":")
    if name == "cpu" and not number:
        return -1
    if name == "cuda" and (not number or number.isdecimal()):
        return int(number or 0)
    fail("support", "device", "is no device", repr(device), "'cpu', 'cuda' or 'cuda:N'")
