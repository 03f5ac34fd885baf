"""Calls that look like one before: checked once, then only addresses are read.

A serving step calls the same few operators once a layer with tensors of the same layouts. The first such call takes the full path
(view, check, layout, fetch the kernel), and `Calls.launch` keeps what came of it: a `BoundLaunch`, and a *guard* that recognises tensors
of the same kind. Later calls are found by `Calls.run` and cost the guard, the output's allocation, the addresses and the launch.

What decides that a call is the same: the scalars, the number of tensors and the shape of the first (the key), and the guard: exact Python type, dtype,
device, every size and every stride of every tensor. For torch the guard is the one that torch.compile makes for its own code,
`TensorGuards`: one C call (0.7 us for nine tensors, against 6 for attribute reads) that also compares dispatch keys (so no fake,
functional, batched, negated or sparse tensor passes) and what requires a gradient. Addresses must be multiples of 16 bytes, then as
now: the operator asks. Whatever is odd (a subclass, a second framework, a dispatch mode, an address off 16 bytes, a call on the CPU) is
not remembered and takes the full path every time. Errors are raised there and nowhere else.

An operator::

    _calls = Calls()

    def op(x, out=None, eps=1e-6):
        tensors = (x,) if out is None else (x, out)
        result = _calls.run(eps, tensors)
        if result is not MISS:
            return result
        ...                                      # the full path: views, checks, kernel, grid, values
        aligned = not (xv.ptr | ov.ptr) & 15
        outputs = ((shape, dtype),) if out is None else ()
        _calls.launch(eps, tensors, xv, kernel, grid, values, 2, pdl, aligned, outputs, returns=1)

Everything else that the packed values depend on must be among the scalars or follow from the tensors' guards.

What a remembered call does (read addresses, allocate, look at alignment, pack, launch) is a function of its own, whose source is written for it: a
loop over a description of the call would take twice as long.
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

MISS = object()
"""What `Calls.run` gives when nothing like the call is remembered."""

MOST_KEYS = 2048
"""Keys an operator remembers; beyond, it forgets all and begins anew."""
MOST_MADE = 64
"""What recognises calls and outlives `Calls.clear`, an operator keeps so many of."""
MOST_PER_KEY = 8
"""Calls under one key: layouts of equal shape and scalars. The oldest goes."""


Source = tuple[int, int] | None
"""Where a pointer comes from: (which of a call's tensors, the allocated ones counted on behind those given; bytes behind its address). None: a null pointer."""


class Calls:
    """The remembered calls of one operator (or of several that never share scalars and tensors)."""

    __slots__ = ("_found", "_made", "_recent")

    def __init__(self) -> None:
        self._made: dict[Any, _Made] = {}
        self._found: dict[Any, tuple[Callable[..., Any], ...]] = {}
        self._recent: dict[Any, Callable[..., Any]] = {}

    def run(self, scalars: Any, tensors: tuple[Any, ...]) -> Any:
        """Do a call like one before: its result, or `MISS` if there was none (take the full path).

        Parameters
        ----------
        scalars
            Anything hashable.
        tensors
            As the caller gave them; other things than tensors, or tensors of two frameworks, are never found.
        """
        try:
            result = self._recent[scalars](*tensors)
        except Exception:  # nothing remembered, or another number of tensors
            result = MISS
        return self._search(scalars, tensors) if result is MISS else result

    def _search(self, scalars: Any, tensors: tuple[Any, ...]) -> Any:
        """`run` by any call with these scalars and this shape of the first tensor."""
        try:
            first = tensors[0]
            found = self._found[type(first), first.shape, len(tensors), scalars]
        except Exception:  # nothing remembered; no tensor, an unhashable scalar: the full path says what is wrong
            return MISS
        for call in found:
            try:
                result = call(*tensors)
            except Exception:  # of the guard: two frameworks; of the launch: the full path meets it again
                continue
            if result is not MISS:
                self._recent[scalars] = call
                return result
        return MISS

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
        recipe: tuple[Source, ...] | None = None,
        wants: int | None = None,
        returns: int | None = None,
    ) -> None:
        """Launch a call that was checked, on the caller's stream, and remember it if it can be recognised.

        Parameters
        ----------
        scalars, tensors
            What `run` will be asked with, as the caller gave them. A scalar that is no number, string or None (a tensor, whose value may
            change) is not remembered.
        like
            View of the first tensor.
        kernel, grid, values, pdl
            As `Kernel.__call__`.
        pointers
            How many of `values`, from the first, change from call to call: they are pointers.
        aligned
            Whether this call's addresses are as those of later calls must be; otherwise nothing is remembered.
        outputs
            (shape, dtype) of what the call allocates: its result.
        recipe
            Where each pointer comes from. None: one from each tensor, the allocated ones last, in order.
        wants
            How many of the pointers, from the first, must be multiples of 16 bytes; None: all.
        returns
            Which of the tensors is the result, where nothing is allocated and there are so many. None: there is no result.
        """
        made = self._recognised(scalars, tensors, like, outputs) if aligned else None
        if made is None:
            kernel(current_stream(like), grid, values, pdl)
            return
        bound = kernel.bind(grid, values, pointers, pdl)
        bound(current_stream(like), *values[:pointers])
        if recipe is None:
            recipe = tuple([(i, 0) for i in range(pointers)])
        inside = returns is not None and returns < len(tensors) and not outputs
        self._keep(scalars, tensors, made, bound, len(outputs), recipe, wants, (returns,) if inside else None)  # type: ignore[arg-type]

    def remember(
        self,
        scalars: Any,
        tensors: tuple[Any, ...],
        like: TensorView,
        bound: BoundLaunch,
        outputs: tuple[tuple[Any, DType], ...],
        recipe: tuple[Source, ...],
        wants: int,
        returns: tuple[int, ...] | None,
    ) -> None:
        """Remember a call that was checked, and launched by `bound`, if it can be recognised: for those who bind by themselves. Parameters as `launch`.

        Parameters
        ----------
        returns
            Which tensors are the result, those allocated counted on behind those given: one, or a tuple of several. None: what was allocated.
        """
        key = scalars, outputs, len(tensors)
        try:
            made = self._made.get(key)  # of before `clear`: a new plan's calls have the tensors of the last plan's
        except TypeError:
            return  # a scalar that is not hashable
        if made is None or not made[0](*tensors):
            made = self._recognised(scalars, tensors, like, outputs)
            if made is None:
                return
            if len(self._made) >= MOST_MADE:
                self._made.clear()
            self._made[key] = made
        self._keep(scalars, tensors, made, bound, len(outputs), recipe, wants, returns)

    def _recognised(
        self, scalars: Any, tensors: tuple[Any, ...], like: TensorView, outputs: tuple[tuple[Any, DType], ...]
    ) -> _Made | None:
        """What recognises calls like this one and serves them; None where that cannot be told."""
        maker = _MAKERS.get(like.framework) if plain(scalars) else None
        return maker(tensors, like, outputs) if maker is not None else None

    def _keep(
        self,
        scalars: Any,
        tensors: tuple[Any, ...],
        made: _Made,
        bound: BoundLaunch,
        allocated: int,
        recipe: tuple[Source, ...],
        wants: int | None,
        returns: tuple[int, ...] | None,
    ) -> None:
        check, ptr, stream, new = made
        device, given = bound.kernel.device, len(tensors)
        if len(self._found) >= MOST_KEYS:
            self.clear()
        make = _runner(given, allocated, recipe, len(recipe) if wants is None else wants, returns)
        call = make(check, ptr, new, stream, device, *bound.parts(), MISS)
        key = (type(tensors[0]), tensors[0].shape, given, scalars)
        self._found[key] = (call, *self._found.get(key, ())[: MOST_PER_KEY - 1])
        self._recent[scalars] = call

    def clear(self) -> None:
        """Forget every call."""
        self._found.clear()
        self._recent.clear()

    def __len__(self) -> int:
        return sum(map(len, self._found.values()))


