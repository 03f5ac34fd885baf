"""Calls that look like one before: checked once, then only addresses are read.

A serving step calls the same few operators once a layer with tensors of the same layouts. The first such call takes the full path
(view, check, layout, fetch the kernel), and `Calls.launch` keeps what came of it: a `BoundLaunch`, and a *guard* that recognises tensors
of the same kind. Later calls are found by `Calls.find` and cost the guard, the output's allocation, the addresses and the launch.

What decides that a call is the same: the scalars, the number of tensors and the shape of the first (the key), and the guard: exact Python type, dtype,
device, every size and every stride of every tensor. For torch the guard is the one that torch.compile makes for its own code,
`TensorGuards`: one C call (0.7 us for nine tensors, against 6 for attribute reads) that also compares dispatch keys (so no fake,
functional, batched, negated or sparse tensor passes) and what requires a gradient. Addresses must be multiples of 16 bytes, then as
now: the operator asks. Whatever is odd (a subclass, a second framework, a dispatch mode, an address off 16 bytes, a call on the CPU) is
not remembered and takes the full path every time. Errors are raised there and nowhere else.

An operator::

    _calls = Calls()

    def op(x, out=None, eps=1e-6):
        call = _calls.find(eps, (x,) if out is None else (x, out))
        if call is not None:
            ptr = call.ptr
            result = call.new() if out is None else out
            source, target = ptr(x), ptr(result)
            if not (source | target) & 15:
                call.launch(call.stream(call.device), source, target)
                return result
        ...                                      # the full path: views, checks, kernel, grid, values
        aligned = not (xv.ptr | ov.ptr) & 15
        if out is None:
            _calls.launch(eps, (x,), xv, kernel, grid, values, 2, pdl, aligned, ((shape, dtype),))
        else:
            _calls.launch(eps, (x, out), xv, kernel, grid, values, 2, pdl, aligned)

Everything else that the packed values depend on must be among the scalars or follow from the tensors' guards.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyinfer.core.tensor import TensorView, current_stream, empty

if TYPE_CHECKING:
    from pyinfer.core.dtypes import DType
    from pyinfer.core.launch import BoundLaunch, Kernel

MOST_KEYS = 2048
"""Keys an operator remembers; beyond, it forgets all and begins anew."""
MOST_PER_KEY = 8
"""Calls under one key: layouts of equal shape and scalars. The oldest goes."""


class Call:
    """A remembered call. `call.launch(call.stream(call.device), *pointers)` launches it on the caller's current stream.

    Attributes
    ----------
    launch
        Takes a stream and the leading pointer fields.
    stream
        The caller's current stream on a device.
    ptr
        Reads a tensor's address.
    new
        Allocates the output (a tuple of them if there are several).
    offset
        What an operator wanted to keep besides: a distance between addresses in bytes, say.
    """

    __slots__ = ("device", "launch", "new", "offset", "ptr", "stream")

    def __init__(
        self,
        launch: BoundLaunch,
        stream: Callable[[int], int],
        device: int,
        ptr: Callable[[Any], int],
        new: Callable[[], Any],
        offset: Any,
    ) -> None:
        self.launch = launch
        self.stream = stream
        self.device = device
        self.ptr = ptr
        self.new = new
        self.offset = offset


class Calls:
    """The remembered calls of one operator (or of several that never share key and tensors)."""

    __slots__ = ("_found",)

    def __init__(self) -> None:
        self._found: dict[Any, tuple[tuple[Callable[..., bool], Call], ...]] = {}

    def find(self, scalars: Any, tensors: tuple[Any, ...]) -> Call | None:
        """The remembered call with these scalars (anything hashable) and tensors like these, or None: take the full path."""
        try:
            first = tensors[0]
            for check, call in self._found[type(first), first.shape, len(tensors), scalars]:
                if check(*tensors):
                    return call
        except (
            Exception
        ):  # nothing remembered; no tensor, an unhashable scalar, two frameworks: the full path says what is wrong
            pass
        return None

    def launch(
        self,
        scalars: Any,
        tensors: tuple[Any, ...],
        like: TensorView,
        kernel: Kernel,
        grid: int | tuple[int, int, int],
        values: tuple[Any, ...],
        pointers: int,
        pdl: bool,
        aligned: bool = True,
        outputs: tuple[tuple[Any, DType], ...] = (),
        offset: Any = 0,
    ) -> None:
        """Launch a call that was checked, on the caller's stream, and remember it if it can be recognised.

        Parameters
        ----------
        scalars, tensors
            What `find` will be asked with, as the caller gave them. A scalar that is no number, string or None (a tensor, whose value may
            change) is not remembered.
        like
            View of the first tensor.
        kernel, grid, values, pdl
            As `Kernel.__call__`.
        pointers
            How many of `values`, from the first, `Call.launch` will be given.
        aligned
            Whether the addresses are as the operator will ask of later calls; otherwise nothing is remembered.
        outputs
            (shape, dtype) of what the call allocates.
        offset
            `Call.offset`.
        """
        maker = _MAKERS.get(like.framework) if aligned and _plain(scalars) else None
        made = maker(tensors, like, outputs) if maker is not None else None
        if made is None:
            kernel(current_stream(like), grid, values, pdl)
            return
        check, ptr, stream, new = made
        bound = kernel.bind(grid, values, pointers, pdl)
        bound(current_stream(like), *values[:pointers])
        if len(self._found) >= MOST_KEYS:
            self._found.clear()
        key = (type(tensors[0]), tensors[0].shape, len(tensors), scalars)
        call = Call(bound, stream, like.device, ptr, new, offset)
        self._found[key] = ((check, call), *self._found.get(key, ())[: MOST_PER_KEY - 1])

    def clear(self) -> None:
        """Forget everything."""
        self._found.clear()

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))


_SCALARS = frozenset((float, int, bool, str, type(None)))


def _plain(scalars: Any) -> bool:
    return all(map(_plain, scalars)) if type(scalars) is tuple else type(scalars) in _SCALARS


_Made = tuple[Callable[..., bool], Callable[[Any], int], Callable[[int], int], Callable[[], Any]]


def _several(makers: list[Callable[[], Any]]) -> Callable[[], Any]:
    if len(makers) == 1:
        return makers[0]
    return lambda: tuple([make() for make in makers])


# ---- torch ------------------------------------------------------------------------------------------------------------------------


def _torch_call(tensors: tuple[Any, ...], like: TensorView, outputs: tuple[tuple[Any, DType], ...]) -> _Made | None:
    torch = sys.modules["torch"]
    plain = (torch.Tensor, torch.nn.Parameter)
    if not all(type(x) in plain for x in tensors):
        return None
    if torch._C._len_torch_dispatch_stack():  # a mode wants to see what is allocated
        return None
    new = _several([_torch_new(like, tuple(shape), dtype) for shape, dtype in outputs])
    return _torch_guard(tensors), torch.Tensor.data_ptr, torch._C._cuda_getCurrentRawStream, new


def _torch_guard(tensors: tuple[Any, ...]) -> Callable[..., bool]:
    guards = _tensor_guards()
    if guards is not None:
        check = _make_guard(guards, tensors)
        if check(*tensors):
            return check
    return AttributeGuard(tensors, _torch_attributes)


def _make_guard(guards: Any, tensors: tuple[Any, ...]) -> Callable[..., bool]:
    where = {id(x): i for i, x in reversed(list(enumerate(tensors)))}  # of the first time each is there
    first = sorted(where.values())
    distinct = [tensors[i] for i in first]
    sizes, strides = [list(x.shape) for x in distinct], [list(x.stride()) for x in distinct]
    check = guards(*distinct, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    if len(first) == len(tensors):
        return check
    # It takes no tensor twice (work in place, keys as values): checked once, the rest by identity.
    again = [(i, where[id(x)]) for i, x in enumerate(tensors) if where[id(x)] != i]

    def check_repeated(*tensors: Any) -> bool:
        for i, j in again:
            if tensors[i] is not tensors[j]:
                return False
        return check(*[tensors[i] for i in first])

    return check_repeated


@functools.cache
def _tensor_guards() -> Any:
    """torch's compiled guard, if this torch has it and it tells apart what must be told apart."""
    torch = sys.modules["torch"]
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        x = torch.zeros(4, 6, dtype=torch.int16, device="cpu")
        check = _make_guard(guards, (x, x.clone()))
        others = (x[:2], x.t(), x[:, :3], x.view(2, 12), x.int(), x.view(torch.float16), x.as_strided((4, 6), (5, 1)))
        works = check(x.clone(), x) and not any(check(x, y) or check(y, x) for y in others)
    except Exception:  # private to torch: any version may do without
        return None
    return guards if works else None


