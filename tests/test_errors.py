"""Every check says what is wrong, what it got, what is wanted and how to fix it; and passes what is right."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import numpy as np
import pytest

from pyinfer.core import errors
from pyinfer.core.dtypes import BFLOAT16, FLOAT16, FLOAT32, INT32
from pyinfer.core.tensor import TensorView, view


def fake(shape=(2, 3), strides=None, dtype=FLOAT16, device=-1):
    if strides is None:
        strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    return TensorView(None, 0, shape, strides, dtype, device, "numpy")


def test_form():
    assert (
        errors.message("norm", "x", "has the wrong shape", (1,), (2,))
        == "norm: x has the wrong shape: got (1,), wanted (2,)."
    )
    assert errors.message("norm", "x", "is wrong", 1, 2, "Fix it.") == "norm: x is wrong: got 1, wanted 2. Fix it."
    with pytest.raises(ValueError, match=re.escape("a: b c: got d, wanted e. f")):
        errors.fail("a", "b", "c", "d", "e", "f")
    with pytest.raises(TypeError, match=re.escape("a: b c: got d, wanted e.")):
        errors.fail_type("a", "b", "c", "d", "e")


def test_dtype():
    errors.check_dtype("op", "x", fake(), (BFLOAT16, FLOAT16))
    with pytest.raises(TypeError) as error:
        errors.check_dtype("op", "x", fake(dtype=FLOAT32), (FLOAT16, BFLOAT16))
    assert (
        str(error.value) == "op: x has the wrong dtype: got float32, wanted float16 or bfloat16. Convert it to float16."
    )


def test_same_dtype():
    errors.check_same_dtype("op", "k", fake(), "q", fake((1,)))
    with pytest.raises(TypeError) as error:
        errors.check_same_dtype("op", "k", fake(dtype=FLOAT32), "q", fake())
    assert str(error.value) == "op: k differs in dtype from q: got float32, wanted float16. Convert one of them."


def test_ndim():
    errors.check_ndim("op", "x", fake(), 2)
    errors.check_ndim("op", "x", fake(), (2, 3))
    errors.check_ndim("op", "x", fake(()), 0)
    with pytest.raises(ValueError) as error:
        errors.check_ndim("op", "x", fake(), 3)
    assert str(error.value) == "op: x has the wrong number of axes: got 2 (shape (2, 3)), wanted 3. Reshape it."
    with pytest.raises(ValueError, match="wanted 3 or 4"):
        errors.check_ndim("op", "x", fake(), (3, 4))


@pytest.mark.parametrize("shape", [(2, 3), (None, 3), (2, None), (None, None)])
def test_shape_passes(shape):
    errors.check_shape("op", "x", fake(), shape)
    errors.check_shape("op", "x", view(np.zeros((2, 3), np.float32)), shape)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((2, 4), "(2, 4)"), ((None, 2), "(any, 2)"), ((2,), "(2)"), ((2, 3, 1), "(2, 3, 1)"), ((3, 3), "(3, 3)")],
)
def test_shape_refuses(shape, wanted):
    with pytest.raises(ValueError) as error:
        errors.check_shape("op", "x", fake(), shape)
    assert str(error.value) == f"op: x has the wrong shape: got (2, 3), wanted {wanted}."


def test_same_device():
    errors.check_same_device("op", {"q": fake(), "k": fake()})
    errors.check_same_device("op", {"q": fake(device=1), "k": fake(device=1)})
    with pytest.raises(ValueError) as error:
        errors.check_same_device("op", {"q": fake(device=1), "k": fake(device=1), "v": fake()})
    assert (
        str(error.value)
        == "op: v is on another device: got cpu, wanted cuda:1 (where q is). Move it, e.g. v.to('cuda:1')."
    )
    with pytest.raises(ValueError, match="k is on another device: got cuda:0, wanted cuda:1"):
        errors.check_same_device("op", {"q": fake(device=1), "k": fake(device=0)})


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 3), (3, 1)),
        ((2, 3), (100, 1)),
        ((2, 1), (3, 7)),
        ((2, 0), (0, 5)),
        ((0, 3), (3, 2)),
        ((), ()),
        ((4,), (1,)),
        ((1,), (9,)),
    ],
)
def test_last_dim_contiguous_passes(shape, strides):
    errors.check_last_dim_contiguous("op", "x", fake(shape, strides))


@pytest.mark.parametrize(("shape", "strides"), [((2, 3), (1, 2)), ((2, 3), (3, -1)), ((2, 3), (3, 0)), ((5,), (2,))])
def test_last_dim_contiguous_refuses(shape, strides):
    with pytest.raises(ValueError) as error:
        errors.check_last_dim_contiguous("op", "x", fake(shape, strides))
    assert str(error.value) == (
        f"op: x is not contiguous in its last axis: got strides {strides} for shape {shape}, wanted last stride 1. Call .contiguous() on it."
    )


def test_device_name():
    assert [errors.device_name(d) for d in (-1, 0, 7)] == ["cpu", "cuda:0", "cuda:7"]


def test_repr_of_a_view():
    assert repr(fake(dtype=INT32, device=3)) == "TensorView(numpy, int32, (2, 3), strides (3, 1), cuda:3)"


# ---- the pages about them --------------------------------------------------------------------------------------------------------

_ROOT = Path(__file__).resolve().parents[1]


def _python_files(*folders):
    return [path for folder in folders for path in (_ROOT / folder).rglob("*.py")]


def test_every_variable_is_documented():
    """Every variable that code asks the environment for stands in docs/environment.md, and the other way round."""
    asked = set()
    for path in _python_files("pyinfer", "schedulers", "benchmarks", "examples", "tests"):
        asked |= set(re.findall(r'environ(?:\.get\(|\.setdefault\(|\[)\s*"(PYINFER_\w+)"', path.read_text()))
    page = (_ROOT / "docs" / "environment.md").read_text()
    assert {"PYINFER_WORKSPACE_BASE", "PYINFER_JIT"} <= asked
    assert asked == set(re.findall(r"^\| `(PYINFER_\w+)`", page, re.MULTILINE))


def test_every_exception_is_documented():
    raised = set()
    for path in _python_files("pyinfer", "schedulers"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised.add(ast.unparse(node.exc.func).split(".")[-1])
    page = (_ROOT / "docs" / "errors.md").read_text()
    # Control flow within pyinfer; none of these reaches a caller.
    internal = {"TypingError", "PermissionError", "Refused"}
    missing = {name for name in raised - internal if f"`{name}" not in page and f".{name}`" not in page}
    assert not missing, missing


def test_documented_messages_exist():
    """The texts quoted in docs/errors.md are those of the code."""
    source = " ".join(path.read_text() for path in _python_files("pyinfer", "schedulers"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # literals continued on the next line
    page = (_ROOT / "docs" / "errors.md").read_text()
    for quoted in re.findall(r"^\| (`…[^|]*`)", page, re.MULTILINE):
        for message in re.findall(r"`… ([a-zA-Z][^`:…{]*?)(?=[:`…{(]| \(|$)", quoted):
            assert message.strip() in source or message.strip().startswith("unexpected keyword"), message
