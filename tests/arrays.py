"""Making test tensors in any framework, and the one comparator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

NUMPY_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}
# Relative error of one rounding to the type: what a result of that type can be off by, however well computed.
EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


@dataclass(frozen=True)
class Backend:
    """Makes tensors of `framework` ("torch", "numpy", "cupy") on `device` ("cpu", "cuda") and reads them back."""

    framework: str
    device: str

    def array(self, values: Any, dtype: str | None = None) -> Any:
        """A tensor with the values, rounded to `dtype` (a torch name such as "bfloat16")."""
        values = np.asarray(values)
        if dtype is not None:
            with np.errstate(over="ignore"):
                values = values.astype(NUMPY_DTYPES.get(dtype) or np.dtype(dtype))
        if self.framework == "numpy":
            return values.copy()
        if self.framework == "cupy":
            import cupy

            return cupy.asarray(values)
        import torch

        name = values.dtype.name
        if name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            bits = torch.from_numpy(values.view(np.int16 if values.dtype.itemsize == 2 else np.uint8).copy())
            return bits.to(self.device).view(getattr(torch, name))
        return torch.from_numpy(values.copy()).to(self.device)

    def full(self, shape: tuple[int, ...], value: float, dtype: str) -> Any:
        """A tensor filled with one value (poison: NaN)."""
        return self.array(np.full(shape, value), dtype)

    def numpy(self, x: Any) -> np.ndarray:
        """The values on the host, in their own dtype (bfloat16 and fp8 as ml_dtypes types)."""
        if self.framework == "numpy":
            return np.asarray(x)
        if self.framework == "cupy":
            import cupy

            return cupy.asnumpy(x)
        import torch

        x = x.detach().cpu()
        if x.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
            name = str(x.dtype).removeprefix("torch.")
            return x.view(torch.int16 if x.element_size() == 2 else torch.uint8).numpy().view(NUMPY_DTYPES[name])
        return x.numpy()

    def float64(self, x: Any) -> np.ndarray:
        """The values on the host as float64, exact."""
        return self.numpy(x).astype(np.float64)

    def is_own(self, x: Any) -> bool:
        """Whether `x` is a tensor of this framework on this device."""
        if self.framework == "torch":
            import torch

            return isinstance(x, torch.Tensor) and x.device.type == self.device
        if self.framework == "cupy":
            import cupy

            return isinstance(x, cupy.ndarray)
        return isinstance(x, np.ndarray)


def with_fp8(backend: Backend) -> Backend:
    """The backend, or torch's where that has no 8-bit floats (CuPy)."""
    return Backend("torch", backend.device) if backend.framework == "cupy" else backend


def assert_close(got: Any, want: Any, *, rtol: float, atol: float = 0.0, name: str = "result") -> None:
    """Fail unless |got - want| <= atol + rtol * max(|want|) everywhere, with NaN and infinities in the same places.

    The message names the worst position and both values there. rtol scales with the largest finite reference value of the same array row (last axis): a sum's
    rounding error is relative to its terms, not to a small result among large ones.
    """
    got = np.asarray(got, dtype=np.float64)
    want = np.asarray(want, dtype=np.float64)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    if got.size == 0:
        return
    for label, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        here, there = test(got), test(want)
        if (here != there).any():
            at = tuple(int(i) for i in np.argwhere(here != there)[0])
            raise AssertionError(
                f"{name}: {label} at {int(here.sum())} positions, expected at {int(there.sum())}; first difference at {at}: got {got[at]}, expected {want[at]}"
            )
    finite = np.isfinite(want)
    error = np.where(finite, np.abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0)), 0.0)
    magnitude = np.where(finite, np.abs(want), 0.0)
    scale = magnitude.max(axis=-1, keepdims=True) if want.ndim else magnitude
    excess = error - (atol + rtol * scale)
    if (excess > 0).any():
        at = np.unravel_index(int(np.argmax(excess)), got.shape)
        position = tuple(int(i) for i in at)
        raise AssertionError(
            f"{name}: {int((excess > 0).sum())} of {got.size} values off; worst at {position}: got {got[at]!r}, "
            f"expected {want[at]!r}, error {error[at]:.3e}, allowed {(atol + rtol * scale + 0 * error)[at]:.3e}; "
            f"relative error of the whole {np.linalg.norm(error) / max(np.linalg.norm(magnitude), 1e-300):.3e}"
        )


def assert_same_bits(got: np.ndarray, want: np.ndarray, name: str = "result") -> None:
    """Fail unless both arrays hold the same bits (NaN payloads and signed zeros count)."""
    got, want = np.ascontiguousarray(got), np.ascontiguousarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{name}: {got.shape} {got.dtype}, expected {want.shape} {want.dtype}"
    )
    a, b = got.view(np.uint8).reshape(-1), want.view(np.uint8).reshape(-1)
    different = np.flatnonzero(a != b)
    if different.size:
        index = int(different[0]) // got.dtype.itemsize
        at = tuple(int(i) for i in np.unravel_index(index, got.shape))
        raise AssertionError(
            f"{name}: bits differ at {len(np.unique(different // got.dtype.itemsize))} of {got.size} values, first at {at}: {got[at]!r} and {want[at]!r}"
        )
