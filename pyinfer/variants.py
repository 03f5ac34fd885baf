"""Attention variants of your own: what happens to queries, scores, visibility and outputs, as plain Python functions or as CUDA.

    def capped(score, cap):
        return cap * math.tanh(score / cap)

    variant = pyinfer.AttentionVariant("capped", logits=capped, params={"cap": "float32"})
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(variant=variant)
    wrapper.plan(...)
    out = wrapper.run(q, cache, 30.0)

On CPU tensors Numba compiles the function; on a GPU Numba-CUDA compiles it to LTO-IR and nvJitLink inlines it into the attention kernel (the
extras `variants-cu12` and `variants-cu13` bring both). The linked kernel is cached like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyinfer import _variant_source
from pyinfer.core.dtypes import FLOAT32, INT32
from pyinfer.core.errors import check_dtype, check_ndim, device_name, fail, fail_type
from pyinfer.core.params import Field, f32, i32, ptr
from pyinfer.core.tensor import TensorView, as_numpy, is_tensor, view
from pyinfer.jit.attention_options import HOOKS, UserVariant

if TYPE_CHECKING:
    from pyinfer.jit.compiler import Artifact
    from pyinfer.jit.spec import DeviceFunction

__all__ = ["AttentionVariant"]

_OP = _variant_source.OP
_PLACE = {
    "batch": "at.request",
    "q_idx": "at.q_token",
    "q_pos": "at.q_position()",
    "head": "at.qo_head",
    "kv_head": "at.kv_head",
    "qo_len": "qo_length(p, at)",
    "kv_len": "kv_length(p, at)",
}
_ARGUMENTS = {  # of each hook: what its function may ask for, and the C++ for it
    "query": {"value": "value", "dim": "column", **_PLACE},
    "logits": {"score": "logit", "kv_idx": "at.kv_token", **_PLACE},
    "mask": {"kv_idx": "at.kv_token", **_PLACE},
    "output": {"value": "value", "dim": "column", **_PLACE},
}
_SIGNATURES = {
    "query": "float user_query_transform(const Params& p, float value, const VariantPlace& at, int column)",
    "logits": "float user_logits_transform(const Params& p, float logit, const VariantPlace& at)",
    "mask": "bool user_mask(const Params& p, const VariantPlace& at)",
    "output": "float user_output_transform(const Params& p, float value, const VariantPlace& at, int column)",
}
# What a Python function becomes: it multiplies for itself.
_SCALED_LOGITS = (
    "float user_scaled_logits(const Params& p, float logit, float before, float after, const VariantPlace& at)"
)
_HOOK_NAMES = {hook: re.search(r"user_\w+", signature)[0] for hook, signature in _SIGNATURES.items()}  # type: ignore[index]
_TAKEN = frozenset().union(*_ARGUMENTS.values())
_PARAM = re.compile(r"(float32|int32)(?:\[(head|kv_head|batch|:)\])?")
_CPP = {"f32": "float", "i32": "int"}


def _param(name: str, declared: Any) -> tuple[str, str, str]:
    """(name, "f32" or "i32", index) of a declared parameter."""
    if not isinstance(name, str) or not name.isidentifier():
        fail(_OP, "params", "has a name that is none", repr(name), "a Python identifier")
    if name in _TAKEN or name in _variant_source.SCALES or name.startswith("_"):
        fail(_OP, "params", "has a name that is taken", repr(name), f"another than {', '.join(sorted(_TAKEN))}")
    found = _PARAM.fullmatch(declared) if isinstance(declared, str) else None
    if found is None:
        wanted = "'float32' or 'int32', alone or with '[head]', '[kv_head]', '[batch]' or '[:]'"
        fail(_OP, f"params[{name!r}]", "is no type", repr(declared), wanted)
    return name, "f32" if found[1] == "float32" else "i32", found[2] or ""


def _uses_place(source: str) -> bool:
    """Whether CUDA source reads any `const VariantPlace& NAME` it is given."""
    names = re.findall(r"VariantPlace\s*&\s*(\w+)", source)
    return any(len(re.findall(rf"\b{name}\b", source)) > names.count(name) for name in names)


@dataclass(frozen=True, eq=False)
class AttentionVariant:
    """An attention of your own, for decode, prefill and both backends. Immutable; the functions are read when it is made.

    A function asks for what it needs by the names of its arguments, in any order:

    ==========  =============================================================================================================
    score       logits: the score, scaled by sm_scale and with ALiBi's bias, before a soft cap of `plan()`; float32
    value       query: an element of q; output: an element of the result, after v_scale; float32
    dim         query, output: its place in the head dimension
    batch       index of the request
    q_idx       query token within the request's queries
    q_pos       the same as a position: kv_len - qo_len + q_idx
    kv_idx      logits, mask: key within the request's keys
    head        query head
    kv_head     head of the keys and values
    qo_len      queries of the request
    kv_len      keys of the request
    ==========  =============================================================================================================

    and any name of `params`. It computes in float32 and int32: an operation on two integers is int32, any other, and every division, float32. It may
    use arithmetic, comparisons, `and`, `or`, `not`, conditional expressions, local variables, if, while, for over range, numbers from outside (they become
    constants), math.exp, exp2, log, log2, sqrt, tanh, erf, sin, cos, floor, ceil, pow, isnan, isinf (or NumPy's), abs, min, max, float, int, and other
    such functions, whose arguments and result are floats unless annotated int or bool.

    Parameters
    ----------
    name
        Part of the kernels' names: letters, digits, underscores.
    query
        An element of q -> another, before RoPE and the products. On a GPU the result is rounded to q's type.
    logits
        score -> the logit that goes into the softmax. It is asked about keys that a mask hides as well, though never about one outside the request.
    mask
        -> whether the query sees the key, besides what causality, window and masks hide.
    output
        An element of the normalised output -> another.
    params
        Name -> type of the values given to run(), in this order: "float32" or "int32" for a number; with "[head]", "[kv_head]" or "[batch]" for a tensor,
        of which the function gets the element of its head or request; with "[:]" for a tensor of any length, which the function indexes itself
        (`doc[i]`; nothing tests the index).
    use_softmax
        False: the logits are the weights, out = sum_j logit_j v_j, without normalisation and without an LSE; hidden keys weigh nothing.
    cuda_source
        CUDA that defines the hooks instead of Python functions, for GPUs (`common/attention_variant.cuh` has their signatures; parameters are `p.NAME`).
        With Python functions given as well the CPU runs these.

    Raises
    ------
    ValueError, TypeError
        If a function has something in it that cannot be compiled, naming it and its line; for a parameter without a type.

    Examples
    --------
    >>> def alibi(score, q_pos, kv_idx, slope):
    ...     return score - slope * (q_pos - kv_idx)
    >>> AttentionVariant("alibi", logits=alibi, params={"slope": "float32[head]"})  # doctest: +SKIP
    """

    name: str
    query: Callable[..., Any] | None = None
    logits: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    output: Callable[..., Any] | None = None
    params: Mapping[str, str] = field(default_factory=dict)
    use_softmax: bool = True
    cuda_source: str | None = None
    user: UserVariant = field(init=False, repr=False)
    """What the CUDA kernels are made with."""
    _functions: dict[str, tuple[DeviceFunction, ...]] = field(init=False, repr=False)
    _names: dict[str, tuple[str, ...]] = field(init=False, repr=False)
    _declared: tuple[tuple[str, str, str], ...] = field(init=False, repr=False)
    _optional: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"\w+", self.name, re.ASCII):
            fail(_OP, "name", "is no name", repr(self.name), "letters, digits and underscores")
        declared = tuple(_param(name, kind) for name, kind in self.params.items())
        given = {hook: getattr(self, hook) for hook in HOOKS if getattr(self, hook) is not None}
        functions, names = {}, {}
        for hook, function in given.items():
            types = {name: "f32" if name in ("score", "value") else "i32" for name in _ARGUMENTS[hook]}
            types |= {name: kind + ("*" if index == ":" else "") for name, kind, index in declared}
            result = "i32" if hook == "mask" else "f32"
            scaled = "score" if hook == "logits" else None
            numbers = frozenset(name for name, _, index in declared if not index)
            symbol = f"pyinfer_user_{hook}"
            functions[hook] = _variant_source.rewrite(hook, function, symbol, types, result, scaled, numbers)
            names[hook] = tuple(_variant_source.argument_names(hook, function))
        hooks = tuple(given)
        if self.cuda_source is not None:
            hooks = tuple(h for h in HOOKS if re.search(rf"\b{_HOOK_NAMES[h]}\s*\(", self.cuda_source))
            if given and hooks != tuple(given):
                wanted = f"the hooks that are given as functions: {', '.join(given)}"
                fail(_OP, "cuda_source", "defines other hooks", ", ".join(hooks) or "none", wanted)
            if not hooks:
                fail(_OP, "cuda_source", "defines no hook", "none", f"any of {', '.join(_HOOK_NAMES.values())}")
        unused = [n for n, _, _ in declared if given and not any(n in asked for asked in names.values())]
        if unused:
            fail(_OP, "params", "has a parameter that no function asks for", unused[0], "an argument of that name")
        if not hooks and self.use_softmax:
            fail(
                _OP, "functions", "are missing", "none", f"any of {', '.join(HOOKS)}, cuda_source or use_softmax=False"
            )
        object.__setattr__(self, "params", dict(self.params))
        object.__setattr__(self, "_functions", functions)
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "_declared", declared)
        object.__setattr__(self, "user", self._user_variant(hooks))

    @classmethod
    def _of_struct(
        cls, name: str, params: Mapping[str, str], source: str, use_softmax: bool, optional: frozenset[str]
    ) -> AttentionVariant:
        """A struct of FlashInfer's (`jit.customize`), with hooks that call it; tensors in `optional` may be None."""
        made = cls(name, params=params, use_softmax=use_softmax, cuda_source=source)
        fields = made._fields("user_")
        object.__setattr__(made, "user", made.user._replace(fields=fields, raw_scores=True))
        object.__setattr__(made, "_optional", optional)
        return made

    # ---- CUDA
    def _user_variant(self, hooks: tuple[str, ...]) -> UserVariant:
        if self.cuda_source is not None:
            used = _uses_place(self.cuda_source)
            return UserVariant(
                self.name,
                self.cuda_source,
                hooks,
                self._fields(""),
                (),
                self.use_softmax,
                places="mask" in hooks or used,
            )
        lines = ['#include "common/variant_math.cuh"'] if hooks else []
        linked: dict[str, DeviceFunction] = {}
        expressions = {}
        for name, _, index in self._declared:
            at = {"head": "at.qo_head", "kv_head": "at.kv_head", "batch": "at.request"}.get(index)
            expressions[name] = f"__ldg(p.user_{name} + {at})" if at else f"p.user_{name}"
        for hook in hooks:
            first = self._functions[hook][-1]
            linked |= {f.symbol: f for f in self._functions[hook]}
            kinds = (f"const {_CPP[a[:-1]]}*" if a.endswith("*") else _CPP[a] for a in first.arguments)
            passed = [(_ARGUMENTS[hook] | expressions)[n] for n in self._names[hook]]
            signature = _SIGNATURES[hook]
            if hook == "logits":
                passed += ["before", "after"]
                signature = _SCALED_LOGITS
            call = f"{first.symbol}({', '.join(passed)})" + (" != 0" if hook == "mask" else "")
            lines.append(f'extern "C" __device__ {_CPP[first.result]} {first.symbol}({", ".join(kinds)});')
            lines.append(f"PYINFER_DEVICE {signature} {{\n    return {call};\n}}")
        source = "\n".join([*lines, ""])
        numbers = {"score", *(name for name, _, index in self._declared if not index)}
        placed = "mask" in hooks or not numbers.issuperset(self._names.get("logits", ()))
        functions = tuple(linked.values())
        return UserVariant(self.name, source, hooks, self._fields("user_"), functions, self.use_softmax, places=placed)

    def _fields(self, prefix: str) -> tuple[Field, ...]:
        """The kernel's parameters: pointers first, as a struct with 8-byte fields behind 4-byte ones would have gaps for nothing."""
        found = []
        for name, kind, index in self._declared:
            if index:
                found.append(ptr(prefix + name, f"const {'float' if kind == 'f32' else 'int32_t'}", f"[{index}]"))
            else:
                found.append((f32 if kind == "f32" else i32)(prefix + name))
        return tuple(found)

    def build(
        self,
        q_data_type: Any = "float16",
        head_dim_qk: int = 128,
        head_dim_vo: int | None = None,
        *,
        kv_data_type: Any = None,
        o_data_type: Any = None,
        logits_soft_cap: float | None = None,
        archs: Sequence[str] | None = None,
        verbose: bool = False,
    ) -> list[Artifact]:
        """Compile ahead what decode and prefill take on GPUs with these types and head dimensions, and no other option. Needs no GPU.

        Parameters
        ----------
        q_data_type, kv_data_type, o_data_type, head_dim_qk, head_dim_vo, logits_soft_cap
            As plan() gets them.
        archs
            "9.0a", "80", "compute_80", ...; by default the architectures of `PYINFER_CUDA_ARCH_LIST`, or this machine's GPUs, or all.
        verbose
            Print a line for each kernel.

        Raises
        ------
        JitError
            If it does not compile, or what compiles it is not installed.
        """
        from pyinfer._support import out_dtype, plan_dtypes
        from pyinfer.jit import env
        from pyinfer.jit.spec import build_jit_specs
        from pyinfer.jit.variant_link import variant_specs

        q, kv = plan_dtypes(_OP, q_data_type, kv_data_type)
        dtypes, dims = (q, kv, out_dtype(_OP, q, o_data_type)), (head_dim_qk, head_dim_vo or head_dim_qk)
        found: list[Artifact] = []
        for arch in [env.parse_arch(a) for a in archs] if archs is not None else env.default_archs():
            specs = variant_specs(self.user, arch, dtypes, dims, soft_cap=bool(logits_soft_cap))
            found += build_jit_specs(specs, verbose, archs=[arch])
        return found

    # ---- values of a run
    def check_args(
        self, op: str, args: Sequence[Any], device: int, num_qo_heads: int, num_kv_heads: int, batch: int
    ) -> list[float | int | TensorView]:
        """The values of `params` for one run: numbers, and views of tensors, checked against the run's shapes."""
        if len(args) != len(self._declared):
            wanted = f"{len(self._declared)}: {', '.join(n for n, _, _ in self._declared) or 'none'}"
            fail_type(op, "*args", "do not fit the variant", f"{len(args)} extra arguments", wanted)
        lengths = {"head": num_qo_heads, "kv_head": num_kv_heads, "batch": batch}
        found: list[float | int | TensorView] = []
        for (name, kind, index), value in zip(self._declared, args, strict=True):
            if not index:
                found.append(_number(op, name, kind, value))
                continue
            if value is None and name in self._optional:
                found.append(0)
                continue
            v = view(value, op, name)
            check_dtype(op, name, v, (FLOAT32 if kind == "f32" else INT32,))
            check_ndim(op, name, v, 1)
            if not v.is_contiguous():
                fail(op, name, "is not contiguous", f"strides {tuple(v.strides)}", "a contiguous tensor")
            if index != ":" and v.shape[0] != lengths[index]:
                fail(op, name, "has the wrong length", v.shape[0], f"{lengths[index]} (one for each {index})")
            if v.device != device:
                fail(op, name, "is on another device", device_name(v.device), f"{device_name(device)} (where q is)")
            found.append(v)
        return found

    @staticmethod
    def cuda_values(values: Sequence[float | int | TensorView]) -> tuple[float | int, ...]:
        """`check_args`' result as the kernels' parameters."""
        return tuple(v.ptr if isinstance(v, TensorView) else v for v in values)

    def cpu_values(self, op: str, values: Sequence[float | int | TensorView]) -> tuple[Any, Any]:
        """`check_args`' result as the CPU kernels' `user` array, and what must live while it is used."""
        from pyinfer.cpu import user_variant

        self.check_cpu(op)
        kinds = [kind for _, kind, _ in self._declared]
        host = [as_numpy(v) if isinstance(v, TensorView) else v for v in values]
        return user_variant.bind(self._rows(), list(zip(kinds, host, strict=True)), self.use_softmax)

    def check_run(self, op: str, lse: bool, sinks: bool) -> None:
        """ValueError for what there is not without a softmax."""
        if not self.use_softmax and (lse or sinks):
            arg = "return_lse" if lse else "sinks"
            fail(op, arg, "needs a softmax", f"a variant without ({self.name})", "use_softmax=True, or neither of them")

    def check_cpu(self, op: str) -> None:
        """ValueError unless there is something for the CPU to run."""
        if self.cuda_source is not None and not self._functions:
            fix = "Give the functions in Python as well."
            fail(op, "variant", "is CUDA only", f"{self.name} and tensors on the CPU", "tensors on a GPU", fix)

    def _rows(self) -> dict[str, Any]:
        from pyinfer.cpu import user_variant

        return {
            hook: user_variant.row_function(hook, functions[::-1], self._names[hook], self._declared)
            for hook, functions in self._functions.items()
        }


def _number(op: str, name: str, kind: str, value: Any) -> float | int:
    if is_tensor(value):
        fix = f"Declare {name} with '[:]' to pass a tensor, or read it."
        fail_type(op, name, "is a tensor", type(value).__name__, "a number", fix)
    try:
        number = float(value) if kind == "f32" else int(value)
    except (TypeError, ValueError):
        fail_type(op, name, "is no number", type(value).__name__, "a float" if kind == "f32" else "an int")
    if kind == "i32" and not (number == value and -(2**31) <= number < 2**31):
        fail(op, name, "does not fit int32", value, "an integer of 32 bits")
    return number


def check_variant(op: str, variant: Any) -> AttentionVariant:
    """TypeError unless it is a variant."""
    if not isinstance(variant, AttentionVariant):
        fail_type(op, "variant", "is no variant", type(variant).__name__, "a pyinfer.AttentionVariant")
    return variant
