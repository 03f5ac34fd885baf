"""The operators on one request that take a module of `jit.gen_customize_single_*_module`, where FlashInfer has them: in decode and prefill."""

from __future__ import annotations

from typing import Any

from pyinfer.core.errors import fail
from pyinfer.core.tensor import view
from pyinfer.jit.customize import CustomModule, custom_module


def _module(op: str, phase: str, jit_module: Any, q: Any, k: Any, v: Any) -> CustomModule:
    module = custom_module(op, phase, jit_module)
    qv, kv, vv = (view(x, op, arg) for x, arg in ((q, "q"), (k, "k"), (v, "v")))
    module.check(op, phase, qv.dtype, kv.dtype, qv.dtype, (qv.shape[-1], vv.shape[-1]))
    return module


def single_decode_with_kv_cache_with_jit_module(
    jit_module: CustomModule,
    q: Any,
    k: Any,
    v: Any,
    *args: Any,
    kv_layout: str = "NHD",
    window_left: int = -1,
    return_lse: bool = False,
) -> Any:
    """`single_decode_with_kv_cache` with a variant of FlashInfer's form.

    Parameters
    ----------
    jit_module
        `jit.gen_customize_single_decode_module(...).build_and_load()`.
    q, k, v, kv_layout, window_left, return_lse
        As in `single_decode_with_kv_cache`, on a GPU, of the types that the module was made for.
    args
        The module's extra tensors (None where the name begins with "maybe"), then its scalars.

    Raises
    ------
    ValueError, TypeError
        If the module is none, or was made for other types; and as `single_decode_with_kv_cache`.
    """
    from pyinfer.decode import single_decode_with_kv_cache

    module = _module("single_decode_with_kv_cache_with_jit_module", "single_decode", jit_module, q, k, v)
    return single_decode_with_kv_cache(
        q, k, v, kv_layout, window_left=window_left, sm_scale=1.0, return_lse=return_lse, variant=module.variant, variant_args=args,
    )  # fmt: skip


def single_prefill_with_kv_cache_with_jit_module(
    jit_module: CustomModule,
    q: Any,
    k: Any,
    v: Any,
    *args: Any,
    kv_layout: str = "NHD",
    mask_mode: int = 0,
    window_left: int = -1,
    return_lse: bool = False,
) -> Any:
    """`single_prefill_with_kv_cache` with a variant of FlashInfer's form.

    Parameters
    ----------
    mask_mode
        0: none; 1: causal. A custom mask belongs to the variant.

    The others as in `single_decode_with_kv_cache_with_jit_module`.
    """
    from pyinfer.prefill import single_prefill_with_kv_cache

    op = "single_prefill_with_kv_cache_with_jit_module"
    module = _module(op, "single_prefill", jit_module, q, k, v)
    if mask_mode not in (0, 1):
        fix = "Write REGISTER_LOGITS_MASK, or use single_prefill_with_kv_cache(custom_mask=..., variant=...)."
        fail(op, "mask_mode", "is not supported", mask_mode, "0 (none) or 1 (causal)", fix)
    return single_prefill_with_kv_cache(
        q, k, v, causal=mask_mode == 1, kv_layout=kv_layout, sm_scale=1.0, window_left=window_left, return_lse=return_lse, variant=module.variant,
        variant_args=args,
    )  # fmt: skip
