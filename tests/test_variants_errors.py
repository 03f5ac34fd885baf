"""What a variant cannot be, in words: every message of pyinfer.variants, its source rewriting and FlashInfer's form of it."""

# ruff: noqa: E501 - the tables below hold one case a line

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyinfer
from pyinfer import AttentionVariant
from pyinfer._variant_source import called, rewrite
from pyinfer.jit.customize import (
    custom_module,
    gen_customize_batch_decode_module,
    gen_customize_batch_prefill_module,
    gen_customize_single_decode_module,
    gen_customize_single_prefill_module,
)
from tests.test_variants_compile import EVEN, EVEN_ARGS, F16

TABLE = np.arange(4)
BIG = 2**40


def recursive(score: float) -> float:
    return recursive(score) if score > 0 else score


def with_list(score: list) -> float:
    return 1.0


def of_two(a: float, b: float) -> float:
    return a + b


def shadowing(score):
    _mul = score
    return _mul * 2


def deleted(score):
    del score


def unpacked(score, kv_idx):
    a, b = kv_idx
    return score + a + b


def looped(score):
    for x in (1, 2):
        score += x
    return score


def closure() -> Callable[..., Any]:
    def inner(score):
        return score * later

    if math.pi < 3:
        later = 2.0
    return inner


CASES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # ---- the object
    "name": (lambda: AttentionVariant("a b", mask=lambda q_idx: q_idx > 0), ValueError, "name is no name: got 'a b', wanted letters"),
    "nothing": (lambda: AttentionVariant("x"), ValueError, "functions are missing: got none, wanted any of query, logits, mask, output"),
    "unknown argument": (
        lambda: AttentionVariant("x", logits=lambda score, cap: score),
        ValueError,
        r"logits asks for an argument that does not exist: got 'cap', wanted any of score, kv_idx, .*Name it in `params`",
    ),
    "argument of another hook": (lambda: AttentionVariant("x", mask=lambda score: score > 0), ValueError, "mask asks for an argument that does not exist: got 'score'"),
    "default": (lambda: AttentionVariant("x", logits=lambda score, a=1: score), ValueError, "logits has an argument that cannot be filled: got 'a=1'"),
    "star": (lambda: AttentionVariant("x", logits=lambda *score: 1), ValueError, r"logits has an argument that cannot be filled: got '\*score'"),
    "no function": (lambda: AttentionVariant("x", logits=math.exp), ValueError, "logits is no Python function: got builtin_function_or_method"),
    "no source": (lambda: AttentionVariant("x", logits=eval("lambda score: score")), ValueError, "logits has no source that can be read"),
    "param type": (lambda: AttentionVariant("x", logits=lambda score: score, params={"a": "float"}), ValueError, r"params\['a'\] is no type: got 'float', wanted 'float32' or 'int32'"),
    "param index": (lambda: AttentionVariant("x", logits=lambda score: score, params={"a": "float32[q]"}), ValueError, r"params\['a'\] is no type"),
    "param name": (lambda: AttentionVariant("x", logits=lambda score: score, params={"a-b": "int32"}), ValueError, "params has a name that is none: got 'a-b'"),
    "param taken": (lambda: AttentionVariant("x", logits=lambda score: score, params={"head": "int32"}), ValueError, "params has a name that is taken: got 'head'"),
    "param underscore": (lambda: AttentionVariant("x", logits=lambda score: score, params={"_mul": "int32"}), ValueError, "params has a name that is taken: got '_mul'"),
    "local name": (lambda: AttentionVariant("x", logits=shadowing), ValueError, "logits has a name that is taken: got '_mul'"),
    "param unused": (lambda: AttentionVariant("x", logits=lambda score: score, params={"a": "int32"}), ValueError, "params has a parameter that no function asks for: got a"),
    "source without hooks": (lambda: AttentionVariant("x", cuda_source="int f();"), ValueError, "cuda_source defines no hook: got none, wanted any of user_query_transform"),
    "source with others": (
        lambda: AttentionVariant("x", logits=lambda score: score, cuda_source="bool user_mask (int);"),
        ValueError,
        "cuda_source defines other hooks: got mask, wanted the hooks that are given as functions: logits",
    ),
    # ---- the function's text
    "statement": (lambda: AttentionVariant("x", logits=deleted), ValueError, r"has a statement that cannot be compiled: got `del score` \(.*test_variants_errors.py:\d+\)"),
    "unpacking": (lambda: AttentionVariant("x", logits=unpacked), ValueError, "has a statement that cannot be compiled: got `a, b = kv_idx`"),
    "loop": (lambda: AttentionVariant("x", logits=looped), ValueError, r"has a loop that cannot be compiled: got `\(1, 2\)`.*for ... in range"),
    "expression": (lambda: AttentionVariant("x", logits=lambda score: [score]), ValueError, r"has an expression that cannot be compiled: got `\[score\]`"),
    "attribute of an argument": (lambda: AttentionVariant("x", logits=lambda score: score.real), ValueError, "has an expression that cannot be compiled: got `score`"),
    "comparison": (lambda: AttentionVariant("x", logits=lambda score: score is None), ValueError, "has a comparison that cannot be compiled"),
    "operator": (lambda: AttentionVariant("x", logits=lambda score: score @ score), ValueError, "has an operator that cannot be compiled"),
    "string": (lambda: AttentionVariant("x", logits=lambda score: "a"), ValueError, "uses a str: got `'a'`"),
    "array": (lambda: AttentionVariant("x", logits=lambda score: score + TABLE), ValueError, "uses a ndarray: got `TABLE`.*other values are parameters"),
    "index": (lambda: AttentionVariant("x", logits=lambda score: TABLE[0]), ValueError, r"has an index that cannot be compiled: got `TABLE\[0\]`"),
    "tensor as a number": (
        lambda: AttentionVariant("x", logits=lambda score, t: score + t, params={"t": "int32[:]"}),
        ValueError,
        r"uses a tensor as a number: got `t`.*an element, t\[index\]",
    ),
    "large number": (lambda: AttentionVariant("x", logits=lambda score: BIG), ValueError, "has a number that does not fit: got `BIG`"),
    "missing name": (lambda: AttentionVariant("x", logits=lambda score: nowhere), ValueError, "uses a name that does not exist: got `nowhere`"),  # noqa: F821
    "missing attribute": (lambda: AttentionVariant("x", logits=lambda score: math.nowhere(score)), ValueError, "uses a name that does not exist: got `math.nowhere`"),
    "unset name": (lambda: AttentionVariant("x", logits=closure()), ValueError, "uses a name that has no value yet: got `later`"),
    "keyword": (lambda: AttentionVariant("x", logits=lambda score: max(score, key=abs)), ValueError, "has a call that cannot be compiled"),
    "call of an argument": (lambda: AttentionVariant("x", logits=lambda score: score(1)), ValueError, r"calls what is no function: got `score\(1\)`"),
    "argument count": (lambda: AttentionVariant("x", logits=lambda score: math.exp(score, 2)), ValueError, r"has a call with the wrong number of arguments: got `math.exp\(score, 2\)`"),
    "own argument count": (lambda: AttentionVariant("x", logits=lambda score: of_two(score)), ValueError, r"wrong number of arguments: got `of_two\(score\)`.*wanted 2"),
    "unknown function": (lambda: AttentionVariant("x", logits=lambda score: math.gamma(score)), ValueError, r"calls a function that cannot be compiled: got `math.gamma\(score\)`.*math.tanh"),
    "recursion": (lambda: AttentionVariant("x", logits=lambda score: recursive(score)), ValueError, "calls itself"),
    "annotation": (lambda: AttentionVariant("x", logits=lambda score: with_list(score)), ValueError, "calls a function with the annotation 'list'.*float, int or bool"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str) -> None:
    make, error, text = CASES[case]
    with pytest.raises(error, match=text):
        make()


