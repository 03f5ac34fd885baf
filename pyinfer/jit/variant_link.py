"""Python functions inside CUDA kernels: Numba-CUDA compiles them to LTO-IR, nvJitLink links that with the kernel's and inlines it.

Needs no GPU, no driver and no CUDA toolkit, but the packages of the extra `variants-cu12` or `variants-cu13`: Numba-CUDA, libNVVM (which Numba-CUDA
calls) and nvJitLink. Only a kernel that is not in the cache needs them.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any

from pyinfer.jit import env

if TYPE_CHECKING:
    from collections.abc import Collection

    from pyinfer.core.dtypes import DType
    from pyinfer.jit.attention_options import UserVariant
    from pyinfer.jit.spec import DeviceFunction, JitSpec

_FIX = "Install what compiles Python variants with: pip install 'pyinfer-kernels[cu12,variants-cu12]' (or [cu13,variants-cu13])."
_MISSING = re.compile(r"(?:module 'numpy' has no attribute '|`np\.)(\w+)")
_DISTRIBUTIONS = (  # what decides the code: its front end, its back end, the linker; the names of CUDA 12 and of 13
    ("numba-cuda",),
    ("nvidia-cuda-nvcc-cu12", "nvidia-nvvm"),
    ("nvidia-nvjitlink-cu12", "nvidia-nvjitlink"),
)


@functools.cache
def toolchain() -> str:
    """Versions of the packages that compile and link Python functions: part of a kernel's key."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for names in _DISTRIBUTIONS:
        for name in names:
            try:
                found.append(f"{name} {version(name)}")
            except PackageNotFoundError:
                continue
    return ", ".join(found)


@functools.cache
def _numba_cuda() -> Any:
    """The module numba.cuda of the package numba-cuda."""
    from pyinfer.jit.compiler import JitError

    try:
        import numba_cuda  # noqa: F401  # Numba has an older module of the name numba.cuda, which cannot inline by force
        from numba import cuda
        from numba.cuda.extending import intrinsic  # noqa: F401

        _import_array_modules()
    except ImportError as error:
        raise JitError(f"Numba-CUDA is not installed ({error}); a Python variant on a GPU needs it. {_FIX}") from error
    return cuda


def _import_array_modules() -> None:
    """Import what Numba-CUDA's first compile would, lending NumPy the functions that it no longer has.

    NOTE: Numba-CUDA 0.30.4, the last but for repairs, decorates np.row_stack, which NumPy 2.5 removed, and so compiles nothing beside it.
    """
    import importlib

    import numpy as np

    lent: list[str] = []

    def lend(name: str) -> None:
        if not hasattr(np, name):
            setattr(np, name, lambda *args, **kwargs: None)
            lent.append(name)

    try:
        lend("row_stack")
        for module in ("arrayobj", "npdatetime", "polynomial", "arraymath", "npyimpl"):
            while True:
                try:
                    importlib.import_module(f"numba.cuda.np.{module}")
                    break
                except AttributeError as error:
                    missing = _MISSING.search(str(error))
                    if missing is None or hasattr(np, missing[1]):
                        raise
                    lend(missing[1])
    finally:
        for name in lent:
            delattr(np, name)


@functools.cache
def _nvjitlink() -> Any:
    """cuda.bindings.nvjitlink."""
    from pyinfer.jit.compiler import JitError

    try:
        from cuda.bindings import nvjitlink

        nvjitlink.version()
    except (
        Exception
    ) as error:  # a package that is missing, or a library that cannot be loaded: the binding raises its own type
        raise JitError(
            f"the nvJitLink library could not be loaded ({error}); a Python variant on a GPU needs it. {_FIX}"
        ) from error
    return nvjitlink


@functools.cache
def _operations() -> dict[str, Any]:
    from pyinfer import _variant_operations

    cuda = _numba_cuda()
    from numba.cuda.extending import intrinsic

    return _variant_operations.define_cuda(intrinsic, cuda.declare_device)


@functools.lru_cache(maxsize=256)
def compile_function(function: DeviceFunction, capability: tuple[int, int]) -> bytes:
    """A function's LTO-IR for a compute capability.

    Raises
    ------
    JitError
        With Numba's words, if it cannot be compiled.
    """
    from pyinfer._variant_operations import numba_types
    from pyinfer.jit.compiler import JitError

    cuda = _numba_cuda()
    types = numba_types()
    namespace: dict[str, Any] = dict(_operations())
    for other, arguments, result in _foreign(function):
        namespace[other] = cuda.declare_device(other, types[result](*(types[a] for a in arguments)), abi="c")
    exec(compile(function.source, f"<{function.symbol}>", "exec"), namespace)
    signature = types[function.result](*(types[a] for a in function.arguments))
    try:
        code, _ = cuda.compile(
            namespace[function.symbol],
            signature,
            device=True,
            output="ltoir",
            abi="c",
            abi_info={"abi_name": function.symbol},
            cc=capability,
            forceinline=True,
        )
    except Exception as error:
        raise JitError(f"Numba-CUDA could not compile {function.symbol}: {error}\n{function.source}") from error
    return bytes(code)


