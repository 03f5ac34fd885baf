"""Views of any framework's tensors, host integers, and what is refused."""

from __future__ import annotations

import logging
import pickle

import ml_dtypes
import numpy as np
import pytest

from pyinfer.core import dtypes
from pyinfer.core.tensor import CPU, as_numpy, current_stream, empty, host_ints, is_tensor, to_list, view, zeros
from tests.arrays import NUMPY_DTYPES, assert_same_bits

torch = pytest.importorskip("torch")
HALVES = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


class Exporter:
    """Nothing but the two methods of DLPack, as a framework unknown to pyinfer has them."""

    def __init__(self, x):
        self.x = x

    def __dlpack__(self, **kwargs):
        return self.x.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.x.__dlpack_device__()


# ---- dtypes ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda d: d.name)
def test_dtypes(dtype):
    assert (
        dtypes.canonical_dtype(dtype) is dtype
        and dtypes.canonical_dtype(dtype.name) is dtype
        and dtypes.canonical_dtype(dtype.short) is dtype
    )
    assert dtypes.canonical_dtype(dtype.numpy) is dtype and dtypes.canonical_dtype(dtype.numpy.type) is dtype
    assert (
        dtypes.canonical_dtype(getattr(torch, dtype.name)) is dtype
        and dtypes.canonical_dtype(f"torch.{dtype.name}") is dtype
    )
    assert (
        dtype.numpy.itemsize == dtype.itemsize
        and pickle.loads(pickle.dumps(dtype)) is dtype
        and repr(dtype) == dtype.name
    )


def test_dtype_names_are_distinct():
    assert len({d.name for d in dtypes.ALL}) == len({d.short for d in dtypes.ALL}) == len(dtypes.ALL)


@pytest.mark.parametrize(
    "x",
    [
        "float12",
        "",
        np.complex64,
        torch.complex64,
        torch.qint8,
        np.dtype("O"),
        np.dtype("M8[s]"),
        np.dtype([("a", "f4")]),
        None,
        3,
        [1],
    ],
)
def test_unknown_dtype(x):
    with pytest.raises(
        TypeError, match=r"norm: x is no element type known here: got .*, wanted one of float16, bfloat16"
    ):
        dtypes.canonical_dtype(x, "norm", "x")


def test_bytes_in_the_other_order_are_refused():
    for kind in ("f4", "f2", "i4"):
        native = np.dtype(kind)
        with pytest.raises(TypeError, match="no element type"):
            dtypes.canonical_dtype(native.newbyteorder())
        assert dtypes.canonical_dtype(native) is dtypes.canonical_dtype(native.newbyteorder("="))


# ---- views -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda d: d.name)
def test_view_of_torch_and_numpy(dtype):
    t = torch.zeros(4, 6).to(getattr(torch, dtype.name))
    n = np.zeros((4, 6), dtype.numpy)
    for x, ptr, framework in ((t, t.data_ptr(), "torch"), (n, n.ctypes.data, "numpy")):
        v = view(x)
        assert (v.ptr, tuple(v.shape), tuple(v.strides), v.dtype, v.device, v.framework) == (
            ptr,
            (4, 6),
            (6, 1),
            dtype,
            CPU,
            framework,
        )
        assert v.obj is x and v.ndim == 2 and v.size == 24 and not v.is_cuda and v.is_contiguous()
        assert all(isinstance(i, int) for i in (*v.shape, *v.strides, v.ptr, v.device))


def test_view_of_strided():
    t = torch.arange(120.0).reshape(4, 5, 6)[1:, ::2, 1:4]
    n = t.numpy()
    for x in (t, n, Exporter(t), Exporter(n)):
        v = view(x)
        assert (
            tuple(v.shape) == (3, 3, 3)
            and tuple(v.strides) == (30, 12, 1)
            and v.ptr == t.data_ptr()
            and not v.is_contiguous()
        )
        assert_same_bits(as_numpy(v), n)
    assert tuple(view(t.transpose(0, 2)).strides) == (1, 12, 30)


def test_view_of_nothing_and_of_a_scalar():
    for x in (torch.zeros(0, 8), np.zeros((0, 8), np.float32)):
        v = view(x)
        assert tuple(v.shape) == (0, 8) and v.size == 0 and v.is_contiguous()
        assert as_numpy(v).shape == (0, 8)
    for x in (torch.tensor(3.0), np.array(3.0, np.float32)):
        v = view(x)
        assert tuple(v.shape) == () and v.ndim == 0 and v.size == 1 and v.is_contiguous() and as_numpy(v) == 3


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [((3, 1, 4), (4, 99, 1), True), ((1, 1), (7, 5), True), ((2, 3), (4, 1), False), ((2, 3), (1, 2), False)],
)
def test_is_contiguous(shape, strides, contiguous):
    assert view(torch.zeros(64).as_strided(shape, strides)).is_contiguous() is contiguous


