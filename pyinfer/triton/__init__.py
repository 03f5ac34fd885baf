"""Triton alternatives to some of the CUDA kernels: activation, cascade, norm, page, quantize.

They take torch tensors on a GPU (or on the CPU under ``TRITON_INTERPRET=1``) and need the package triton, which torch's CUDA wheels bring along; nothing else
in pyinfer does. Importing these modules needs neither: a call without triton raises ImportError and says what to install. Names, layouts and results are
those of the CUDA operators and of FlashInfer's modules of this name; triton's own compiler runs at the first call of each kind.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["activation", "cascade", "norm", "page", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
