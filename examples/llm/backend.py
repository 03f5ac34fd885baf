"""The only code that differs between the two devices: linear layers, look-up and copies.

Everything else in the model is a pyinfer call, and pyinfer follows the data: NumPy arrays run its Numba backend, CUDA tensors
its CUDA kernels. A backend is therefore just an array library and a dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import pyinfer

Fixed = tuple[dict[str, np.ndarray], dict[str, Any], Callable[[], None]]
Array = Any  # np.ndarray on the CPU, torch.Tensor on CUDA


class NumpyBackend:
    """float32 NumPy arrays; linear layers through NumPy's BLAS. Needs no torch."""

    dtype = "float32"

    def weight(self, array: np.ndarray) -> Array:
        """Put a float32 weight on the device in the compute dtype."""
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

    def fixed(self, **arrays: np.ndarray) -> Fixed:
        """Arrays that keep their places: on the host to be filled in, on the device, and the call that copies all of them there."""
        return arrays, arrays, lambda: None

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step in the form that is quickest to repeat."""
        return step

    def take(self, table: Array, rows: Array) -> Array:
        """Rows of a 2-D array, in the compute dtype."""
        return table[rows]

    def linear(self, x: Array, weight: Array) -> Array:
        """``x @ weight.T`` for x [rows, in], weight [out, in]."""
        # The weight on the left: OpenBLAS then packs the few activations, not the many weights (1.4x on a decode step).
        return np.ascontiguousarray((weight @ x.T).T)

    def logits(self, x: Array, weight: Array) -> Array:
        """`linear` with a float32 result, whatever the compute dtype."""
        return self.linear(x, weight)


class TorchBackend:
    """bfloat16 torch tensors on a CUDA device; torch only looks up embeddings, multiplies matrices, copies and captures graphs."""

    dtype = "bfloat16"
    few_rows = 8  # up to here a linear layer is bound by the latency of reading weights

    def __init__(self, device: str = "cuda") -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(
                "--device cuda: torch sees no CUDA device. Run with --device cpu, or install a CUDA build of torch"
            )
        self.torch, self.device = torch, torch.device(device)

    def weight(self, array: np.ndarray) -> Array:
        """Put a float32 weight on the device in the compute dtype."""
        return self.torch.from_numpy(array).to(self.device, self.torch.bfloat16)

    def empty(self, shape: tuple[int, ...]) -> Array:
        """Uninitialised array in the compute dtype."""
        return self.torch.empty(shape, dtype=self.torch.bfloat16, device=self.device)

    def upload(self, *arrays: np.ndarray) -> list[Array]:
        """Copy host arrays to the device in one transfer; each starts on a 16-byte boundary."""
        host, begins = self._pinned(arrays)
        for array, begin in zip(arrays, begins, strict=True):
            host.numpy()[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        flat = host.to(self.device, non_blocking=True)  # torch keeps the pinned block until the copy is done
        return self._parts(flat, arrays, begins)

    def _pinned(self, arrays: Sequence[np.ndarray]) -> tuple[Any, list[int]]:
        """Page-locked bytes for these arrays, and where each begins: on a 16-byte boundary."""
        ends = np.cumsum([0, *(-(-a.nbytes // 16) * 16 for a in arrays)]).tolist()
        return self.torch.zeros(ends[-1], dtype=self.torch.uint8, pin_memory=True), ends[:-1]

    def _parts(self, flat: Array, arrays: Sequence[np.ndarray], begins: list[int]) -> list[Array]:
        """The arrays' shares of a tensor of bytes."""
        return [
            flat[begin : begin + array.nbytes].view(getattr(self.torch, array.dtype.name)).view(array.shape)
            for array, begin in zip(arrays, begins, strict=True)
        ]

    def fixed(self, **arrays: np.ndarray) -> Fixed:
        """Arrays that keep their places: on the host to be filled in, on the device, and the call that copies all of them there."""
        host, begins = self._pinned(list(arrays.values()))
        flat = self.torch.zeros_like(host, device=self.device)
        here = (part.numpy() for part in self._parts(host, list(arrays.values()), begins))
        there = self._parts(flat, list(arrays.values()), begins)
        send = lambda: flat.copy_(host, non_blocking=True)  # noqa: E731
        return dict(zip(arrays, here, strict=True)), dict(zip(arrays, there, strict=True)), send

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step as a CUDA graph: one launch repeats all of its kernels, on the tensors that they were captured with."""
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # once before, so that kernels are compiled and loaded
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    def download(self, array: Array) -> np.ndarray:
        """Copy to the host (waits for the device)."""
        return array.cpu().numpy()

    def take(self, table: Array, rows: Array) -> Array:
        """Rows of a 2-D array, in the compute dtype."""
        return table.index_select(0, rows)

    def linear(self, x: Array, weight: Array) -> Array:
        """``x @ weight.T`` for x [rows, in], weight [out, in]."""
        if x.shape[0] > self.few_rows:
            return self.torch.nn.functional.linear(x, weight)
        out = self.empty((x.shape[0], weight.shape[0]))
        pyinfer.tinygemm_bf16(x, weight, out, use_pdl=True)
        return out

    def logits(self, x: Array, weight: Array) -> Array:
        """`linear` with a float32 result, whatever the compute dtype."""
        # bfloat16 keeps 8 bits: near 20, neighbouring logits would be 0.125 apart and the two best would often tie.
        if x.shape[0] > self.few_rows:
            return self.torch.mm(x, weight.T, out_dtype=self.torch.float32)
        out = self.torch.empty((x.shape[0], weight.shape[0]), dtype=self.torch.float32, device=self.device)
        pyinfer.tinygemm_bf16(x, weight, out, use_pdl=True)
        return out


def make_backend(device: str) -> NumpyBackend | TorchBackend:
    """``"cpu"`` or ``"cuda"`` (``"cuda:1"``) to a backend."""
    return NumpyBackend() if device == "cpu" else TorchBackend(device)