@functools.cache
def _runner(
    given: int, allocated: int, recipe: tuple[Source, ...], wants: int, returns: tuple[int, ...] | None
) -> Callable[..., Callable[..., Any]]:
    """What makes the function of a remembered call, for calls of one form, from its source.

    It takes the tensors, launches and gives the result, or `MISS` where a tensor or an address is not as it must be.
    """
    tensors = [f"t{i}" for i in range(given + allocated)]
    used = sorted({source[0] for source in recipe if source is not None})
    parameters = (
        "check, ptr, new, stream, device, slot, pack, pack_stream, offset, current_device, launch, handle, submit, MISS"
    )
    lines = [f"def make({parameters}):"]
    lines += [f"    allocate{i}, shape{i}, strides{i}, dtype{i}, otherwise{i} = new[{i}]" for i in range(allocated)]
    lines += [
        f"    def run({', '.join(tensors[:given])}):",
        f"        if not check({', '.join(tensors[:given])}):",
        "            return MISS",
        "        here = current_device() == device",
    ]
    lines += [
        f"        {tensors[given + i]} = allocate{i}(shape{i}, strides{i}, dtype{i}) if here else otherwise{i}()"
        for i in range(allocated)
    ]
    result = ", ".join(tensors[given:] if returns is None else [tensors[i] for i in returns])
    lines += [f"        p{i} = ptr({tensors[i]})" for i in used]
    pointers = ["0" if s is None else f"p{s[0]}" + (f" + {s[1]}" if s[1] else "") for s in recipe]
    tested = list(dict.fromkeys(p for p in pointers[:wants] if p != "0"))
    if tested:
        lines += [f"        if ({' | '.join(tested)}) & 15:", "            return MISS"]
    lines += [
        "        own = slot.own",
        f"        pack(own.params, 0, {', '.join(pointers)})",
        "        now = stream(device)",
        "        if own.stream != now:",
        "            pack_stream(own.config, offset, now)",
        "            own.stream = now",
        "        if not here or launch(own.config_argument, handle, own.argv_argument, None):",
        "            submit(own)  # another device is current, or an error to deal with: all over again",
        f"        return {result or None}",
        "    return run",
    ]
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names["make"]