def _foreign(function: DeviceFunction) -> list[tuple[str, tuple[str, ...], str]]:
    """The other functions of the user's that one calls: the lines `# calls NAME(types) -> type` of its source."""
    from pyinfer._variant_source import called

    return called(function.source)


def link(spec: JitSpec, kernel: bytes, arch: str) -> tuple[bytes, str]:
    """Link a kernel's LTO-IR with its functions'. Returns (cubin, or PTX for a compute_NN target; nvJitLink's log).

    Raises
    ------
    JitError
        With nvJitLink's log.
    """
    from pyinfer.jit.compiler import JitError, nvrtc_version

    number = env.arch_number(arch)
    parts = [("kernel", kernel)]
    parts += [(f.symbol, compile_function(f, (number // 10, number % 10))) for f in spec.link]
    linker = _nvjitlink()
    ptx = arch.startswith("compute_")
    options = [f"-arch={arch if ptx else f'sm_{arch}'}", "-lto", "-lineinfo", "-verbose", *(["-ptx"] if ptx else [])]
    handle = linker.create(len(options), options)
    try:
        try:
            for name, code in parts:
                linker.add_data(handle, linker.InputType.LTOIR, code, len(code), name)
            linker.complete(handle)
        except Exception as error:
            log = _text(linker.get_error_log_size, linker.get_error_log, handle)
            major, minor = linker.version()
            raise JitError(
                f"nvJitLink could not link {spec.name} for {arch} ({error}):\n{log.strip()[:2000]}\n"
                f"  It must be as new as what compiled its input: nvJitLink {major}.{minor}, NVRTC {nvrtc_version()}; {toolchain()}."
            ) from None
        log = _text(linker.get_info_log_size, linker.get_info_log, handle)
        if ptx:
            size, get = linker.get_linked_ptx_size, linker.get_linked_ptx
        else:
            size, get = linker.get_linked_cubin_size, linker.get_linked_cubin
        linked = bytearray(size(handle))
        get(handle, linked)
        return bytes(linked), log
    finally:
        linker.destroy(handle)


def _text(size: Any, get: Any, handle: Any) -> str:
    buffer = bytearray(size(handle))
    if buffer:
        get(handle, buffer)
    return bytes(buffer).rstrip(b"\0").decode(errors="replace")


def variant_specs(
    user: UserVariant,
    arch: str,
    dtypes: tuple[DType, DType, DType],
    head_dims: tuple[int, int],
    phases: Collection[str] = ("decode", "prefill"),
    sources: Collection[str] = ("plan", "single"),
    soft_cap: bool = False,
) -> list[JitSpec]:
    """The kernels that a variant's calls take on an architecture, without other options. dtypes: of q, kv, out."""
    from pyinfer.jit import attention, attention_sm90
    from pyinfer.jit.attention_config import wide_decode_config
    from pyinfer.jit.attention_options import AttentionOptions

    options, (q, kv, out) = AttentionOptions(user=user), dtypes
    variant, number = "softcap" if soft_cap else "plain", env.arch_number(arch)
    native = out is q and not arch.startswith("compute_")  # PTX has none of Hopper's own instructions
    rows = [n for n in attention.ROW_CLASSES if ("decode" if n <= attention.DECODE_ROWS else "prefill") in phases]
    found: dict[JitSpec, None] = {}
    for n in rows:
        hopper = attention_sm90.config_for(number, q, *head_dims, n, kv, options) if native else None
        configs: list[Any] = [hopper or attention.attention_config(number, q, *head_dims, n, kv, options)]
        if n <= attention.DECODE_ROWS:
            configs.append(wide_decode_config(number, *head_dims, kv.itemsize, options))
        for config in filter(None, configs):
            for source in sources:
                if config is hopper:
                    spec = attention_sm90.gen_prefill_sm90(config, q, source, variant, options)
                else:
                    spec = attention.gen_attention(config, q, *head_dims, source, variant, kv, out, options)
                found[spec] = None
    return list(found)