BIASED = AttentionVariant(
    "biased",
    logits=lambda score, bias, shift, table, first: score + bias * shift + table[first],
    params={"bias": "float32[head]", "shift": "int32", "table": "int32[:]", "first": "int32[batch]"},
)
GOOD = [np.zeros(2, np.float32), 3, np.zeros(5, np.int32), np.zeros(1, np.int32)]


def run(*args: Any, variant: Any = BIASED, **options: Any) -> Any:
    q, k = np.zeros((1, 2, 16), np.float32), np.zeros((3, 1, 16), np.float32)
    return pyinfer.single_prefill_with_kv_cache(q, k, k, variant=variant, variant_args=args, **options)


def at(i: int, value: Any) -> list[Any]:
    return [*GOOD[:i], value, *GOOD[i + 1 :]]


NO_SOFTMAX = AttentionVariant("plain_sum", use_softmax=False)
RUNS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "too few": (lambda: run(*GOOD[:2]), TypeError, r"\*args do not fit the variant: got 2 extra arguments, wanted 4: bias, shift, table, first"),
    "none wanted": (lambda: run(1.0, variant=AttentionVariant("x", mask=lambda kv_idx: kv_idx > 0)), TypeError, "got 1 extra arguments, wanted 0: none"),
    "length": (lambda: run(*at(0, np.zeros(3, np.float32))), ValueError, r"bias has the wrong length: got 3, wanted 2 \(one for each head\)"),
    "batch length": (lambda: run(*at(3, np.zeros(4, np.int32))), ValueError, r"first has the wrong length: got 4, wanted 1 \(one for each batch\)"),
    "dtype": (lambda: run(*at(0, np.zeros(2))), TypeError, "bias has the wrong dtype|bias .*float64"),
    "axes": (lambda: run(*at(2, np.zeros((2, 2), np.int32))), ValueError, "table .*2.*1"),
    "strides": (lambda: run(*at(2, np.zeros(10, np.int32)[::2])), ValueError, "table is not contiguous"),
    "tensor for a number": (lambda: run(*at(1, np.zeros(1))), TypeError, r"shift is a tensor: got ndarray, wanted a number. Declare shift with '\[:\]'"),
    "no number": (lambda: run(*at(1, "three")), TypeError, "shift is no number: got str, wanted an int"),
    "fraction": (lambda: run(*at(1, 2.5)), ValueError, "shift does not fit int32: got 2.5"),
    "large": (lambda: run(*at(1, 2**31)), ValueError, "shift does not fit int32"),
    "lse": (lambda: run(variant=NO_SOFTMAX, return_lse=True), ValueError, r"return_lse needs a softmax: got a variant without \(plain_sum\)"),
    "no variant": (lambda: run(variant="softcap"), TypeError, "variant is no variant: got str, wanted a pyinfer.AttentionVariant"),
    "args alone": (lambda: run(1.0, variant=None), TypeError, "variant_args are not supported: got 1 values, wanted none"),
}  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("case", RUNS)
def test_refused_at_run(case: str) -> None:
    call, error, text = RUNS[case]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.cpu
