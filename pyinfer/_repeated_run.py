"""What run() does when a call looks like the one before: read addresses, allocate the output, launch.

A serving step calls run() once a layer with tensors of the same layouts. The first call checks everything, the second binds its launch
(`core.launch.BoundLaunch`), and every further one costs a comparison of shapes and strides. A new plan starts over.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyinfer.core.launch import BoundLaunch
    from pyinfer.core.tensor import TensorView

Layout = tuple[Any, ...]
# Arguments that compare by value. A scale in a tensor does not: its value may change in place, and comparing it would wait for the GPU.
_is_plain = frozenset({float, int, bool, type(None)}).issuperset


def raw_stream() -> Callable[[int], int]:
    """torch's look-up of the current stream of a device."""
    return sys.modules["torch"]._C._cuda_getCurrentRawStream


def layout(x: Any) -> Layout:
    """What decides a launch besides the address, of a torch tensor."""
    return x.shape, x.stride(), x.dtype, x.get_device()


def args_key(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What a variant's values put into a launch: numbers, and addresses and layouts of torch tensors; None for anything else."""
    torch = sys.modules.get("torch")
    key: list[Any] = []
    for x in args:
        if type(x) is float or type(x) is int:
            key.append((type(x), x))
        elif torch is not None and type(x) is torch.Tensor:
            key.append((x.data_ptr(), *layout(x)))
        else:
            return None
    return tuple(key)


class RepeatedRun:
    """Recognises run() calls like the last one.

    `note` is told of every checked CUDA call and binds the launch when two in a row are alike; `__call__` then serves the calls that match,
    and returns None for those that do not.
    """

    __slots__ = (
        "_bound",
        "_key",
        "_lse_layout",
        "_lse_shape",
        "_options",
        "_out_contiguous",
        "_out_layout",
        "_out_shape",
        "_stream",
        "_tensor",
        "_v_offset",
    )

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Start over: the plan or its scales changed."""
        self._bound: BoundLaunch | None = None
        self._key: tuple[Any, ...] | None = None

    def note(
        self,
        q: TensorView,
        k: TensorView,
        v: TensorView,
        out: TensorView,
        lse: TensorView | None,
        options: tuple[Any, ...],
        bind: Callable[[], BoundLaunch],
        given_lse: bool = False,
    ) -> None:
        """A call has been checked and launched. `options` are the arguments of run() that `__call__` compares, `bind` makes its launch once more, bound.

        `given_lse`: lse is the caller's, not the call's own.
        """
        torch = sys.modules.get("torch")
        tensors = (q, k, v, out) if lse is None else (q, k, v, out, lse)
        if torch is None or not _is_plain(map(type, options)) or any(type(x.obj) is not torch.Tensor for x in tensors):
            return
        lse_layout = layout(lse.obj) if lse is not None and given_lse else None
        combined = k.obj is v.obj
        kv: Layout = layout(k.obj) if combined else (layout(k.obj), layout(v.obj))
        key = (
            layout(q.obj),
            kv,
            layout(out.obj),
            None if lse is None else lse.shape,
            v.ptr - k.ptr if combined else None,
            options,
            lse_layout,
        )
        if key != self._key:
            self._key, self._bound = key, None
            return
        self._tensor = torch.Tensor
        self._stream = raw_stream()
        self._v_offset = key[4]
        self._options = options
        self._out_layout, self._out_shape = key[2], tuple(out.shape)
        self._out_contiguous = out.is_contiguous()
        self._lse_shape = None if lse is None else tuple(lse.shape)
        self._lse_layout = lse_layout
        self._bound = bind()

    def __call__(self, q: Any, kv: Any, out: Any, lse: Any, options: tuple[Any, ...]) -> Any:
        """Launch and return run()'s result, or None if this call is not like the bound one.

        Parameters
        ----------
        q
            As run() got it.
        kv
            The combined cache, or a tuple of two tensors.
        out, lse
            As run() got them.
        options
            The other arguments; floats, bools and None only (anything else never compares equal to what was noted).
        """
        tensor = self._tensor
        q_layout, kv_layout, out_layout, _, v_offset, _, lse_layout = self._key  # type: ignore[misc]
        if (
            type(q) is not tensor
            or not _is_plain(map(type, options))
            or options != self._options
            or (lse is None) != (lse_layout is None)
            or layout(q) != q_layout
        ):
            return None
        if lse is not None and (type(lse) is not tensor or layout(lse) != lse_layout):
            return None
        q_ptr = q.data_ptr()
        if v_offset is not None:
            if type(kv) is not tensor or layout(kv) != kv_layout:
                return None
            k_ptr = kv.data_ptr()
            v_ptr = k_ptr + v_offset
        else:
            if type(kv) is not tuple or len(kv) != 2:
                return None
            k, v = kv
            if type(k) is not tensor or type(v) is not tensor or layout(k) != kv_layout[0] or layout(v) != kv_layout[1]:
                return None
            k_ptr, v_ptr = k.data_ptr(), v.data_ptr()
        if out is None:
            if not self._out_contiguous:
                return None
            out = q.new_empty(self._out_shape)
        elif type(out) is not tensor or layout(out) != out_layout:
            return None
        out_ptr = out.data_ptr()
        if (q_ptr | k_ptr | v_ptr | out_ptr) & 15:  # the full path chooses another kernel, or says what is wrong
            return None
        stream = self._stream(q_layout[3])
        if self._lse_shape is None:
            self._bound(stream, q_ptr, k_ptr, v_ptr, out_ptr, 0)  # type: ignore[misc]
            return out
        if lse is None:
            lse = q.new_empty(self._lse_shape, dtype=sys.modules["torch"].float32)
        self._bound(stream, q_ptr, k_ptr, v_ptr, out_ptr, lse.data_ptr())  # type: ignore[misc]
        return out, lse

    @property
    def ready(self) -> bool:
        """Whether a launch is bound."""
        return self._bound is not None
