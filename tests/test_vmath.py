"""The CPU backend's foundations: 16-bit conversions, elementary functions, the thread pool, the kernel cache."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from pyinfer.core.tensor import view
from pyinfer.cpu import compile as cpu_compile
from pyinfer.cpu import threads, vmath
from pyinfer.cpu.compile import kernel
from pyinfer.cpu.storage import _f16_to_f32_soft, _f32_to_f16_soft, flat, from_f32, storage, to_f32

pytestmark = pytest.mark.cpu

EVERY_16_BITS = np.arange(65536, dtype=np.uint32).astype(np.uint16)


# ---- storage ---------------------------------------------------------------------------------------------------------------------
@kernel
def widen(begin, end, x, y):
    for i in range(begin, end):
        y[i] = to_f32(x[i])


@kernel
def narrow(begin, end, x, y):
    for i in range(begin, end):
        y[i] = from_f32(x[i], y)


@kernel
def widen_soft(begin, end, x, y):
    for i in range(begin, end):
        y[i] = _f16_to_f32_soft(x[i])


@kernel
def narrow_soft(begin, end, x, y):
    for i in range(begin, end):
        y[i] = _f32_to_f16_soft(x[i])


def same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equal bits, or both NaN."""
    return (a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}")) | (
        np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
    )


@pytest.mark.parametrize(
    "dtype,carrier,convert",
    [(np.float16, np.int16, widen), (ml_dtypes.bfloat16, np.uint16, widen), (np.float16, np.int16, widen_soft)],
)
def test_every_value_widens_exactly(dtype, carrier, convert) -> None:
    got = np.full(65536, 7, np.float32)
    convert(0, 65536, EVERY_16_BITS.view(carrier), got)
    assert same(got, EVERY_16_BITS.view(dtype).astype(np.float32)).all()


@pytest.mark.parametrize("dtype,carrier", [(ml_dtypes.float8_e4m3fn, np.uint8), (ml_dtypes.float8_e5m2, np.int8)])
def test_every_fp8_value_widens_exactly(dtype, carrier) -> None:
    every = np.tile(np.arange(256, dtype=np.uint8), 5)  # enough for whole vectors
    got = np.full(len(every), 7, np.float32)
    widen(0, len(every), every.view(carrier), got)
    assert same(got, every.view(dtype).astype(np.float32)).all()
    assert [widen.py_func.__globals__["to_f32"](x) for x in every[:2].view(carrier)] == got[:2].tolist()


@pytest.mark.parametrize(
    "dtype,carrier,shift,convert",
    [
        (np.float16, np.int16, 13, narrow),
        (ml_dtypes.bfloat16, np.uint16, 16, narrow),
        (np.float16, np.int16, 13, narrow_soft),
    ],
)
def test_rounding_to_nearest_even(rng, dtype, carrier, shift, convert) -> None:
    """Every representable value, every tie between two and its neighbours, random bits; infinities, NaNs and subnormals among them."""
    exact = EVERY_16_BITS.view(dtype).astype(np.float32).view(np.uint32)
    tie = exact + np.uint32(1 << (shift - 1))
    bits = np.concatenate(
        [exact, tie, tie - np.uint32(1), tie + np.uint32(1), rng.integers(0, 2**32, 200_000, dtype=np.uint32)]
    )
    x = np.concatenate([bits.view(np.float32), np.exp2(rng.uniform(-30, 17, 200_000)).astype(np.float32)])
    got = np.full(x.size, 7, carrier)
    convert(0, x.size, x, got)
    with np.errstate(all="ignore"):
        want = x.astype(dtype)
    ok = same(got.view(dtype), want)
    assert ok.all(), f"{x[~ok][:4]}: got {got.view(dtype)[~ok][:4]}, expected {want[~ok][:4]}"


