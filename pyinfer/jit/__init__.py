"""Render → compile → cache → load. `gen_*` factories live in one module per operator family."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "JitSpec": "spec",
    "JitModule": "spec",
    "gen_jit_spec": "spec",
    "build_jit_specs": "spec",
    "JitError": "compiler",
    "clear_cache_dir": "cache",
}
FAMILIES = (
    "norm",
    "activation",
    "rope",
    "page",
    "cascade",
    "sampling",
    "attention",
    "attention_sm90",
    "attention_fp8",
    "pod",
    "mla",
    "quantization",
    "topk",
    "replan",
    "gemm",
)
"""Modules of this package that have `all_specs()`."""


def all_specs() -> list[Any]:
    """Every specialisation worth building ahead, of every family."""
    return [spec for family in FAMILIES for spec in importlib.import_module(f"pyinfer.jit.{family}").all_specs()]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"pyinfer.jit.{_EXPORTS[name]}"), name)
    if name in ("spec", "cache", "compiler", "env", "warmup", *FAMILIES):
        return importlib.import_module(f"pyinfer.jit.{name}")
    if name.startswith("gen_customize_"):
        return getattr(importlib.import_module("pyinfer.jit.customize"), name)
    if name.startswith("gen_"):
        for family in FAMILIES:
            module = importlib.import_module(f"pyinfer.jit.{family}")
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
