"""`JitSpec`: one kernel specialisation, by name, template, constants and parameter struct; `JitModule`: a group of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.core.params import ParamStruct
from pyinfer.jit import cache, compiler, env

if TYPE_CHECKING:
    from pyinfer.core.launch import Kernel


class DeviceFunction(NamedTuple):
    """A Python function that is linked into a kernel: what `jit.variant_link` compiles. Plain data, so that its text is its identity.

    Attributes
    ----------
    symbol
        The name by which the kernel's source declares it, `extern "C"`.
    source
        A Python module that defines `symbol`, in the terms of `_variant_source`: nothing outside it but the operations there.
    arguments, result
        Their types: "f32", "i32", "f32*", "i32*".
    """

    symbol: str
    source: str
    arguments: tuple[str, ...]
    result: str


@dataclass(frozen=True)
class JitSpec:
    """A kernel that can be rendered, compiled and loaded. Hashable, tensor-free, picklable.

    Attributes
    ----------
    name
        Readable, encodes every parameter; also the kernel's `extern "C"` name.
    template
        Path below cuda_src.
    params
        The kernel's one parameter.
    constants
        (name, value) pairs for the template.
    block
        Threads per block (x, y, z).
    smem
        Dynamic shared memory per block in bytes.
    options
        Extra NVRTC options.
    min_arch, max_arch
        Smallest and largest architecture number that have the instructions used: (80, any), or (90, 90) for wgmma.
    cluster
        Blocks per cluster (x, y, z), or None.
    link
        Python functions that the source calls: the kernel is then compiled to LTO-IR and linked with theirs.
    """

    name: str
    template: str
    params: ParamStruct
    constants: tuple[tuple[str, Any], ...] = ()
    block: tuple[int, int, int] = (128, 1, 1)
    smem: int = 0
    options: tuple[str, ...] = ()
    min_arch: int = 80
    cluster: tuple[int, int, int] | None = field(default=None)
    link: tuple[DeviceFunction, ...] = ()
    max_arch: int = 1 << 30

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(
                f"JitSpec: name is no C identifier: got {self.name!r}, wanted letters, digits and underscores."
            )
        if not 0 <= self.smem <= 227 * 1024:
            raise ValueError(f"JitSpec {self.name}: smem is out of range: got {self.smem} bytes, wanted 0 to 227 KiB.")
        x, y, z = self.block
        if min(self.block) < 1 or x * y * z > 1024 or z > 64:
            raise ValueError(
                f"JitSpec {self.name}: block is no block of threads: got {self.block}, wanted at least 1 an axis, at most 1024 in all and 64 in z."
            )
        names = [k for k, _ in self.constants]
        clash = next((k for k in names if names.count(k) > 1 or k in compiler.OWN_VARIABLES), None)
        if clash is not None:
            raise ValueError(
                f"JitSpec {self.name}: constant {clash} is given twice, or is one that every template has ({', '.join(compiler.OWN_VARIABLES)})."
            )

    def __str__(self) -> str:
        return f"{self.name} [{self.template}] " + " ".join(f"{k}={v}" for k, v in self.constants)

    def suits(self, arch: int) -> bool:
        """Whether an architecture (its number: 80, 89, 90, ...) has the instructions used."""
        return self.min_arch <= arch <= self.max_arch

    def source(self, arch: str | None = None) -> str:
        """The rendered CUDA source."""
        return compiler.render(self, self._target(arch))

    def build(self, arch: str | None = None, verbose: bool = False, *, ahead: bool = False) -> compiler.Artifact:
        """Compile, or take from the cache. Needs no GPU.

        Parameters
        ----------
        arch
            E.g. "90a" or "compute_80"; None means this machine's GPU, or the first of the arch list that has the instructions.
        verbose
            Print one line with time and resources.
        ahead
            Compile even under `PYINFER_JIT=error`, which forbids compiling on first use.

        Raises
        ------
        JitError
            If it does not compile, or must not.
        """
        target = self._target(arch)
        if env.arch_number(target) < self.min_arch:
            raise ValueError(f"{self.name}: arch is too old: got {target}, wanted {self.min_arch} or newer.")
        if env.arch_number(target) > self.max_arch:
            raise ValueError(f"{self.name}: arch lacks its instructions: got {target}, wanted {self.max_arch}.")
        artifact = compiler.build(self, target, ahead=ahead)
        if verbose:
            print(f"{self.name} ({target}): {artifact.seconds:.2f} s, {artifact.resources}")
        return artifact

    def build_and_load(self, device: int | None = None) -> Kernel:
        """Compile for a CUDA device (the current one by default) and load."""
        from pyinfer.core.imagined import reached
        from pyinfer.core.launch import load

        reached()  # `pyinfer.support` builds nothing
        return load(self, device)

    def cache_path(self, arch: str | None = None) -> Path:
        """Where the compiled kernel is, or would be first written."""
        target = self._target(arch)
        key = compiler.cache_key(self, target)
        candidates = [cache._entry_path(base, target, self.name, key) for base in env.cache_bases()]
        return next((p for p in candidates if p.exists()), candidates[0])

    @property
    def jit_library_path(self) -> Path:
        """`cache_path()` by the name users of FlashInfer know."""
        return self.cache_path()

    def get_library_path(self) -> Path:
        """`cache_path()` by the name users of FlashInfer know."""
        return self.cache_path()

    def is_built(self, arch: str | None = None) -> bool:
        """Whether a disk cache holds it."""
        return self.cache_path(arch).exists()

    def _target(self, arch: str | None) -> str:
        if arch is not None:
            return env.parse_arch(arch)
        candidates = env.default_archs()
        return next((a for a in candidates if self.suits(env.arch_number(a))), candidates[0])


@dataclass(frozen=True)
class JitModule:
    """Several specs that belong together (what FlashInfer calls a module): built and loaded as one."""

    name: str
    specs: tuple[JitSpec, ...]

    def build(self, arch: str | None = None, verbose: bool = False) -> list[compiler.Artifact]:
        """Compile every spec."""
        return build_jit_specs(self.specs, verbose=verbose, archs=None if arch is None else [arch])

    def build_and_load(self, device: int | None = None) -> dict[str, Kernel]:
        """Compile and load every spec: name → kernel."""
        return {s.name: s.build_and_load(device) for s in self.specs}


def gen_jit_spec(name: str, template: str, params: ParamStruct, **constants: Any) -> JitSpec:
    """A JitSpec from keyword constants; `block`, `smem`, `options`, `min_arch`, `max_arch` and `cluster` are taken out of them."""
    own = {
        k: constants.pop(k) for k in ("block", "smem", "options", "min_arch", "max_arch", "cluster") if k in constants
    }
    return JitSpec(name, template, params, tuple(sorted(constants.items())), **own)


def flatten(specs: Iterable[JitSpec | JitModule]) -> list[JitSpec]:
    """Specs and modules as one list of distinct specs."""
    flat: dict[JitSpec, None] = {}
    for item in specs:
        for spec in item.specs if isinstance(item, JitModule) else (item,):
            flat[spec] = None
    return list(flat)


def build_jit_specs(
    specs: Iterable[JitSpec | JitModule],
    verbose: bool = False,
    skip_prebuilt: bool = True,
    *,
    archs: Iterable[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int, compiler.Artifact], None] | None = None,
) -> list[compiler.Artifact]:
    """Compile many specs side by side, in threads (NVRTC releases the GIL; about 40 MB of memory a thread, no subprocess).

    Parameters
    ----------
    specs
        JitSpecs or JitModules. A spec that needs a newer architecture than asked for is left out for that one.
    skip_prebuilt
        Accepted for compatibility: what the cache holds is never compiled again.
    archs
        Target architectures; default `jit.env.default_archs()`.
    threads
        Worker threads; default the number of CPUs this process may use, at most 8.
    progress
        Called as progress(done, total, artifact) after each one.

    `PYINFER_JIT=error` forbids compiling on first use, not this.

    Raises
    ------
    JitError
        The first failure, after the others have ended.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    targets = [env.parse_arch(a) for a in archs] if archs is not None else env.default_archs()
    jobs = [(s, a) for s in flatten(specs) for a in targets if s.suits(env.arch_number(a))]
    compiler.nvrtc()  # load the library once, before the threads
    with ThreadPoolExecutor(threads or min(_num_cpus(), 8)) as pool:
        futures = [pool.submit(s.build, a, verbose, ahead=True) for s, a in jobs]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                if future.exception() is None and progress is not None:
                    progress(done, len(jobs), future.result())
        except BaseException:  # Ctrl-C, or `progress` itself: what has not begun never will
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        return [f.result() for f in futures]


def _num_cpus() -> int:
    """CPUs this process may use (a container's share, not the machine's)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