def test_conversions_vectorise() -> None:
    """float16 by the vector instruction where the CPU has it; anything else would make every 16-bit kernel an order of magnitude slower."""
    narrow(0, 0, np.zeros(1, np.float32), np.zeros(1, np.int16))
    widen(0, 0, np.zeros(1, np.int16), np.zeros(1, np.float32))
    assembly = "".join(k.inspect_asm(s) for k in (widen, narrow) for s in k.signatures)
    if not assembly.strip():
        pytest.skip("kernels came from the disk cache, which keeps no assembly")
    if "vcvt" not in assembly:
        pytest.skip("no F16C")
    assert "vcvtph2ps" in assembly and ("%ymm" in assembly or "%zmm" in assembly)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_flat_reaches_every_element(rng, dtype) -> None:
    d = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    base = rng.standard_normal((6, 7, 8)).astype(d)
    for x in (base, base[1:4, :, 2:], base[::2, ::-1], base.T, base[::-1, 3:4], base[0:0], base[2, 3]):
        array, offset = flat(view(x))
        assert array.dtype == storage(view(x)).dtype
        if x.size:
            strides = [s // d.itemsize for s in x.strides]
            index = offset + sum(
                np.arange(n).reshape([-1] + [1] * (x.ndim - 1 - i)) * s
                for i, (n, s) in enumerate(zip(x.shape, strides, strict=True))
            )
            assert np.array_equal(array[index].view(d), x)
            assert index.min() >= 0 and index.max() == len(array) - 1 - (index.min() if offset == 0 else 0)
            array[index.reshape(-1)[0]] = 0
            assert x.reshape(-1)[0] == 0  # zero-copy


# ---- elementary functions --------------------------------------------------------------------------------------------------------
@kernel
def run_exp2(begin, end, x, y):
    for i in range(begin, end):
        y[i] = vmath.exp2(x[i])


@kernel
def run_exp(begin, end, x, y):
    for i in range(begin, end):
        y[i] = vmath.exp(x[i])


@kernel
def run_normal_cdf(begin, end, x, y):
    for i in range(begin, end):
        y[i] = vmath.normal_cdf(x[i])


@kernel
def run_sincos(begin, end, phase, s, c):
    for i in range(begin, end):
        s[i], c[i] = vmath.sincos_turns(phase[i])


@pytest.mark.parametrize(
    "convert,reference,low,high,ulps", [(run_exp2, np.exp2, -126, 128, 1.0), (run_exp, np.exp, -87.33, 88.72, 1.25)]
)
def test_exponentials(rng, convert, reference, low, high, ulps) -> None:
    x = np.concatenate(
        [rng.uniform(low, high, 200_000), rng.uniform(-1, 1, 50_000), np.linspace(high - 1, high, 1000)[:-1]]
    ).astype(np.float32)
    got = np.full_like(x, 7)
    convert(0, x.size, x, got)
    want = reference(x.astype(np.float64))
    error = np.abs(got - want) / np.spacing(want.astype(np.float32)).astype(np.float64)
    assert error.max() <= ulps, f"{error.max():.2f} ulp at {x[error.argmax()]}"
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 200.0, -200.0], np.float32)
    got = np.full_like(special, 7)
    convert(0, len(special), special, got)
    np.testing.assert_array_equal(got, [1, 1, np.inf, 0, np.nan, np.inf, 0])


def test_normal_cdf(rng) -> None:
    x = np.concatenate([rng.uniform(-12.5, 8, 20_000), rng.uniform(-0.1, 0.1, 2000), [0.0]]).astype(np.float32)
    got = np.full_like(x, 7)
    run_normal_cdf(0, x.size, x, got)
    want = np.array([0.5 * math.erfc(-float(v) / math.sqrt(2)) for v in x])
    relative = np.abs(got - want) / want
    assert (relative <= 4e-7 + 1e-7 * x.astype(np.float64) ** 2).all(), (
        relative.max()
    )  # the exponent's rounding grows with x^2
    special = np.array([np.inf, -np.inf, np.nan, 40.0, -40.0], np.float32)
    got = np.full_like(special, 7)
    run_normal_cdf(0, len(special), special, got)
    np.testing.assert_array_equal(got, [1, 0, np.nan, 1, 0])


def test_sincos_of_turns(rng) -> None:
    corners = np.array([0, 1 << 62, 1 << 63, 3 << 62, 2**64 - 1, 1 << 61, (1 << 62) - 1], np.uint64)
    phase = np.concatenate([corners, rng.integers(0, 2**64, 200_000, dtype=np.uint64)])
    s, c = np.full((2, phase.size), 7, np.float32)
    run_sincos(0, phase.size, phase, s, c)
    angle = 2 * math.pi * (phase.astype(np.float64) / 2.0**64)
    assert max(np.abs(s - np.sin(angle)).max(), np.abs(c - np.cos(angle)).max()) < 2.5e-7
    assert (s[:4] == np.float32([0, s[1], 0, s[3]])).all() and (c[0], c[2]) == (1, -1)


# ---- the thread pool -------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=[1, 2, 5])
def pool(request):
    """Some number of threads, more than cores too."""
    before = threads.get_num_threads()
    threads.set_num_threads(request.param)
    yield request.param
    threads.set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"grain": 300}, {"chunk": 999}])
def test_every_item_once(pool, n, options) -> None:
    count = np.zeros(n, np.int64)

    def work(begin, end, count):
        assert 0 <= begin < end <= n
        for i in range(begin, end):
            count[i] += 1

    threads.run(work, n, count, **options)
    assert (count == 1).all()