def _torch_attributes(x: Any) -> tuple[Any, ...]:
    return type(x), x.dtype, x.shape, x.stride(), x.device, x.is_neg()


def _torch_new(like: TensorView, shape: tuple[int, ...], dtype: DType) -> Callable[[], Any]:
    """Allocates as `core.tensor.empty` does, in less than half the time."""
    torch = sys.modules["torch"]
    torch_dtype, device, index = getattr(torch, dtype.name), like.obj.device, like.device
    strides = tuple([math.prod([max(n, 1) for n in shape[i + 1 :]]) for i in range(len(shape))])
    by_name = functools.partial(torch.empty_strided, shape, strides, dtype=torch_dtype, device=device)
    direct = _torch_direct_allocation(index)
    if direct is None:
        return by_name
    allocate, current = direct

    def new() -> Any:
        return allocate(shape, strides, torch_dtype) if current() == index else by_name()

    return new


@functools.cache
def _torch_direct_allocation(device: int) -> tuple[Callable[..., Any], Callable[[], int]] | None:
    """What code generated by torch.compile allocates with (it serves the current device), and the query of that device."""
    torch = sys.modules["torch"]
    try:
        allocate, current = torch._C._dynamo.guards._empty_strided_cuda, torch._C._cuda_getDevice
        with torch.cuda.device(device):
            x = allocate((2, 3), (3, 1), torch.float16)
            right = x.dtype is torch.float16 and x.shape == (2, 3) and x.stride() == (3, 1)
            return (allocate, current) if right and x.get_device() == current() == device else None
    except Exception:  # private to torch: any version may do without
        return None


