"""Calls of the single-request functions that are like the one before: what `core.calls` keeps of them.

A request grows from step to step, so most calls come once a layer with the same lengths: only the second of two like calls is kept.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from pyinfer.core.calls import Calls, Source, plain

if TYPE_CHECKING:
    from pyinfer.core.dtypes import DType
    from pyinfer.core.launch import BoundLaunch
    from pyinfer.core.tensor import TensorView

calls = Calls()
_last: Any = None
SingleCall = tuple[tuple[Any, ...], tuple[Any, ...]]


def single_call(q: Any, k: Any, v: Any, options: tuple[Any, ...], others: tuple[Any, ...] = ()) -> SingleCall | None:
    """What a call is recognised by, with the caller's stream, to which its workspace belongs. None: not a torch tensor of a GPU. `others`: more tensors."""
    torch = sys.modules.get("torch")
    if torch is None or type(q) is not torch.Tensor:
        return None
    device = _device(q)
    return None if device < 0 else ((*options, torch._C._cuda_getCurrentRawStream(device)), (q, k, v, *others))


def _device(q: Any) -> int:
    return q.get_device()


def comes_again(call: SingleCall, *views: TensorView) -> bool:
    """Whether the last call that was launched was like this one, and addresses are as those of kept calls must be."""
    global _last
    if not plain(call[0]):
        return False
    key = call[0], *[(tuple(x.shape), tuple(x.strides), x.dtype) for x in views]
    same, _last = key == _last, key
    together = 0
    for x in views:
        together |= x.ptr
    return same and not together & 15


def keep(call: SingleCall, q: TensorView, bound: BoundLaunch, outputs: tuple[tuple[Any, DType], ...]) -> None:
    """Let later calls like this one, which was launched by `bound`, go straight to the launch. `outputs`: shapes and dtypes of the output and the LSE."""
    lse: Source = (4, 0) if len(outputs) > 1 else None
    calls.remember(*call, q, bound, outputs, ((0, 0), (1, 0), (2, 0), (3, 0), lse), 4, None)