def test_view_of_expanded():
    v = view(torch.zeros(1, 4).expand(5, 4))
    assert tuple(v.strides) == (0, 1) and not v.is_contiguous()


def test_view_of_negative_strides():
    """Only NumPy and CuPy have them. A view says what is there; operators check the last axis."""
    from pyinfer.core.errors import check_last_dim_contiguous

    x = np.arange(12.0).reshape(3, 4)
    v = view(x[::-1])
    assert v.strides == (-4, 1) and v.ptr == x.ctypes.data + 8 * 8
    check_last_dim_contiguous("norm", "x", v)
    with pytest.raises(ValueError, match=r"norm: x is not contiguous in its last axis: got strides \(4, -1\)"):
        check_last_dim_contiguous("norm", "x", view(x[:, ::-1]))


def test_view_of_subclasses(tmp_path):
    class Mine(torch.Tensor):
        pass

    parameter = torch.nn.Parameter(torch.ones(2, 3, dtype=torch.bfloat16))
    mine = torch.ones(2, 3).as_subclass(Mine)
    file = np.memmap(tmp_path / "weights", np.float32, "w+", shape=(2, 3))
    assert (view(parameter).framework, view(mine).framework, view(file).framework) == ("torch", "torch", "numpy")
    assert view(parameter).ptr == parameter.data_ptr() and as_numpy(parameter).dtype == ml_dtypes.bfloat16
    assert as_numpy(mine).tolist() == [[1.0] * 3] * 2
    assert type(empty(view(parameter), (2,))) is torch.Tensor and not empty(view(parameter), (2,)).requires_grad


def test_view_of_read_only():
    x = np.arange(6, dtype=np.float32)
    x.flags.writeable = False
    v = view(x)
    assert v.ptr == x.ctypes.data and not as_numpy(v).flags.writeable


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", *HALVES])
def test_view_of_any_dlpack_object(dtype, rng):
    """The types that NumPy does not know come through as well."""
    t = torch.from_numpy(rng.integers(0, 2, (5, 6, 7))).to(getattr(torch, dtype))[1:4, ::2, 3:]
    v = view(Exporter(t), "op", "x")
    assert (v.framework, v.ptr, v.device, v.dtype.name) == ("dlpack", t.data_ptr(), CPU, dtype)
    assert tuple(v.shape) == tuple(t.shape) and tuple(v.strides) == t.stride()
    assert_same_bits(as_numpy(v), as_numpy(view(t)))
    assert isinstance(empty(v, (2, 3)), np.ndarray) and empty(v, (2, 3)).dtype == dtypes.canonical_dtype(dtype).numpy


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dlpack_keeps_the_memory_alive(dtype):
    v = view(Exporter(torch.full((1000, 1000), 3.0, dtype=getattr(torch, dtype))))
    for _ in range(4):
        torch.zeros(1000, 1000, dtype=getattr(torch, dtype))  # would be given the memory, had it been freed
    assert (as_numpy(v).astype(np.float32) == 3).all()


def test_dlpack_of_nothing_and_of_a_scalar():
    assert view(Exporter(torch.zeros(0, 3, dtype=torch.bfloat16))).shape == (0, 3)
    assert as_numpy(view(Exporter(torch.tensor(2.0, dtype=torch.bfloat16)))) == 2


def test_dlpack_of_an_unknown_type():
    with pytest.raises(TypeError, match="norm: x "):
        view(Exporter(torch.zeros(2, dtype=torch.complex64)), "norm", "x")
    with pytest.raises(TypeError, match="norm: x cannot be read through DLPack: got Exporter"):
        view(Exporter(torch.zeros(2, dtype=torch.float8_e4m3fnuz)), "norm", "x")


def test_dlpack_on_another_device():
    class Vulkan(Exporter):
        def __dlpack_device__(self):
            return 7, 0

    with pytest.raises(ValueError, match="norm: x is on a device pyinfer does not run on: got DLPack device type 7"):
        view(Vulkan(None), "norm", "x")


@pytest.mark.parametrize(
    "x", [[1.0], (1,), 3, 2.5, "x", None, {}, object(), np.float32(1), range(3), np.ma.masked_array([1.0], [True])]
)
def test_no_tensor(x):
    assert not is_tensor(x)
    with pytest.raises(
        TypeError, match=r"norm: x is no tensor: got .*, wanted a torch, CuPy or NumPy array.*Convert it"
    ):
        view(x, "norm", "x")


