"""The only code that differs between the two devices: linear layers, look-up and copies.

Everything else in the model is a pyinfer call, and pyinfer follows the data: NumPy arrays run its Numba backend, CUDA tensors
its CUDA kernels. A backend is therefore just an array library and a dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # np.ndarray on the CPU, torch.Tensor on CUDA


class NumpyBackend:
    """float32 NumPy arrays; linear layers through NumPy's BLAS. Needs no torch."""

    dtype = "float32"

    def weight(self, array: np.ndarray, float32: bool = False) -> Array:
        """Put a float32 weight on the device in the compute dtype, or in float32 if so asked."""
        return array

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Uninitialised array in the compute dtype."""
        return np.empty(shape, np.float32)

    def upload(self, *arrays: np.ndarray) -> list[Array]:
        """Copy host arrays to the device, together."""
        return list(arrays)

    def download(self, array: Array) -> np.ndarray:
        """Copy to the host (waits for the device)."""
        return np.asarray(array)

    def take(self, table: Array, rows: Array) -> Array:
        """Rows of a 2-D array, in the compute dtype."""
        return table[rows]

    def linear(self, x: Array, weight: Array) -> Array:
        """``x @ weight.T`` for x [rows, in], weight [out, in]."""
        # The weight on the left: OpenBLAS then packs the few activations, not the many weights (1.4x on a decode step).
        return np.ascontiguousarray((weight @ x.T).T)

    def logits(self, x: Array, weight: Array) -> Array:
        """`linear` in float32, whatever the compute dtype."""
        return self.linear(x, weight)


class TorchBackend:
    """bfloat16 torch tensors on a CUDA device; torch only looks up embeddings, multiplies matrices and copies."""

    dtype = "bfloat16"

    def __init__(self, device: str = "cuda") -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(
                "--device cuda: torch sees no CUDA device. Run with --device cpu, or install a CUDA build of torch"
            )
        self.torch, self.device = torch, torch.device(device)

    def weight(self, array: np.ndarray, float32: bool = False) -> Array:
        """Put a float32 weight on the device in the compute dtype, or in float32 if so asked."""
        dtype = self.torch.float32 if float32 else self.torch.bfloat16
        return self.torch.from_numpy(array).to(self.device, dtype)

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Uninitialised array in the compute dtype."""
        return self.torch.empty(shape, dtype=self.torch.bfloat16, device=self.device)

    def upload(self, *arrays: np.ndarray) -> list[Array]:
        """Copy host arrays to the device in one transfer; each starts on a 16-byte boundary."""
        sizes = [-(-a.nbytes // 16) * 16 for a in arrays]
        begins = np.cumsum([0, *sizes])
        host = self.torch.empty(int(begins[-1]), dtype=self.torch.uint8, pin_memory=True)
        for array, begin in zip(arrays, begins[:-1], strict=True):
            host.numpy()[begin : begin + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)
        flat = host.to(self.device, non_blocking=True)  # torch keeps the pinned block until the copy is done
        return [
            flat[begin : begin + array.nbytes].view(getattr(self.torch, array.dtype.name))
            for array, begin in zip(arrays, begins[:-1], strict=True)
        ]

    def download(self, array: Array) -> np.ndarray:
        """Copy to the host (waits for the device)."""
        return array.cpu().numpy()

    def take(self, table: Array, rows: Array) -> Array:
        """Rows of a 2-D array, in the compute dtype."""
        return table.index_select(0, rows).to(self.torch.bfloat16)

    def linear(self, x: Array, weight: Array) -> Array:
        """``x @ weight.T`` for x [rows, in], weight [out, in]."""
        return self.torch.nn.functional.linear(x, weight)

    def logits(self, x: Array, weight: Array) -> Array:
        """`linear` in float32, whatever the compute dtype."""
        # bfloat16 keeps 8 bits: near 20, neighbouring logits would be 0.125 apart and the two best would often tie.
        return self.torch.nn.functional.linear(x.float(), weight)


def make_backend(device: str) -> NumpyBackend | TorchBackend:
    """``"cpu"`` or ``"cuda"`` (``"cuda:1"``) to a backend."""
    return NumpyBackend() if device == "cpu" else TorchBackend(device)