def test_wrapper_refuses() -> None:
    x = np.zeros((1, 2, 16), np.float32)
    cache = np.zeros((1, 2, 1, 1, 16), np.float32)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(variant=NO_SOFTMAX)
    wrapper.plan([0, 1], [0], [1], 2, 1, 16, 1, q_data_type="float32")
    with pytest.raises(ValueError, match="sinks needs a softmax"):
        wrapper.run(x, cache, sinks=np.zeros(2, np.float32))
    with pytest.raises(TypeError, match="got 1 extra arguments, wanted 0: none"):
        wrapper.run(x, cache, 1.0)
    plain = pyinfer.BatchDecodeWithPagedKVCacheWrapper()
    plain.plan([0, 1], [0], [1], 2, 1, 16, 1, q_data_type="float32")
    with pytest.raises(
        TypeError, match=r"\*args are not supported: got 1 extra arguments, wanted none \(they belong to a variant\)"
    ):
        plain.run(x, cache, 1.0)
    with pytest.raises(TypeError, match="variant is no variant"):
        pyinfer.BatchPrefillWithPagedKVCacheWrapper(variant=3)


@pytest.mark.cpu
def test_batch_attention_refuses() -> None:
    with pytest.raises(
        ValueError, match="BatchAttention: variant has no softmax, and so no LSE to return: got use_softmax=False"
    ):
        pyinfer.BatchAttention(variant=NO_SOFTMAX)
    sizes = dict(max_batch_size=1, max_num_tokens=1, max_num_pages=1)
    with pytest.raises(ValueError, match="BatchAttention: variant does not go with use_cuda_graph: got same"):
        pyinfer.BatchAttention(
            use_cuda_graph=True, variant=AttentionVariant("same", logits=lambda score: score), **sizes
        )
    plain = pyinfer.BatchAttention()
    plain.plan([0, 1], [0, 1], [0], [1], 2, 1, 16, 16, 1, q_data_type="float32", kv_data_type="float32")
    with pytest.raises(TypeError, match="variant_args belong to a variant: got 1 values, wanted none"):
        plain.run(np.zeros((1, 2, 16), np.float32), np.zeros((1, 2, 1, 1, 16), np.float32), variant_args=(1.0,))


@pytest.mark.cpu
def test_what_numba_cannot_type_is_told() -> None:
    def sometimes(score):
        if score > 0:
            return score

    with pytest.raises(ValueError, match="pyinfer_user_logits cannot be compiled"):
        run(variant=AttentionVariant("sometimes", logits=sometimes))


