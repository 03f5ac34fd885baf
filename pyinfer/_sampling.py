"""Arguments and dispatch of the sampling family: what pyinfer/sampling.py's functions share."""

from __future__ import annotations

import functools
import numbers
from typing import Any, NamedTuple

from pyinfer.core.dtypes import BFLOAT16, BOOL, FLOAT16, FLOAT32, FLOAT64, INT32, INT64, UINT64
from pyinfer.core.errors import check_dtype, check_last_dim_contiguous, check_ndim, check_same_device, fail, fail_type
from pyinfer.core.tensor import TensorView, as_numpy, current_stream, empty, is_tensor, view

MAX_VOCAB = 1 << 18
CLUSTER_MIN_VOCAB = 8192
"""Smaller rows are drawn from by one block each, also where the GPU has clusters."""
_FLOATS = (FLOAT32, BFLOAT16, FLOAT16)
_INTS = (INT32, INT64)
_ONE_FOR_ALL, _PER_OUTPUT, _PER_ROW = range(3)
ALL, MIN_P, JOINT, FIRST = range(4)

_FILTER_NAMES = ("all", "min_p", "joint", "first")
NO_K = 2**31 - 1
_U64 = 2**64 - 1


# ---- arguments ------------------------------------------------------------------------------------------------------------------
def matrix(op: str, arg: str, x: Any) -> TensorView:
    v = view(x, op, arg)
    check_dtype(op, arg, v, _FLOATS)
    check_ndim(op, arg, v, 2)
    if not 0 < v.shape[1] <= MAX_VOCAB:
        fail(
            op,
            arg,
            "has an unsupported vocabulary",
            f"{v.shape[1]} (shape {tuple(v.shape)})",
            f"1 to {MAX_VOCAB} tokens on the last axis",
        )
    check_last_dim_contiguous(op, arg, v)
    return v


def _check_contiguous(op: str, arg: str, v: TensorView) -> None:
    if v.size > 1 and not v.is_contiguous():
        fail(op, arg, "is not contiguous", f"strides {tuple(v.strides)}", "stride 1", "Call .contiguous() on it.")


def _is_number(x: Any, integral: bool) -> bool:
    """Whether x is a number and no bool; the types that nearly all have first: an abstract class takes half a microsecond."""
    return type(x) is int or (
        (type(x) is float and not integral)
        or (isinstance(x, numbers.Integral if integral else numbers.Real) and not isinstance(x, bool))
    )


class _Argument:
    """A threshold, seed or the like: a scalar, or one value per output or per row.

    Attributes
    ----------
    value
        The scalar, if `view` is None.
    view
        The tensor, on the device of the input.
    spread
        What indexes the tensor: _ONE_FOR_ALL, _PER_OUTPUT, _PER_ROW.
    """

    __slots__ = ("spread", "value", "view")

    def __init__(self, value: Any, view: TensorView | None = None, spread: int = _ONE_FOR_ALL) -> None:
        self.value = value
        self.view = view
        self.spread = spread

    @property
    def ptr(self) -> int:
        return 0 if self.view is None else self.view.ptr

    @property
    def wide(self) -> int:
        return int(self.view is not None and self.view.dtype.itemsize == 8)

    def on_host(self, outputs: int, rows: Any, dtype: Any) -> Any:
        """One value per output, as a contiguous NumPy array; rows[i] is output i's row."""
        import numpy as np

        if self.view is None:
            return np.full(outputs, self.value, dtype)
        values = as_numpy(self.view).reshape(-1)
        if self.spread == _ONE_FOR_ALL:
            return np.full(outputs, values[0], dtype)
        if self.spread == _PER_ROW:
            values = values[np.clip(rows, 0, values.shape[0] - 1)]
        return np.ascontiguousarray(values).astype(dtype)


def _to_float32(v: TensorView) -> TensorView:
    """A converted copy, in the tensor's own framework."""
    if v.framework == "torch":
        return view(v.obj.float())
    return view(as_numpy(v).astype("float32") if v.device < 0 else v.obj.astype("float32"))


