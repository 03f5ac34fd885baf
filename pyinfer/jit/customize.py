"""Variants in FlashInfer's words: CUDA structs, `jit_args`, `gen_customize_*_module` and the modules that the `*_with_jit_module` functions take.

A variant there is a struct derived from `AttentionVariantBase` with a constructor (params, batch_idx, smem_ptr), a constant `use_softmax`, a member
`sm_scale_log2` and functions declared by REGISTER_LOGITS_TRANSFORM and REGISTER_LOGITS_MASK; `common/flashinfer_variant.cuh` holds what it may refer to.
It becomes hooks of the kernels that every variant runs in. Its logits are bare products q·k (times sm_scale only if plan() is given one, and q_scale and
k_scale), its own scale is applied behind the transform; without softmax its logits are the weights. Fields of `params` are the extra tensors and scalars,
`window_left`, and get_qo_len(batch_idx) and get_kv_len(batch_idx). It runs on GPUs only: `pyinfer.AttentionVariant` is what runs on both.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pyinfer.core.dtypes import DType, canonical_dtype
from pyinfer.core.errors import fail, fail_type
from pyinfer.jit import env
from pyinfer.jit.attention import _check_backend, _check_index
from pyinfer.jit.spec import JitModule, JitSpec
from pyinfer.jit.variant_link import variant_specs
from pyinfer.variants import AttentionVariant

_SCALARS = {
    "float": "float32",
    "double": "float32",
    "int32_t": "int32",
    "int": "int32",
    "int64_t": "int32",
    "uint32_t": "int32",
}
_TENSORS = {"float": "float32[:]", "int32_t": "int32[:]", "int": "int32[:]"}
_ABSENT = (  # what a struct may have there and not here, and what to do about it
    ("REGISTER_M_D_UPDATE", "Pass sinks= to run() for a logit that joins the denominator."),
    ("REGISTER_OUTPUT_TRANSFORM", "Use pyinfer.AttentionVariant(output=...), or sinks= for attention sinks."),
    ("REGISTER_QUERY_TRANSFORM", "Use pyinfer.AttentionVariant(query=...)."),
    ("additional_params", "Write the form with REGISTER_LOGITS_TRANSFORM, which all kernels run."),
    ("GetAttentionUpdater", "Write the form with use_softmax, which all kernels run."),
)


@dataclass(frozen=True)
class CustomModule:
    """What a `gen_customize_*_module` gives: a variant, and the types and head dimensions it was asked for.

    build() compiles its kernels, build_and_load() as well, and returns what `*_with_jit_module` takes.
    """

    name: str
    phase: str
    variant: AttentionVariant
    dtypes: tuple[DType, DType, DType]
    head_dims: tuple[int, int]

    @property
    def specs(self) -> tuple[JitSpec, ...]:
        """Its kernels for the default architectures."""
        found: dict[JitSpec, None] = {}
        phase = "decode" if "decode" in self.phase else "prefill"
        source = "single" if self.phase.startswith("single") else "plan"
        for arch in env.default_archs():
            found |= dict.fromkeys(
                variant_specs(self.variant.user, arch, self.dtypes, self.head_dims, (phase,), (source,))
            )
        return tuple(found)

    def build(self, arch: str | None = None, verbose: bool = False) -> list[Any]:
        """Compile every kernel."""
        return JitModule(self.name, self.specs).build(arch, verbose)

    def build_and_load(self, device: int | None = None) -> CustomModule:
        """Compile and load every kernel on a CUDA device."""
        JitModule(self.name, self.specs).build_and_load(device)
        return self

    def check(self, op: str, phase: str, q: DType, kv: DType, out: DType, head_dims: tuple[int, int]) -> None:
        """TypeError or ValueError unless it was made for such tensors."""
        if phase != self.phase:
            fail(op, "the module", "was made for another operator", self.phase, phase)
        if (q, kv, out) != self.dtypes:
            got = ", ".join(d.name for d in (q, kv, out))
            fail_type(op, "the module", "was made for other types", ", ".join(d.name for d in self.dtypes), got)
        if head_dims != self.head_dims:
            fail(op, "the module", "was made for other head dimensions", self.head_dims, head_dims)


def _struct_variant(
    op: str, uri: str, tensors: Sequence[tuple[str, str]], scalars: Sequence[tuple[str, str]], struct: str, source: str
) -> AttentionVariant:
    """The variant of a FlashInfer struct. `tensors`, `scalars`: (name, C type)."""
    for word, fix in _ABSENT:
        if word in source:
            fail(op, "variant_decl", "has something that is not supported", word, "none of it", fix)
    if not re.search(rf"\bstruct\s+{re.escape(struct)}\b", source):
        fail(op, "variant_decl", "does not define the variant", f"no struct {struct}", f"struct {struct}")
    params, members = {}, []
    for kind, items, known in (("tensor", tensors, _TENSORS), ("scalar", scalars, _SCALARS)):
        for name, ctype in items:
            plain = ctype.replace("const ", "").strip()
            if plain not in known:
                fail_type(op, f"additional_{kind}_dtypes", "has a type that is not supported", ctype, ", ".join(known))
            params[name] = known[plain]
            members.append((name, f"const {plain}*" if kind == "tensor" else plain))
    found = re.search(r"\buse_softmax\s*=\s*(true|false)", source)
    softmax = found is None or found[1] == "true"
    fields = "\n".join(f"    {kind} {name};" for name, kind in members)
    values = "".join(f", static_cast<{kind}>(p.user_{name})" for name, kind in members)
    hooks = f"""#include "common/flashinfer_variant.cuh"