@pytest.mark.cpu
def test_plain_python_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba

    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(ValueError, match=r"logits cannot run as plain Python: got NUMBA_DISABLE_JIT=1.*Unset"):
        AttentionVariant("interpreted", logits=lambda score: score + 0.375).cpu_values("op", [])


# ---- FlashInfer's words ---------------------------------------------------------------------------------------------------------------
def struct(*changed: Any, **options: Any) -> Any:
    args = list(EVEN_ARGS)
    for i, value in zip(changed[::2], changed[1::2], strict=True):
        args[i] = value
    return gen_customize_single_decode_module("even", *F16, 64, 64, *args, **options)


JIT_ARGS = ("even", *F16, "int32", 64, 64, *EVEN_ARGS)
STRUCTS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "uri": (lambda: gen_customize_single_decode_module(3, *F16, 64, 64, *EVEN_ARGS), TypeError, "uri is no string: got int"),
    "name": (lambda: struct(4, None), TypeError, "variant_name is no string: got NoneType"),
    "source": (lambda: struct(5, None), TypeError, "variant_decl is no string: got NoneType, wanted CUDA source"),
    "other struct": (lambda: struct(4, "Odd"), ValueError, "variant_decl does not define the variant: got no struct Odd"),
    "tensor type": (lambda: struct(1, ["half"]), TypeError, "additional_tensor_dtypes has a type that is not supported: got half"),
    "scalar type": (lambda: struct(3, ["bool"]), TypeError, "additional_scalar_dtypes has a type that is not supported: got bool"),
    "names and types": (lambda: struct(1, []), ValueError, "additional_tensor_dtypes does not go with the names: got 0 types, wanted 1"),
    "names and scalar types": (lambda: struct(3, []), ValueError, "additional_scalar_dtypes does not go with the names"),
    "update": (lambda: struct(5, EVEN + "REGISTER_M_D_UPDATE"), ValueError, "has something that is not supported: got REGISTER_M_D_UPDATE.*sinks="),
    "output": (lambda: struct(5, EVEN + "REGISTER_OUTPUT_TRANSFORM"), ValueError, "got REGISTER_OUTPUT_TRANSFORM.*output="),
    "hopper": (lambda: struct(5, EVEN + "params.additional_params.x"), ValueError, "got additional_params.*which all kernels run"),
    "rope": (lambda: struct(pos_encoding_mode=1), ValueError, "pos_encoding_mode is not supported: got 1, wanted 0. A custom variant does that itself"),
    "soft cap": (lambda: struct(use_logits_soft_cap=True), ValueError, "use_logits_soft_cap is not supported: got True"),
    "fp8": (lambda: gen_customize_single_prefill_module("fa2", "even", *F16, 64, 64, *EVEN_ARGS, fp8_enabled=True), ValueError, "fp8_enabled is not supported"),
    "backend": (lambda: gen_customize_single_prefill_module("fa9", "even", *F16, 64, 64, *EVEN_ARGS), ValueError, "backend is not available: got 'fa9'"),
    "index": (lambda: gen_customize_batch_decode_module("even", *F16, "int64", 64, 64, *EVEN_ARGS), TypeError, "dtype_idx is not supported"),
    "prefill index": (lambda: gen_customize_batch_prefill_module("fa2", "even", *F16, "int64", 64, 64, *EVEN_ARGS), TypeError, "dtype_idx is not supported"),
    "jit_args": (lambda: pyinfer.BatchDecodeWithPagedKVCacheWrapper(jit_args=["x"]), ValueError, r"jit_args is not what gen_customize takes: got list of 1, wanted \(uri"),
    "jit_args type": (lambda: pyinfer.BatchPrefillWithRaggedKVCacheWrapper(jit_args="x"), ValueError, "jit_args is not what gen_customize takes: got str"),
    "jit_kwargs": (lambda: pyinfer.BatchDecodeWithPagedKVCacheWrapper(jit_args=JIT_ARGS, jit_kwargs={"fast": 1}), TypeError, "jit_kwargs has an unknown name: got fast"),
    "jit_kwargs of prefill": (
        lambda: pyinfer.BatchDecodeWithPagedKVCacheWrapper(jit_args=JIT_ARGS, jit_kwargs={"fp8_enabled": True}),
        ValueError,
        r"jit_kwargs\['fp8_enabled'\] is not supported",
    ),
    "both": (lambda: pyinfer.BatchDecodeWithPagedKVCacheWrapper(jit_args=JIT_ARGS, variant=NO_SOFTMAX), ValueError, "variant was given twice: got variant and jit_args"),
    "no module": (lambda: custom_module("op", "single_decode", 3), TypeError, "jit_module is no module: got int, wanted what gen_customize_single_decode_module"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRUCTS)