def _argument(
    op: str,
    arg: str,
    x: Any,
    like: TensorView,
    outputs: int,
    rows: int,
    per_row: bool,
    integer: bool,
    low: float,
    high: float,
) -> _Argument:
    """Check and wrap an argument: a number in [low, high], or a tensor of one value, of `outputs` or of `rows` values (if both: `per_row` decides)."""
    if _is_number(x, False):
        if integer and not _is_number(x, True):
            fail_type(op, arg, "is no integer", repr(x), "an integer or an int32 or int64 tensor")
        value = x.__index__() if integer else float(x)
        if not low <= value <= high:
            fail(op, arg, "is out of range", value, f"{low:g} to {high:g}")
        return _Argument(value)
    if not is_tensor(x):
        fail_type(
            op, arg, "is neither a number nor a tensor", type(x).__name__, "a number, or a tensor of one value per row"
        )
    v = view(x, op, arg)
    if integer:
        check_dtype(op, arg, v, _INTS)
    else:
        check_dtype(op, arg, v, (*_FLOATS, FLOAT64))
        if v.dtype is not FLOAT32:
            v = _to_float32(v)
    size = v.size
    if size == 1 and v.device < 0:  # a host scalar serves any device
        return _argument(op, arg, as_numpy(v).reshape(-1)[0].item(), like, outputs, rows, per_row, integer, low, high)
    if len(v.shape) > 1 and size != max(v.shape):  # [n, 1] is as good as [n]
        check_ndim(op, arg, v, 1)
    if size not in (1, outputs, rows):
        fail(
            op,
            arg,
            "has the wrong length",
            size,
            f"{rows} (rows)" if rows == outputs else f"{outputs} (outputs) or {rows} (rows)",
        )
    check_same_device(op, {"input": like, arg: v})
    _check_contiguous(op, arg, v)
    if v.device < 0 and size:
        values = as_numpy(v)
        worst = values[~((values >= low) & (values <= high))]
        if worst.size:
            fail(op, arg, "is out of range", worst.reshape(-1)[0], f"{low:g} to {high:g}")
    if size == 1 and (outputs != 1 or rows != 1):
        return _Argument(0, v, _ONE_FOR_ALL)
    spread = _PER_ROW if size == rows and (per_row or size != outputs) else _PER_OUTPUT
    return _Argument(0, v, spread)


def _indices(op: str, x: Any, like: TensorView) -> TensorView | None:
    if x is None:
        return None
    v = view(x, op, "indices")
    check_dtype(op, "indices", v, _INTS)
    check_ndim(op, "indices", v, 1)
    check_same_device(op, {"input": like, "indices": v})
    _check_contiguous(op, "indices", v)
    if v.device < 0 and v.size:
        values = as_numpy(v)
        if values.min() < 0 or values.max() >= like.shape[0]:
            fail(
                op,
                "indices",
                "names a row that is not there",
                f"{int(values.min())} to {int(values.max())}",
                f"0 to {like.shape[0] - 1}",
            )
    return v


def _stream_number(op: str, arg: str, x: Any, like: TensorView, outputs: int) -> _Argument:
    """A seed or an offset: an integer modulo 2^64, or a tensor of one integer per output."""
    if _is_number(x, True):
        return _Argument(int(x) & _U64)
    if not is_tensor(x):
        fail_type(
            op,
            arg,
            "is neither an integer nor a tensor",
            type(x).__name__,
            "an integer, or an integer tensor of one value per output",
        )
    v = view(x, op, arg)
    check_dtype(op, arg, v, (INT32, INT64, UINT64))
    if len(v.shape) == 0 and v.device < 0:
        return _Argument(int(as_numpy(v).item()) & _U64)
    check_ndim(op, arg, v, 1)
    if v.size != outputs:
        fail(
            op,
            arg,
            "has the wrong length",
            v.size,
            f"{outputs} (outputs)",
            "Give one value per output, or an integer for all.",
        )
    check_same_device(op, {"input": like, arg: v})
    _check_contiguous(op, arg, v)
    return _Argument(0, v, _PER_OUTPUT)