# ---- CuPy -------------------------------------------------------------------------------------------------------------------------


def _cupy_call(tensors: tuple[Any, ...], like: TensorView, outputs: tuple[tuple[Any, DType], ...]) -> _Made | None:
    if len({type(x) for x in tensors}) != 1 or type(tensors[0]).__name__ != "ndarray":
        return None
    kind, device = like.framework, like.device
    model = TensorView(None, 0, (), (), like.dtype, device, kind)  # holds no tensor

    def make(shape: tuple[int, ...], dtype: DType) -> Callable[[], Any]:
        return lambda: empty(model, shape, dtype)

    new = _several([make(tuple(shape), dtype) for shape, dtype in outputs])
    return AttributeGuard(tensors, _cupy_attributes), _cupy_pointer, lambda _: current_stream(model), new


def _cupy_attributes(x: Any) -> tuple[Any, ...]:
    return type(x), x.dtype, x.shape, x.strides, x.data.device_id


def _cupy_pointer(x: Any) -> int:
    return x.data.ptr


class AttributeGuard:
    """Recognises tensors by attribute reads: what there is without torch's own guard."""

    __slots__ = ("_read", "_wanted")

    def __init__(self, tensors: tuple[Any, ...], read: Callable[[Any], tuple[Any, ...]]) -> None:
        self._read = read
        self._wanted = [read(x) for x in tensors]

    def __call__(self, *tensors: Any) -> bool:
        """Whether they are like those it was made from."""
        read = self._read
        return len(tensors) == len(self._wanted) and [read(x) for x in tensors] == self._wanted


_MAKERS: dict[str, Callable[..., _Made | None]] = {"torch": _torch_call, "cupy": _cupy_call}