def test_struct_refused(case: str) -> None:
    make, error, text = STRUCTS[case]
    with pytest.raises(error, match=text):
        make()


@pytest.mark.cpu
def test_struct_refused_at_run() -> None:
    x, cache = np.zeros((1, 2, 64), np.float16), np.zeros((1, 2, 1, 1, 64), np.float16)
    wrapper = pyinfer.BatchDecodeWithPagedKVCacheWrapper(jit_args=JIT_ARGS)
    shapes = ([0, 1], [0], [1], 2, 1, 64, 1)
    for options, text in (
        (
            {"logits_soft_cap": 3.0},
            "logits_soft_cap does not go with jit_args: got 3.0, wanted 0.0. The variant does that itself",
        ),
        ({"pos_encoding_mode": "ALIBI"}, "pos_encoding_mode does not go with jit_args"),
    ):
        with pytest.raises(ValueError, match=text):
            wrapper.plan(*shapes, **options)
    with pytest.raises(
        TypeError, match="the module was made for other types: got float16, float16, float16, wanted bfloat16"
    ):
        wrapper.plan(*shapes, q_data_type="bfloat16")
    with pytest.raises(
        ValueError, match=r"the module was made for other head dimensions: got \(64, 64\), wanted \(32, 32\)"
    ):
        wrapper.plan([0, 1], [0], [1], 2, 1, 32, 1)
    wrapper.plan(*shapes)
    with pytest.raises(ValueError, match="variant is CUDA only"):
        wrapper.run(x, cache, None, 0.125)
    with pytest.warns(DeprecationWarning), pytest.raises(ValueError, match="logits_soft_cap does not go with jit_args"):
        wrapper.forward(x, cache, logits_soft_cap=2.0)
    module = struct()
    with pytest.raises(
        ValueError, match="the module was made for another operator: got single_decode, wanted single_prefill"
    ):
        pyinfer.prefill.single_prefill_with_kv_cache_with_jit_module(module, x, cache[0, 0], cache[0, 0], None, 0.125)
    prefill = gen_customize_single_prefill_module("fa2", "even", *F16, 64, 64, *EVEN_ARGS)
    with pytest.raises(ValueError, match=r"mask_mode is not supported: got 2, wanted 0 \(none\) or 1 \(causal\)"):
        pyinfer.prefill.single_prefill_with_kv_cache_with_jit_module(
            prefill, x, cache[0, 0], cache[0, 0], None, 0.125, mask_mode=2
        )
    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        _ = pyinfer.prefill.nowhere


# ---- what the text becomes ------------------------------------------------------------------------------------------------------------
def test_text_is_the_identity() -> None:
    """Constants from outside stand in the text; two lambdas on a line are told apart; helpers come first, and are named by what they do."""
    factor = 2.5
    types = {"score": "f32", "kv_idx": "i32"}
    pair = [lambda score: score * factor, lambda score: score - factor]
    first, second = (rewrite("logits", f, "f", types, "f32")[-1].source for f in pair)
    assert "_mul(score, _f32(2.5))" in first and "_sub(score, _f32(2.5))" in second
    functions = rewrite("logits", lambda score, kv_idx: of_two(score, kv_idx), "f", types, "f32")
    assert len(functions) == 2 and re.fullmatch(r"pyinfer_user_of_two_[0-9a-f]{12}", functions[0].symbol)
    assert (
        called(functions[1].source) == [(functions[0].symbol, ("f32", "f32"), "f32")]
        and called(functions[0].source) == []
    )


def test_edited_since() -> None:
    """A function whose file no longer has it at its line."""
    import linecache

    text = "def old(score):\n    return score\n"
    scope: dict[str, Any] = {}
    exec(compile(text, "<edited>", "exec"), scope)
    other = "def new(score):\n    return 2 * score\n"
    try:
        linecache.cache["<edited>"] = (len(other), None, ("\n" + other).splitlines(True), "<edited>")
        with pytest.raises(
            ValueError,
            match="logits cannot be found in its file: got old, wanted one function that has not been edited",
        ):
            AttentionVariant("x", logits=scope["old"])
        linecache.cache["<edited>"] = (len(text), None, text.splitlines(True), "<edited>")
        assert AttentionVariant("x", logits=scope["old"]).user.hooks == ("logits",)
    finally:
        del linecache.cache["<edited>"]


def test_tensor_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"op: bias is on another device: got cpu, wanted cuda:0 \(where q is\)"):
        BIASED.check_args("op", GOOD, 0, 2, 1, 1)