def _seed_and_offset(
    op: str, like: TensorView, outputs: int, generator: Any, seed: Any, offset: Any
) -> tuple[_Argument, _Argument]:
    if seed is None:
        if offset is not None:
            fail(op, "offset", "comes without a seed", "seed=None", "seed= as well", "Give both, or a generator.")
        return _draw_seed(op, like, outputs, generator)
    if generator is not None:
        fail(
            op, "seed", "comes together with a generator", "both", "one source of randomness", "Drop seed or generator."
        )
    return _stream_number(op, "seed", seed, like, outputs), _stream_number(
        op, "offset", 0 if offset is None else offset, like, outputs
    )


def _draw_seed(op: str, like: TensorView, outputs: int, generator: Any) -> tuple[_Argument, _Argument]:
    """Seed and offset from a generator, which is advanced. Never waits for the GPU."""
    if generator is None and like.framework == "torch":
        import torch

        generator = torch.cuda.default_generators[like.device] if like.device >= 0 else torch.default_generator
    if generator is None:
        import numpy as np

        return _Argument(int(np.random.randint(-(2**63), 2**63, dtype=np.int64)) & _U64), _Argument(0)  # noqa: NPY002 - the global state, so that np.random.seed counts
    module = type(generator).__module__.partition(".")[0]
    if module == "torch":
        import torch

        if generator.device.type == "cuda":
            seed, offset = generator.initial_seed(), generator.get_offset()
            generator.set_offset(offset + -(-outputs // 4) * 4)  # torch wants multiples of 4
            return _Argument(seed & _U64), _Argument(offset & _U64)
        return _Argument(
            int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, generator=generator)) & _U64
        ), _Argument(0)
    if hasattr(generator, "integers"):
        return _Argument(int(generator.integers(0, 2**64 - 1, dtype="uint64", endpoint=True))), _Argument(0)
    kind = f"{type(generator).__module__}.{type(generator).__qualname__}"
    fail_type(
        op,
        "generator",
        "is of an unknown kind",
        kind,
        "a torch.Generator or a np.random.Generator",
        "Or give seed= and offset=.",
    )


# ---- dispatch --------------------------------------------------------------------------------------------------------------------
@functools.cache
def _sample_kernel(device: int, dtype: str, source: str, filter_kind: int, paired: bool) -> Any:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit.sampling import gen_sample

    return gen_sample(dtype, source, _FILTER_NAMES[filter_kind], paired).build_and_load(device), pdl_supported(device)


@functools.cache
def _most_alone(device: int) -> int:
    """Up to how many outputs each has a multiprocessor, and there a block of 1024 threads, on its own (9.0 and 10.0; elsewhere no two blocks fit)."""
    from pyinfer.core.device import arch_number_of, num_sms

    return num_sms(device) if 90 <= arch_number_of(device) < 120 else 0


@functools.cache
def _cluster_kernel(device: int, dtype: str, source: str, many_keys: bool) -> Any:
    from pyinfer.jit.sampling import gen_sample_cluster

    return gen_sample_cluster(dtype, source, many_keys).build_and_load(device)


@functools.lru_cache(4096)
def _cluster_of(device: int, vocab: int, itemsize: int, outputs: int) -> bool | None:
    """Whether a call's outputs have a cluster each, and by which kernel: True is that of many keys. None: one block an output.

    Measured on an H200 at vocabulary 128256 (tools/gpu/time_sampling.py): at batch 1 the cluster takes two thirds of the time, from batch 64 on, where not
    every block of the clusters has a multiprocessor, one block an output is faster.
    """
    from pyinfer.core.device import arch_number_of, num_sms
    from pyinfer.jit import sampling as jit

    arch = arch_number_of(device)
    if arch < 90 or vocab < CLUSTER_MIN_VOCAB or jit.CLUSTER * outputs > num_sms(device):
        return None
    keys = jit.cluster_keys_per_warp(vocab, itemsize)
    if keys <= jit.KEYS_PER_WARP:
        return False
    return True if keys <= jit.MANY_KEYS_PER_WARP and arch < 120 else None  # 12.0 has 99 KB a block


