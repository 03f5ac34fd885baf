"""Matrix products on the CPU: NumPy's BLAS in float32."""

from __future__ import annotations

import numpy as np

from pyinfer.core.tensor import TensorView, as_numpy


def tinygemm(x: TensorView, weight: TensorView, out: TensorView, bias: TensorView | None) -> None:
    """out = x weight^T + bias, computed in float32 and rounded once."""
    product = as_numpy(x).astype(np.float32) @ as_numpy(weight).astype(np.float32).T
    if bias is not None:
        product += as_numpy(bias).astype(np.float32)
    target = as_numpy(out)
    target[...] = product.astype(target.dtype)
