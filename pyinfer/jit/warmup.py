"""Compile ahead every kernel that serving a model can reach, so that no request ever waits for the compiler.

NVRTC runs in threads of this process and needs about 40 MB for each; on a machine without a GPU the architectures are given, and the cache that this fills
can be shipped (`PYINFER_WORKSPACE_BASE`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.errors import fail
from pyinfer.jit import env
from pyinfer.jit.spec import JitSpec, build_jit_specs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyinfer.jit.compiler import Artifact

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}


@dataclass(frozen=True)
class ModelConfig:
    """What decides the kernels of a decoder-only transformer on one GPU (heads and sizes are those of its share under tensor parallelism).

    Attributes
    ----------
    num_qo_heads, num_kv_heads, head_dim
        Attention: 64, 128 or 256 elements a head, any number of query heads per key head.
    hidden_size
        Row length of the norms.
    intermediate_size
        Row length of the gated activation's result.
    dtype
        Of weights, activations and KV cache: "float16" or "bfloat16".
    logits_dtype
        Of what is sampled from.
    activation
        "silu", "gelu" or "gelu_tanh" (transformers' names are understood).
    logits_soft_cap
        Soft cap of the attention logits; 0 for none.
    gemma_norm
        Whether norms multiply by weight + 1.
    qk_norm
        Whether queries and keys are normalised head by head.
    rotary_dim
        Rotated elements of a head; 0 for all of them.
    rope_interleave
        Whether pairs of neighbours are rotated, not the two halves of a head.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    dtype: str = "bfloat16"
    logits_dtype: str = "float32"
    activation: str = "silu"
    logits_soft_cap: float = 0.0
    gemma_norm: bool = False
    qk_norm: bool = False
    rotary_dim: int = 0
    rope_interleave: bool = False

    def __post_init__(self) -> None:
        for name in ("num_qo_heads", "num_kv_heads", "head_dim", "hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                fail("ModelConfig", name, "is no size", repr(value), "a positive integer")
        if self.num_qo_heads % self.num_kv_heads:
            fail(
                "ModelConfig",
                "num_qo_heads",
                "is no multiple of num_kv_heads",
                self.num_qo_heads,
                f"a multiple of {self.num_kv_heads}",
            )
        if self.activation not in _ACTIVATIONS:
            fail("ModelConfig", "activation", "is unknown", repr(self.activation), "one of " + ", ".join(_ACTIVATIONS))
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            fail(
                "ModelConfig",
                "rotary_dim",
                "is out of range",
                self.rotary_dim,
                f"an even number up to head_dim {self.head_dim}",
            )
        for name in ("dtype", "logits_dtype"):
            canonical_dtype(getattr(self, name), "ModelConfig", name)

    @classmethod
    def of(cls, model: ModelConfig | Mapping[str, Any] | Any, **changes: Any) -> ModelConfig:
        """A ModelConfig from one, from a mapping, or from the config object of a transformers model.

        Parameters
        ----------
        model
            Its names are those of this class, or transformers' (`num_attention_heads`, `num_key_value_heads`, `hidden_act`, ...).
        changes
            Values that go before the model's.
        """
        if isinstance(model, ModelConfig):
            found: dict[str, Any] = {f.name: getattr(model, f.name) for f in fields(cls)}
        else:
            found = _from_transformers(model)
        found.update(changes)
        missing = [f.name for f in fields(cls)[:5] if found.get(f.name) is None]
        if missing:
            fail(
                "warmup",
                "model",
                "does not say everything",
                f"no {', '.join(missing)}",
                "a ModelConfig, or a config with those names",
                "Pass them by name.",
            )
        return cls(**found)


def _from_transformers(model: Any) -> dict[str, Any]:
    def get(*names: str) -> Any:
        for name in names:
            value = model.get(name) if isinstance(model, Mapping) else getattr(model, name, None)
            if value is not None:
                return value
        return None

    found: dict[str, Any] = {f.name: get(f.name) for f in fields(ModelConfig)}
    found["num_qo_heads"] = get("num_qo_heads", "num_attention_heads")
    found["num_kv_heads"] = get("num_kv_heads", "num_key_value_heads", "num_attention_heads")
    if found["head_dim"] is None and found["hidden_size"] and found["num_qo_heads"]:
        found["head_dim"] = found["hidden_size"] // found["num_qo_heads"]
    found["activation"] = get("activation", "hidden_activation", "hidden_act")
    found["logits_soft_cap"] = get("logits_soft_cap", "attn_logit_softcapping")
    dtype = get("dtype", "torch_dtype")
    found["dtype"] = None if dtype is None else str(dtype).removeprefix("torch.")
    partial = get("partial_rotary_factor")
    if found["rotary_dim"] is None and partial is not None and found["head_dim"]:
        found["rotary_dim"] = int(found["head_dim"] * partial)
    kind = str(get("model_type") or "")
    if found["gemma_norm"] is None and kind.startswith(("gemma", "qwen3_next")):
        found["gemma_norm"] = True
    if found["qk_norm"] is None and kind.startswith(("qwen3", "gemma3", "olmo2")):
        found["qk_norm"] = True
    return {name: value for name, value in found.items() if value is not None}


def model_specs(model: ModelConfig, arch: int) -> list[JitSpec]:
    """The kernels that a model's operators take on one architecture, for tensors aligned to 16 bytes (as allocators give them).

    Parameters
    ----------
    model
        The model.
    arch
        Architecture number (80, 89, 90, ...): attention kernels are cut to the shared memory there is.

    Raises
    ------
    TypeError, ValueError
        If no CUDA kernel supports the model: the attention's own message.
    """
    specs = _attention(model, arch) + _rows(model) + _cache(model) + _sampling(model)
    return [s for s in dict.fromkeys(specs) if s.suits(arch)]


def _attention(model: ModelConfig, arch: int) -> list[JitSpec]:
    from pyinfer.jit import attention_sm90
    from pyinfer.jit.attention import DECODE_ROWS, SOURCES, attention_config, gen_attention, planned_decode_specs
    from pyinfer.jit.cascade import gen_merge_state, gen_merge_states
    from pyinfer.jit.replan import all_specs as all_replan_specs

    group = model.num_qo_heads // model.num_kv_heads
    dim, variant = model.head_dim, "softcap" if model.logits_soft_cap > 0 else "plain"
    # A request has at least `group` packed rows; past 64 the configuration no longer changes.
    sizes = [rows for rows in (DECODE_ROWS, 64) if rows >= group] + [1 << 20]
    configs = [attention_config(arch, model.dtype, dim, dim, rows) for rows in sizes]
    specs = [gen_attention(c, model.dtype, dim, dim, source, variant) for c in configs for source in SOURCES]
    if group <= DECODE_ROWS:
        specs += planned_decode_specs(arch, model.dtype, dim, dim, variant)
    specs += all_replan_specs()
    for source in SOURCES:
        specs += attention_sm90.reachable_specs(arch, model.dtype, dim, dim, source, variant)
    return [*specs, gen_merge_state(model.dtype, dim), gen_merge_states(model.dtype, dim)]


def _rows(model: ModelConfig) -> list[JitSpec]:
    from pyinfer.jit.activation import gen_act_and_mul
    from pyinfer.jit.norm import gen_fused_add_rmsnorm, gen_rmsnorm
    from pyinfer.jit.rope import MANY_TOKENS, MODES, gen_rope, rope_config

    specs = [
        gen(model.dtype, model.hidden_size, gemma=model.gemma_norm) for gen in (gen_rmsnorm, gen_fused_add_rmsnorm)
    ]
    if model.qk_norm:
        specs.append(gen_rmsnorm(model.dtype, model.head_dim, gemma=model.gemma_norm))
    specs.append(gen_act_and_mul(_ACTIVATIONS[model.activation], model.dtype, model.intermediate_size))
    heads, rotary_dim = model.num_qo_heads + model.num_kv_heads, model.rotary_dim or model.head_dim
    vec = min(8, rotary_dim // 2 & -(rotary_dim // 2))
    configs = dict.fromkeys(rope_config(rotary_dim // 2 // vec, heads, tokens) for tokens in (1, MANY_TOKENS))
    return specs + [
        gen_rope(mode, model.dtype, rotary_dim, model.rope_interleave, heads, vec, c) for mode in MODES for c in configs
    ]


def _cache(model: ModelConfig) -> list[JitSpec]:
    from pyinfer.jit.page import gen_append, gen_batch_positions, gen_seq_lens

    row = model.head_dim * canonical_dtype(model.dtype).itemsize
    access = min(16, row & -row)
    return [gen_append(access, model.num_kv_heads, row // access), gen_batch_positions(), gen_seq_lens()]


def _sampling(model: ModelConfig) -> list[JitSpec]:
    from pyinfer.jit.sampling import FILTERS, gen_mask_logits, gen_renorm, gen_sample, gen_softmax

    # softmax and the renormalisations give float32, whatever they take.
    specs = [gen_sample("float32", "probs", f) for f in FILTERS]
    specs += [gen_sample(model.logits_dtype, "logits", f) for f in FILTERS if f != "min_p"]
    return [*specs, gen_softmax(model.logits_dtype), gen_mask_logits(model.logits_dtype), gen_renorm("float32")]


def warmup(
    model: ModelConfig | Mapping[str, Any] | Any = None,
    *,
    archs: Iterable[str] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int, Artifact], None] | None = None,
    **values: Any,
) -> list[Artifact]:
    """Compile every kernel that serving a model can reach. What the cache holds is not compiled again.

    Parameters
    ----------
    model
        A ModelConfig, a mapping, or the config object of a transformers model.
    archs
        Architectures, e.g. ["9.0"]; default: the arch list, this machine's GPUs, or without a GPU all supported. Given, no GPU is needed.
    threads
        Worker threads (about 40 MB of memory each); default the number of CPUs, at most 8.
    progress
        Called as progress(done, total, artifact) after each kernel.
    values
        Fields of ModelConfig, instead of or on top of `model`.

    Returns
    -------
    list of Artifact
        The kernels, architecture by architecture.

    Raises
    ------
    TypeError, ValueError
        If no CUDA kernel supports the model, or the configuration is incomplete.
    JitError
        If a kernel does not compile.

    Examples
    --------
    >>> import pyinfer
    >>> built = pyinfer.warmup(num_qo_heads=9, num_kv_heads=3, head_dim=64, hidden_size=576, intermediate_size=1536, archs=["9.0"])  # doctest: +SKIP
    """
    config = ModelConfig.of({} if model is None else model, **values)
    targets = [env.parse_arch(a) for a in archs] if archs is not None else env.default_archs()
    sets = [model_specs(config, env.arch_number(arch)) for arch in targets]
    total = sum(map(len, sets))
    built: list[Artifact] = []
    for arch, specs in zip(targets, sets, strict=True):

        def tell(done: int, _: int, artifact: Artifact, before: int = len(built)) -> None:
            if progress is not None:
                progress(before + done, total, artifact)

        built += build_jit_specs(specs, archs=[arch], threads=threads, progress=tell)
    return built