@functools.cache
def _row_kernel(device: int, dtype: str, factory: str) -> Any:
    from pyinfer.core.device import pdl_supported
    from pyinfer.jit import sampling

    return getattr(sampling, factory)(dtype).build_and_load(device), pdl_supported(device)


def _grain(vocab: int) -> int:
    """Rows worth a thread of their own: some 30 us of work."""
    return max(1, 16384 // vocab)


class _Call(NamedTuple):
    """A checked sampling call."""

    input: TensorView
    source: str
    filter: int
    indices: TensorView | None
    top_k: _Argument
    top_p: _Argument
    min_p: _Argument
    seed: _Argument
    offset: _Argument
    out: Any
    valid: Any


def sample(
    op: str,
    arg: str,
    x: Any,
    filter_kind: int,
    indices: Any,
    generator: Any,
    check_nan: bool,
    seed: Any,
    offset: Any,
    return_valid: bool,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    per_row: bool = True,
) -> Any:
    """Check everything, then launch. `per_row`: how thresholds are read where their length fits rows and outputs."""
    v = matrix(op, arg, x)
    rows = v.shape[0]
    index = _indices(op, indices, v)
    outputs = rows if index is None else index.shape[0]
    k = (
        _Argument(NO_K)
        if top_k is None
        else _argument(op, "top_k", top_k, v, outputs, rows, per_row, True, 1, 2**63 - 1)
    )
    if k.view is None:
        k.value = min(k.value, NO_K)
    p = _Argument(1.0) if top_p is None else _argument(op, "top_p", top_p, v, outputs, rows, per_row, False, 0.0, 1.0)
    m = _Argument(0.0) if min_p is None else _argument(op, "min_p", min_p, v, outputs, rows, per_row, False, 0.0, 1.0)
    seeds, offsets = _seed_and_offset(op, v, outputs, generator, seed, offset)
    out = empty(v, (outputs,), INT32)
    valid = empty(v, (outputs,), BOOL) if return_valid or check_nan or v.device < 0 else None
    if outputs:
        call = _Call(
            v, "logits" if arg == "logits" else "probs", filter_kind, index, k, p, m, seeds, offsets, out, valid
        )
        (_sample_cpu if v.device < 0 else _sample_cuda)(call)
    if check_nan:
        _raise_if_invalid(op, arg, valid)
    return (out, valid) if return_valid else out


def _sample_cuda(c: _Call) -> None:
    v, k, p, m = c.input, c.top_k, c.top_p, c.min_p
    out = view(c.out)
    outputs = out.shape[0]
    values = (
        v.ptr, v.strides[0], v.shape[0], v.shape[1], out.ptr, 0 if c.valid is None else view(c.valid).ptr,
        0 if c.indices is None else c.indices.ptr, int(c.indices is not None and c.indices.dtype is INT64),
        k.ptr, k.wide, k.spread, k.value, p.ptr, p.spread, p.value, m.ptr, m.spread, m.value,
        c.seed.ptr, c.seed.wide, c.offset.ptr, c.offset.wide, c.seed.value, c.offset.value,
    )  # fmt: skip
    cluster = _cluster_of(v.device, v.shape[1], v.dtype.itemsize, outputs)
    if cluster is None:
        kernel, pdl = _sample_kernel(v.device, v.dtype.name, c.source, c.filter, outputs > _most_alone(v.device))
        kernel(current_stream(v), outputs, values, pdl)
    else:
        from pyinfer.jit.sampling import CLUSTER

        kernel = _cluster_kernel(v.device, v.dtype.name, c.source, cluster)
        kernel(current_stream(v), outputs * CLUSTER, (*values, c.filter), True)


def _rows_of(v: TensorView) -> tuple[Any, int, int, int, int]:
    """A matrix as the CPU kernels take it: flat memory, the first element's place there, row stride, rows, vocab."""
    from pyinfer.cpu.storage import flat

    memory, first = flat(v)
    return memory, first, v.strides[0], v.shape[0], v.shape[1]


def _sample_cpu(c: _Call) -> None:
    import numpy as np

    from pyinfer.cpu import sampling as kernels
    from pyinfer.cpu.threads import run

    ids, flags = as_numpy(c.out), as_numpy(c.valid).view(np.uint8)
    outputs = ids.shape[0]
    rows = np.arange(outputs) if c.indices is None else np.ascontiguousarray(as_numpy(c.indices), np.int64)
    apart = c.seed.view is None and c.offset.view is None
    run(
        kernels.sample_rows, outputs, *_rows_of(c.input), c.source == "logits", c.filter, rows,
        c.top_k.on_host(outputs, rows, np.int64), c.top_p.on_host(outputs, rows, np.float32), c.min_p.on_host(outputs, rows, np.float32),
        c.seed.on_host(outputs, rows, np.uint64), c.offset.on_host(outputs, rows, np.uint64),
        np.arange(outputs) if apart else np.zeros(outputs, np.int64), ids, flags, grain=_grain(c.input.shape[1]),
    )  # fmt: skip


def _raise_if_invalid(op: str, arg: str, valid: Any) -> None:
    v = view(valid)
    flags = as_numpy(v) if v.device < 0 else (v.obj.cpu().numpy() if v.framework == "torch" else v.obj.get())
    bad = (~flags.astype(bool)).nonzero()[0]
    if bad.size:
        names = ", ".join(map(str, bad[:8])) + (", ..." if bad.size > 8 else "")
        wanted = (
            "finite values and at least one above zero in every row"
            if arg == "probs"
            else "no NaN and at least one value above -inf in every row"
        )
        fail(op, arg, "cannot be sampled", f"NaN or nothing to draw from at output {names}", wanted)


def map_rows(
    op: str,
    arg: str,
    x: Any,
    factory: str,
    parameters: list[tuple[str, Any, bool, float, float, float]],
    enable_pdl: bool | None = None,
) -> Any:
    """A kernel from rows to float32 rows. parameters: (name, value, integer, low, high, value on behalf of None)."""
    v = matrix(op, arg, x)
    rows, vocab = v.shape
    arguments = [
        _Argument(default) if value is None else _argument(op, name, value, v, rows, rows, True, integer, low, high)
        for name, value, integer, low, high, default in parameters
    ]
    out = empty(v, (rows, vocab), FLOAT32)
    if not rows:
        return out
    if v.device >= 0:
        values: list[Any] = [v.ptr, v.strides[0], vocab, view(out).ptr]
        for (_, _, integer, *_), a in zip(parameters, arguments, strict=True):
            values += [a.ptr, a.wide, a.spread, min(a.value, NO_K)] if integer else [a.ptr, a.spread, a.value]
        kernel, pdl = _row_kernel(v.device, v.dtype.name, factory)
        kernel(current_stream(v), rows, tuple(values), pdl and enable_pdl is not False)
        return out
    import numpy as np

    from pyinfer.cpu import sampling as kernels
    from pyinfer.cpu.threads import run

    host = [
        a.on_host(rows, np.arange(rows), np.int64 if integer else np.float32)
        for (_, _, integer, *_), a in zip(parameters, arguments, strict=True)
    ]
    if factory == "gen_softmax":
        temperature = host[0]
        with np.errstate(over="ignore"):
            host = [np.divide(np.float32(1), temperature, out=np.zeros_like(temperature), where=temperature > 0)]
    kernel = {
        "gen_softmax": kernels.softmax_rows,
        "gen_renorm": kernels.renorm_rows,
        "gen_mask_logits": kernels.mask_rows,
    }[factory]
    run(kernel, rows, *_rows_of(v), *host, as_numpy(out), grain=_grain(vocab))
    return out