struct FlashInferParams {{
    const Params& kernel;
    int32_t window_left;
{fields}
    PYINFER_DEVICE uint32_t get_kv_len(uint32_t request) const {{ return kv_length(kernel, VariantPlace{{static_cast<int>(request)}}); }}
    PYINFER_DEVICE uint32_t get_qo_len(uint32_t request) const {{ return query_length(kernel, request); }}
}};
{source}
static_assert({struct}::use_softmax == {str(softmax).lower()}, "use_softmax is read from the source, where it must stand as a literal");
PYINFER_DEVICE FlashInferParams flashinfer_params(const Params& p) {{
    return {{p, p.window_left{values}}};
}}
PYINFER_DEVICE float user_logits_transform(const Params& p, float logit, const VariantPlace& at) {{
    const FlashInferParams params = flashinfer_params(p);
    {struct} variant(params, at.request, nullptr);
    const float x = variant.LogitsTransform(params, logit, at.request, at.q_token, at.kv_token, at.qo_head, at.kv_head);
    return flashinfer_logit<{str(softmax).lower()}>(variant, x);
}}
PYINFER_DEVICE bool user_mask(const Params& p, const VariantPlace& at) {{
    const FlashInferParams params = flashinfer_params(p);
    {struct} variant(params, at.request, nullptr);
    return variant.LogitsMask(params, at.request, at.q_token, at.kv_token, at.qo_head, at.kv_head);
}}
"""
    if "REGISTER_LOGITS_MASK" not in source:  # it would be asked, and say yes, for every key
        hooks = hooks[: hooks.index("PYINFER_DEVICE bool user_mask")]
    name = re.sub(r"\W", "_", uri)
    optional = frozenset(n for n, _ in tensors if n.startswith("maybe"))
    return AttentionVariant._of_struct(name, params, hooks, softmax, optional)


def _checked(
    op: str, uri: Any, tensor_names: Any, tensor_types: Any, scalar_names: Any, scalar_types: Any, struct: Any, source: Any, pos_encoding_mode: int,
    use_logits_soft_cap: bool, fp8_enabled: bool,
) -> AttentionVariant:  # fmt: skip
    if not isinstance(uri, str):
        fail_type(op, "uri", "is no string", type(uri).__name__, "a name for the module")
    for arg, value in (("variant_name", struct), ("variant_decl", source)):
        if not isinstance(value, str):
            fail_type(
                op, arg, "is no string", type(value).__name__, "CUDA source" if arg == "variant_decl" else "a name"
            )
    for arg, names, kinds in (
        ("additional_tensor_dtypes", tensor_names, tensor_types),
        ("additional_scalar_dtypes", scalar_names, scalar_types),
    ):
        if len(names) != len(kinds):
            fail(op, arg, "does not go with the names", f"{len(kinds)} types", f"{len(names)}")
    for arg, got, wanted in (
        ("pos_encoding_mode", pos_encoding_mode, 0),
        ("use_logits_soft_cap", use_logits_soft_cap, False),
        ("fp8_enabled", fp8_enabled, False),
    ):
        if got != wanted:
            fail(op, arg, "is not supported", got, wanted, "A custom variant does that itself.")
    tensors, scalars = zip(tensor_names, tensor_types, strict=True), zip(scalar_names, scalar_types, strict=True)
    return _struct_variant(op, uri, list(tensors), list(scalars), struct, source)


def _module(op: str, dtypes: tuple[Any, Any, Any], head_dims: tuple[int, int], *variant: Any) -> CustomModule:
    phase = op.removeprefix("gen_customize_").removesuffix("_module")
    q, kv, out = (canonical_dtype(d, op, a) for a, d in zip(("dtype_q", "dtype_kv", "dtype_o"), dtypes, strict=True))
    made = _checked(op, *variant)
    return CustomModule(variant[0], phase, made, (q, kv, out), (int(head_dims[0]), int(head_dims[1])))


def gen_customize_single_decode_module(
    uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int, additional_tensor_names: Sequence[str],
    additional_tensor_dtypes: Sequence[str], additional_scalar_names: Sequence[str], additional_scalar_dtypes: Sequence[str], variant_name: str,
    variant_decl: str, pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
) -> CustomModule:  # fmt: skip
    """A variant for `single_decode_with_kv_cache_with_jit_module`. The window is a run-time value, whatever use_sliding_window says."""
    return _module(
        "gen_customize_single_decode_module", (dtype_q, dtype_kv, dtype_o), (head_dim_qk, head_dim_vo), uri, additional_tensor_names,
        additional_tensor_dtypes, additional_scalar_names, additional_scalar_dtypes, variant_name, variant_decl, pos_encoding_mode, use_logits_soft_cap, False,
    )  # fmt: skip


def gen_customize_batch_decode_module(
    uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, idtype: Any, head_dim_qk: int, head_dim_vo: int, additional_tensor_names: Sequence[str],
    additional_tensor_dtypes: Sequence[str], additional_scalar_names: Sequence[str], additional_scalar_dtypes: Sequence[str], variant_name: str,
    variant_decl: str, pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False,
) -> CustomModule:  # fmt: skip
    """The same for batch decode: its arguments are the wrapper's `jit_args`."""
    op = "gen_customize_batch_decode_module"
    _check_index(op, idtype)
    return _module(
        op, (dtype_q, dtype_kv, dtype_o), (head_dim_qk, head_dim_vo), uri, additional_tensor_names, additional_tensor_dtypes, additional_scalar_names,
        additional_scalar_dtypes, variant_name, variant_decl, pos_encoding_mode, use_logits_soft_cap, False,
    )  # fmt: skip


