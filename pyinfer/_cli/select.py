"""Finding kernels by what a person would type: a name, a pattern, a template, a family, a public function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyinfer.jit.spec import JitSpec

# Public functions -> pattern of kernel names, where neither the template's stem nor its folder says it.
_KERNELS_OF = {
    "gemma_rmsnorm": "rmsnorm_*gemma*",
    "gemma_fused_add_rmsnorm": "fused_add_rmsnorm_*gemma*",
    "single_decode_with_kv_cache": "decode_*_single_*",
    "single_prefill_with_kv_cache": "prefill_*_single_*",
}
# Public modules that run another module's kernels: block-sparse attention is paged prefill over the blocks.
RUNS_KERNELS_OF = {"sparse": "prefill", "variants": "attention"}


def families() -> list[str]:
    """The families that generate kernels."""
    from pyinfer import jit

    return list(jit.FAMILIES)


def specs_of(family: str) -> list[JitSpec]:
    """The specialisations of one family that ahead-of-time builds cover."""
    from pyinfer.jit.spec import flatten

    return flatten(importlib.import_module(f"pyinfer.jit.{family}").all_specs())


def all_specs() -> dict[str, list[JitSpec]]:
    """Every family's specialisations."""
    return {family: specs_of(family) for family in families()}


def stem(spec: JitSpec) -> str:
    """'rmsnorm' for the template 'norm/rmsnorm.cu.jinja'."""
    return PurePosixPath(spec.template).name.split(".")[0]


def find(pattern: str) -> list[JitSpec]:
    """The specialisations that a pattern means.

    Tried in turn until one gives something: a kernel's name, a shell pattern over names, a template's stem ("rmsnorm", or "decode"
    for decode_sm80), a public function ("single_decode_with_kv_cache"), a family or a folder of templates, part of a name.
    """
    import pyinfer

    by_family = all_specs()
    specs = [s for group in by_family.values() for s in group]
    wanted = pattern.removeprefix("pyinfer.")
    function = wanted.rsplit(".", 1)[-1]  # pyinfer.norm.rmsnorm is fine too
    folder = pyinfer._MODULE_OF.get(function, wanted)
    folder = RUNS_KERNELS_OF.get(folder, folder)
    tests: tuple[Callable[[JitSpec], bool], ...] = (
        lambda s: s.name == wanted,
        lambda s: fnmatchcase(s.name, wanted),
        lambda s: stem(s) == function or stem(s).startswith(f"{function}_sm"),
        lambda s: fnmatchcase(s.name, _KERNELS_OF.get(function, "")),
        lambda s: s.template.startswith(f"{folder}/") or s in by_family.get(folder, ()),
        lambda s: wanted in s.name,
    )
    for test in tests:
        found = [s for s in specs if test(s)]
        if found:
            return found
    return []


def unknown(pattern: str) -> str:
    """What to say when a pattern matches nothing: the nearest names."""
    import difflib

    import pyinfer

    by_family = all_specs()
    names = {s.name for group in by_family.values() for s in group} | {
        stem(s) for group in by_family.values() for s in group
    }
    near = difflib.get_close_matches(pattern, sorted(names | set(by_family) | set(pyinfer._MODULE_OF)), n=3, cutoff=0.5)
    hint = f"Did you mean {', '.join(near)}?" if near else f"Families: {', '.join(by_family)}."
    return f"no kernel matches {pattern!r}. {hint} `pyinfer list-modules --specs` prints every name."