def test_is_tensor():
    assert all(
        is_tensor(x)
        for x in (torch.zeros(1), np.zeros(1), torch.nn.Parameter(torch.zeros(1)), Exporter(torch.zeros(1)))
    )


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (
            torch.zeros(2, dtype=torch.complex64),
            TypeError,
            "op: arg is no element type known here: got torch.complex64",
        ),
        (np.zeros(2, np.complex128), TypeError, "op: arg is no element type known here: got dtype"),
        (np.zeros(2, ">f4"), TypeError, "op: arg is no element type known here: got dtype"),
        (np.array(["a"]), TypeError, "op: arg is no element type known here"),
        (
            np.zeros(2, [("a", "f4"), ("b", "u1")])["a"],
            ValueError,
            "op: arg has strides of no whole number of elements",
        ),
        (np.zeros(9, np.uint8)[1:].view(np.float32), ValueError, "op: arg is not aligned: got address"),
        (torch.zeros(2, device="meta"), ValueError, "op: arg is on a device pyinfer does not run on: got meta"),
        (torch.zeros(2, 2).to_sparse(), ValueError, "op: arg is no dense tensor: got torch.sparse_coo"),
    ],
    ids=["complex torch", "complex", "byte order", "text", "structured", "unaligned", "meta", "sparse"],
)
def test_refused_tensors_name_the_argument(x, error, text):
    with pytest.raises(error, match=text):
        view(x, "op", "arg")


# ---- making and reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "float32", "int32", "uint8", "bfloat16", "float8_e4m3fn"])
def test_empty_and_zeros_keep_the_framework(backend, dtype):
    like = view(backend.array(np.ones((2, 3)), "float16"))
    wanted = dtypes.canonical_dtype(dtype or "float16")
    for make in (empty, zeros):
        if backend.framework == "cupy" and wanted.name.startswith(("bfloat", "float8")):
            continue  # CuPy has no zeros of these types; operators that make them are tested with what they return
        made = make(like, (4, 5), dtype and wanted)
        v = view(made)
        assert (
            backend.is_own(made)
            and tuple(v.shape) == (4, 5)
            and v.dtype is wanted
            and v.device == like.device
            and v.is_contiguous()
        )
        if make is zeros:
            assert not backend.float64(made).any()
    assert tuple(view(empty(like, ())).shape) == () and view(empty(like, (0, 3))).size == 0


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool", *HALVES])
def test_as_numpy_is_the_same_memory(dtype):
    t = torch.ones(3, 4).to(getattr(torch, dtype))[:, 1:]
    a = as_numpy(t)
    assert (
        a.dtype == (NUMPY_DTYPES.get(dtype) or np.dtype(dtype))
        and a.shape == (3, 3)
        and a.__array_interface__["data"][0] == t.data_ptr()
    )
    t.zero_()
    assert not a.astype(np.float64).any()


def test_as_numpy_of_what_needs_gradients():
    assert as_numpy(torch.ones(2, requires_grad=True)).tolist() == [1, 1]


def test_to_list(backend):
    assert to_list(backend.array([[1, 2], [3, 4]], "int32")) == [[1, 2], [3, 4]]


# ---- host integers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        [0, 3, 7], (0, 3, 7), np.array([0, 3, 7]), np.array([0, 3, 7], np.int32), np.array([0, 3, 7], np.uint8), np.array([0, 3, 7], ">i8"),
        np.arange(0, 14)[[0, 3, 7]], np.array([0, 9, 3, 9, 7])[::2], torch.tensor([0, 3, 7]), torch.tensor([0, 3, 7], dtype=torch.int32),
        torch.tensor([[0, 1], [3, 1], [7, 1]])[:, 0], [np.int64(0), np.int32(3), 7], Exporter(torch.tensor([0, 3, 7])),
    ],
    ids=lambda x: f"{type(x).__name__}-{getattr(x, 'dtype', '')}",
)  # fmt: skip
@pytest.mark.parametrize("dtype", [None, np.int32, np.int64])
def test_host_ints(x, dtype):
    for strict in (False, True):
        got = host_ints(x, "plan", "indptr", dtype, strict=strict)
        assert (
            type(got) is np.ndarray
            and got.dtype == (dtype or np.int32)
            and got.flags.c_contiguous
            and got.tolist() == [0, 3, 7]
        )


def test_host_ints_of_nothing():
    for x in ([], (), np.zeros(0), np.zeros(0, np.int64), torch.zeros(0, dtype=torch.int64)):
        if getattr(x, "dtype", None) == np.float64:
            continue
        assert host_ints(x, "plan", "x").shape == (0,) and host_ints(x, "plan", "x").dtype == np.int32