def gen_customize_single_prefill_module(
    backend: str, uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int, additional_tensor_names: Sequence[str],
    additional_tensor_dtypes: Sequence[str], additional_scalar_names: Sequence[str], additional_scalar_dtypes: Sequence[str], variant_name: str,
    variant_decl: str, pos_encoding_mode: int = 0, use_sliding_window: bool = False, use_logits_soft_cap: bool = False, use_fp16_qk_reduction: bool = False,
    fp8_enabled: bool = False,
) -> CustomModule:  # fmt: skip
    """A variant for `single_prefill_with_kv_cache_with_jit_module`. Scores are accumulated in float32 with use_fp16_qk_reduction too."""
    op = "gen_customize_single_prefill_module"
    _check_backend(op, backend)
    return _module(
        op, (dtype_q, dtype_kv, dtype_o), (head_dim_qk, head_dim_vo), uri, additional_tensor_names, additional_tensor_dtypes, additional_scalar_names,
        additional_scalar_dtypes, variant_name, variant_decl, pos_encoding_mode, use_logits_soft_cap, fp8_enabled,
    )  # fmt: skip


def gen_customize_batch_prefill_module(
    backend: str, uri: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, idtype: Any, head_dim_qk: int, head_dim_vo: int,
    additional_tensor_names: Sequence[str], additional_tensor_dtypes: Sequence[str], additional_scalar_names: Sequence[str],
    additional_scalar_dtypes: Sequence[str], variant_name: str, variant_decl: str, pos_encoding_mode: int = 0, use_sliding_window: bool = False,
    use_logits_soft_cap: bool = False, use_fp16_qk_reduction: bool = False, fp8_enabled: bool = False,
) -> CustomModule:  # fmt: skip
    """The same for the batch prefills: its arguments but the first are the wrappers' `jit_args`."""
    op = "gen_customize_batch_prefill_module"
    _check_backend(op, backend)
    _check_index(op, idtype)
    return _module(
        op, (dtype_q, dtype_kv, dtype_o), (head_dim_qk, head_dim_vo), uri, additional_tensor_names, additional_tensor_dtypes, additional_scalar_names,
        additional_scalar_dtypes, variant_name, variant_decl, pos_encoding_mode, use_logits_soft_cap, fp8_enabled,
    )  # fmt: skip


def module_of_jit_args(op: str, jit_args: Any, jit_kwargs: Any) -> CustomModule:
    """What a wrapper's `jit_args` and `jit_kwargs` ask for."""
    if not isinstance(jit_args, list | tuple) or len(jit_args) != 13:
        got = f"{type(jit_args).__name__}" + (f" of {len(jit_args)}" if isinstance(jit_args, list | tuple) else "")
        wanted = "(uri, dtype_q, dtype_kv, dtype_o, idtype, head_dim_qk, head_dim_vo, tensor names, types, scalar names, types, variant_name, variant_decl)"
        fail(
            op,
            "jit_args",
            "is not what gen_customize takes",
            got,
            wanted,
            "Or pass variant=pyinfer.AttentionVariant(...).",
        )
    options = dict(jit_kwargs or {})
    known = ("pos_encoding_mode", "use_sliding_window", "use_logits_soft_cap", "use_fp16_qk_reduction", "fp8_enabled")
    unknown = [k for k in options if k not in known]
    if unknown:
        fail_type(op, "jit_kwargs", "has an unknown name", unknown[0], ", ".join(known))
    if "Decode" in op:
        for name in known[3:]:
            if options.pop(name, False):
                fail(op, f"jit_kwargs[{name!r}]", "is not supported", True, False)
        return gen_customize_batch_decode_module(*jit_args, **options)
    return gen_customize_batch_prefill_module("auto", *jit_args, **options)


def custom_module(op: str, phase: str, module: Any) -> CustomModule:
    """A module that a `*_with_jit_module` function was given; TypeError if it is none."""
    if not isinstance(module, CustomModule):
        wanted = f"what gen_customize_{phase}_module(...).build_and_load() gives"
        fail_type(op, "jit_module", "is no module", type(module).__name__, wanted)
    return module