_SCALARS = frozenset((float, int, bool, str, type(None)))


def plain(scalars: Any) -> bool:
    """Whether scalars compare by value: numbers, strings, None, tuples of them. A tensor among them is one whose value may change."""
    return all(map(plain, scalars)) if type(scalars) is tuple else type(scalars) in _SCALARS


_New = tuple[Callable[..., Any], Any, Any, Any, Callable[[], Any]]
"""An allocation: `allocate(shape, strides, dtype)` where the device is current, and what does it elsewhere."""
_Made = tuple[Callable[..., bool], Callable[[Any], int], Callable[[int], int], tuple[_New, ...]]
"""What recognises a call's tensors, reads an address, tells the current stream of a device, and allocates the results."""


# ---- torch ------------------------------------------------------------------------------------------------------------------------


def _torch_call(tensors: tuple[Any, ...], like: TensorView, outputs: tuple[tuple[Any, DType], ...]) -> _Made | None:
    torch = sys.modules["torch"]
    plain = (torch.Tensor, torch.nn.Parameter)
    if not all(type(x) in plain for x in tensors):
        return None
    if torch._C._len_torch_dispatch_stack():  # a mode wants to see what is allocated
        return None
    new = tuple([_torch_new(like, tuple(shape), dtype) for shape, dtype in outputs])
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


def _torch_new(like: TensorView, shape: tuple[int, ...], dtype: DType) -> _New:
    """Allocates as `core.tensor.empty` does, in less than half the time."""
    torch = sys.modules["torch"]
    torch_dtype, device = getattr(torch, dtype.name), like.obj.device
    strides = tuple([math.prod([max(n, 1) for n in shape[i + 1 :]]) for i in range(len(shape))])
    by_name = functools.partial(torch.empty_strided, shape, strides, dtype=torch_dtype, device=device)
    direct = _torch_direct_allocation(like.device)
    return (lambda *_: by_name()) if direct is None else direct, shape, strides, torch_dtype, by_name


@functools.cache
def _torch_direct_allocation(device: int) -> Callable[..., Any] | None:
    """What code generated by torch.compile allocates with: it serves the current device."""
    torch = sys.modules["torch"]
    try:
        allocate = torch._C._dynamo.guards._empty_strided_cuda
        with torch.cuda.device(device):
            x = allocate((2, 3), (3, 1), torch.float16)
        right = x.dtype is torch.float16 and x.shape == (2, 3) and x.stride() == (3, 1)
        return allocate if right and x.get_device() == device else None
    except Exception:  # private to torch: any version may do without
        return None


# ---- CuPy -------------------------------------------------------------------------------------------------------------------------


def _cupy_call(tensors: tuple[Any, ...], like: TensorView, outputs: tuple[tuple[Any, DType], ...]) -> _Made | None:
    if len({type(x) for x in tensors}) != 1 or type(tensors[0]).__name__ != "ndarray":
        return None
    kind, device = like.framework, like.device
    model = TensorView(None, 0, (), (), like.dtype, device, kind)  # holds no tensor

    def make(shape: tuple[int, ...], dtype: DType) -> _New:
        def new(*_: Any) -> Any:
            return empty(model, shape, dtype)

        return new, None, None, None, new

    new = tuple([make(tuple(shape), dtype) for shape, dtype in outputs])
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