def test_host_ints_takes_the_array_itself():
    x = np.array([1, 2], np.int32)
    assert host_ints(x, "plan", "x") is x
    t = torch.tensor([1, 2], dtype=torch.int32)
    assert host_ints(t, "plan", "x").ctypes.data == t.data_ptr()


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ([0.5], TypeError, "plan: indptr holds no integers .*got float64, wanted int32 or int64"),
        (np.array([1.0]), TypeError, "got float64"),
        (torch.tensor([1.0]), TypeError, "got float32"),
        ([True, False], TypeError, "got bool"),
        (["a"], TypeError, "holds no integers"),
        ([2**70], TypeError, "holds no integers that fit 64 bits"),
        ([[1, 2]], ValueError, r"wrong number of axes: got 2 \(shape \(1, 2\)\), wanted 1"),
        (np.array(3), ValueError, "wrong number of axes: got 0"),
        (torch.zeros(2, 2, dtype=torch.int32), ValueError, "wrong number of axes: got 2"),
        ([[1], [2, 3]], ValueError, "no list of integers"),
        (
            [0, 2**31],
            ValueError,
            "does not fit int32: got values from 0 to 2147483648, wanted -2147483648 to 2147483647",
        ),
        ([-(2**31) - 1, 5], ValueError, "does not fit int32: got values from -2147483649 to 5"),
        (np.array([0, 2**31], np.uint32), ValueError, "does not fit int32"),
        (np.array([2**63], np.uint64), ValueError, "does not fit int32"),
        (torch.tensor([2**40]), ValueError, "does not fit int32"),
        (5, TypeError, "plan: indptr is no tensor: got builtins.int"),
        (None, TypeError, "plan: indptr is no tensor"),
    ],
)
def test_host_ints_refuses(x, error, text):
    with pytest.raises(error, match=text) as raised:
        host_ints(x, "plan", "indptr")
    assert str(raised.value).startswith("plan: indptr ")


def test_host_ints_of_uint64_beyond_int64():
    with pytest.raises(ValueError, match="does not fit int64"):
        host_ints(np.array([2**63], np.uint64), "plan", "x", np.int64)
    assert host_ints(np.array([2**31], np.uint32), "plan", "x", np.int64).tolist() == [2**31]


# ---- on the device ---------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy", "dlpack"])
def test_view_on_the_device(framework):
    cupy = pytest.importorskip("cupy")
    t = torch.arange(24, device="cuda").to(torch.float16).reshape(4, 6)[:, 1:5]
    x = {"torch": t, "cupy": cupy.from_dlpack(t), "dlpack": Exporter(t)}[framework]
    v = view(x)
    assert (v.ptr, tuple(v.shape), tuple(v.strides), v.device, v.dtype.name, v.framework) == (
        t.data_ptr(),
        (4, 4),
        (6, 1),
        0,
        "float16",
        framework,
    )
    made = empty(v, (2, 2), dtypes.INT32)
    assert isinstance(made, torch.Tensor if framework == "torch" else cupy.ndarray) and view(made).device == 0
    with pytest.raises(ValueError, match="is on a GPU: got cuda:0, wanted a CPU tensor"):
        as_numpy(v)


@pytest.mark.gpu
def test_bfloat16_through_dlpack_on_the_device():
    t = torch.arange(24, device="cuda").to(torch.bfloat16)
    v = view(Exporter(t))
    assert (v.ptr, v.dtype.name, v.framework) == (t.data_ptr(), "bfloat16", "dlpack")


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["torch", "cupy"])
def test_host_ints_from_the_device(framework, caplog):
    cupy = pytest.importorskip("cupy")
    x = torch.tensor([0, 3, 7], device="cuda") if framework == "torch" else cupy.array([0, 3, 7])
    with caplog.at_level(logging.DEBUG, "pyinfer"):
        assert host_ints(x, "plan", "indptr").tolist() == [0, 3, 7]
    assert next(r.getMessage() for r in caplog.records if r.name == "pyinfer").startswith(
        "plan: copying indptr from the device"
    )
    with pytest.raises(ValueError, match="plan: indptr is on the GPU under strict=True: got cuda:0"):
        host_ints(x, "plan", "indptr", strict=True)


@pytest.mark.gpu
def test_current_stream_is_the_callers():
    cupy = pytest.importorskip("cupy")
    t = torch.zeros(2, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        assert current_stream(view(t)) == side.cuda_stream
    assert current_stream(view(t)) == torch.cuda.current_stream().cuda_stream
    own = cupy.cuda.Stream(non_blocking=True)
    with own:
        assert current_stream(view(cupy.zeros(2))) == own.ptr