def test_exceptions_come_out_and_the_pool_lives_on(pool) -> None:
    def work(begin, end):
        if begin <= 50 < end:
            raise KeyError("item 50")

    for _ in range(3):
        with pytest.raises(KeyError, match="item 50"):
            threads.run(work, 100, chunk=7)
    test_every_item_once(pool, 7, {})


def test_nested_and_concurrent_calls(pool) -> None:
    def inner(begin, end, counts, i):
        counts[i] += end - begin

    def outer(begin, end, counts):
        for i in range(begin, end):
            threads.run(inner, 10, counts, i)

    errors = []

    def user():
        for _ in range(20):
            counts = np.zeros(30, np.int64)
            threads.run(outer, 30, counts, chunk=1)
            if not (counts == 10).all():
                errors.append(counts)

    users = [threading.Thread(target=user) for _ in range(4)]
    for u in users:
        u.start()
    for u in users:
        u.join(60)
    assert not errors and not any(u.is_alive() for u in users)


def test_work_is_shared() -> None:
    """Two slow items run side by side: each waits for the other."""
    before = threads.get_num_threads()
    threads.set_num_threads(2)
    barrier = threading.Barrier(2, timeout=30)
    try:
        threads.run(lambda begin, end: barrier.wait(), 2)
    finally:
        threads.set_num_threads(before)


def test_number_of_threads() -> None:
    code = "from pyinfer.cpu.threads import get_num_threads as n; print(n())"

    def ask(value: str):
        env = {**os.environ, "PYINFER_NUM_THREADS": value}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)

    assert ask("3").stdout.strip() == "3"
    assert "PYINFER_NUM_THREADS is no positive integer: got 'many'" in ask("many").stderr
    with pytest.raises(ValueError, match="set_num_threads: n"):
        threads.set_num_threads(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_fork() -> None:
    code = (
        "import os, numpy as np\n"
        "from pyinfer.cpu import threads\n"
        "threads.set_num_threads(3)\n"
        "def work(b, e, c):\n    c[b:e] += 1\n"
        "c = np.zeros(100); threads.run(work, 100, c)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    c = np.zeros(100); threads.run(work, 100, c); os._exit(0 if (c == 1).all() else 1)\n"
        "print(os.waitpid(pid, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


# ---- the kernel cache ------------------------------------------------------------------------------------------------------------
SCRIPT = """
import sys; sys.path.insert(0, {folder!r})
import numpy as np
from package.kern import fill
x = np.zeros(3, np.float32); fill(0, 3, x); print(x[0], sum(fill.stats.cache_hits.values()))
"""
KERN = """
from package.helper import value
from pyinfer.cpu.compile import kernel
@kernel
def fill(begin, end, x):
    for i in range(begin, end):
        x[i] = value()
"""
HELPER = "from pyinfer.cpu.compile import kernel\n@kernel\ndef value():\n    return {}\n"


@pytest.fixture
def package(tmp_path):
    """A package with a kernel in one module and its helper in another."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "kern.py").write_text(KERN)
    (folder / "helper.py").write_text(HELPER.format(1.0))
    return folder


def run_script(folder, **env) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(folder=str(folder))],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernel_cache_sees_changed_helpers(package, tmp_path) -> None:
    """Numba stamps the kernel's own file only; a changed helper in another module must not leave the old kernel in use."""
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert run_script(tmp_path, **cache) == "1.0 0"
    assert run_script(tmp_path, **cache) == "1.0 1"
    (package / "helper.py").write_text(HELPER.format(3.0))
    assert run_script(tmp_path, **cache) == "3.0 0"


def test_kernel_cache_that_cannot_be_used(package, tmp_path) -> None:
    """Entries cut in half, and a cache folder that is a file: the call succeeds."""
    cache = tmp_path / "cache"
    assert run_script(tmp_path, NUMBA_CACHE_DIR=str(cache)) == "1.0 0"
    entries = list(cache.rglob("*.nb?"))
    assert entries
    for entry in entries:
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    assert run_script(tmp_path, NUMBA_CACHE_DIR=str(cache)).startswith("1.0")
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run_script(tmp_path, NUMBA_CACHE_DIR=str(blocked)).startswith("1.0")


def test_kernel_reaches_its_helpers() -> None:
    import pyinfer.cpu.norm  # noqa: F401 - looked up by name

    assert {"pyinfer.cpu.storage", "pyinfer.cpu.compile"} <= set(cpu_compile._callee_modules("pyinfer.cpu.norm"))
