"""LogitsPipe: one by one and fused give the same tokens, which are those of the samplers; results against float64; refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from pyinfer import sampling as S
from pyinfer.logits_processor import (
    CompileError,
    Compiler,
    FusionRule,
    LegalizationError,
    LogitsPipe,
    LogitsProcessor,
    MinP,
    Op,
    ParameterizedOp,
    Sample,
    Softmax,
    TaggedTensor,
    Temperature,
    TensorType,
    TopK,
    TopP,
    compile_pipeline,
    legalize_processors,
)
from pyinfer.logits_processor.operators import ProbsSampleOp, SoftmaxOp, TemperatureOp
from tests.arrays import assert_close, assert_same_bits
from tests.reference import sampling as ref
from tests.sampling_inputs import ints, spread_probs

LOGITS, PROBS, INDICES = TensorType.LOGITS, TensorType.PROBS, TensorType.INDICES
HEADS = {
    "logits": [],
    "softmax": [Softmax()],
    "temperature": [Temperature(), Softmax()],
    "top_k of logits": [TopK(), Softmax()],
    "temperature, top_k of logits": [Temperature(), TopK(), Softmax()],
    "probs": [],
}
FILTERS = {
    "": [],
    "k": [TopK()],
    "p": [TopP()],
    "m": [MinP()],
    "kp": [TopK(), TopP()],
    "joint": [TopK(joint_topk_topp=True), TopP()],
    "joint alone": [TopK(joint_topk_topp=True)],
    "pk": [TopP(), TopK()],
    "kpm": [TopK(), TopP(), MinP()],
    "mkp": [MinP(), TopK(), TopP()],
    "joint m": [TopK(joint_topk_topp=True), TopP(), MinP()],
}


def parameters(b, rng, rows, vocab, per_row):
    """temperature, top_k, top_p, min_p: numbers, or tensors of one value a row."""
    if not per_row:
        return dict(temperature=0.7, top_k=int(rng.integers(1, vocab)), top_p=0.8, min_p=0.05)
    k = rng.integers(1, vocab, rows)
    k[0] = 1
    t = rng.random(rows) + 0.2
    return dict(
        temperature=b.array(t, "float32"), top_k=b.array(k, "int32"),
        top_p=b.array(rng.random(rows), "float32"), min_p=b.array(rng.random(rows) / 2, "float32"),
    )  # fmt: skip


def used(processors, given):
    names = {"Temperature": "temperature", "TopK": "top_k", "TopP": "top_p", "MinP": "min_p"}
    return {names[type(p).__name__]: given[names[type(p).__name__]] for p in processors if type(p).__name__ in names}


def inputs(b, rng, head, rows, vocab, dtype="float32"):
    """Logits or probabilities, with ties and tokens that never come."""
    x = rng.standard_normal((rows, vocab)) * rng.choice([0.3, 2, 6], (rows, 1))
    x[:, : vocab // 4] = np.round(x[:, : vocab // 4])
    x[rng.random(x.shape) < 0.1] = -np.inf
    x[:, 0] = 0.5
    return b.array(x, dtype) if head != "probs" else b.array(ref.softmax(x), dtype)


@pytest.mark.parametrize("per_row", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("head", HEADS)
def test_fused_and_one_by_one_draw_the_same_tokens(backend, rng, head, per_row):
    rows, vocab = 7, 300
    for name, filters in FILTERS.items():
        if head == "logits" and name:
            continue  # filters of probabilities
        processors = [*HEADS[head], *filters, Sample()]
        x = inputs(backend, rng, head, rows, vocab)
        given = used(processors, parameters(backend, rng, rows, vocab, per_row))
        given |= dict(seed=backend.array(ints(rng, rows)), offset=int(rng.integers(1000)))
        kind = PROBS if head == "probs" else LOGITS
        fused, plain = (LogitsPipe(processors, compile=c, input_type=kind) for c in (True, False))
        assert plain.compiled_ops is None and len(plain.ops) == len(processors)
        got, want = fused(x, **given), plain(x, **given)
        assert backend.is_own(got) and backend.numpy(got).dtype == np.int32
        assert_same_bits(backend.numpy(got), backend.numpy(want), f"{head} {name}")


@pytest.mark.parametrize("name", ["", "k", "p", "m", "kp", "joint"])
@pytest.mark.parametrize("head", ["softmax", "temperature", "probs"])
def test_tokens_are_those_of_the_samplers(backend, rng, head, name):
    rows, vocab = 9, 500
    x = inputs(backend, rng, head, rows, vocab)
    g = parameters(backend, rng, rows, vocab, True)
    same = dict(seed=17, offset=3)
    p = x if head == "probs" else S.softmax(x, g["temperature"] if head == "temperature" else None)
    want = {
        "": lambda: S.sampling_from_probs(p, **same),
        "k": lambda: S.top_k_sampling_from_probs(p, g["top_k"], **same),
        "p": lambda: S.top_p_sampling_from_probs(p, g["top_p"], **same),
        "m": lambda: S.min_p_sampling_from_probs(p, g["min_p"], **same),
        "kp": lambda: S.top_k_top_p_sampling_from_probs(p, g["top_k"], g["top_p"], **same),
        "joint": lambda: S.top_k_top_p_sampling_from_probs(p, g["top_k"], g["top_p"], filter_apply_order="joint", **same),
    }[name]()  # fmt: skip
    processors = [*HEADS[head], *FILTERS[name], Sample()]
    pipe = LogitsPipe(processors, input_type=PROBS if head == "probs" else LOGITS)
    assert_same_bits(backend.numpy(pipe(x, **used(processors, g), **same)), backend.numpy(want))


FUSED = {
    ("temperature", "kp"): ["FusedTemperatureSoftmaxOp", "FusedProbsTopKTopPSampleOp"],
    ("temperature", "joint"): ["FusedTemperatureSoftmaxOp", "FusedProbsTopKTopPSampleOp"],
    ("softmax", "kp"): ["FusedSoftmaxSampleOp"],
    ("softmax", ""): ["FusedSoftmaxSampleOp"],
    ("softmax", "m"): ["SoftmaxOp", "FusedProbsMinPSampleOp"],
    ("probs", "k"): ["FusedProbsTopKSampleOp"],
    ("probs", "p"): ["FusedProbsTopPSampleOp"],
    ("probs", "m"): ["FusedProbsMinPSampleOp"],
    ("probs", "kpm"): ["ProbsTopKOp", "TopPOp", "FusedProbsMinPSampleOp"],
    ("probs", ""): ["ProbsSampleOp"],
}


@pytest.mark.cpu
@pytest.mark.parametrize(("head", "name"), FUSED)
def test_what_is_fused(head, name):
    pipe = LogitsPipe([*HEADS[head], *FILTERS[name], Sample()], input_type=PROBS if head == "probs" else LOGITS)
    assert [type(op).__name__ for op in pipe.compiled_ops] == FUSED[head, name]
    assert repr(pipe).endswith(f"runs [{' -> '.join(FUSED[head, name])}])")


@pytest.mark.cpu
def test_a_fused_pipeline_stores_nothing_in_between(monkeypatch, rng):
    """Logits to ids is one call of one kernel."""
    calls = []
    for f in (
        "softmax",
        "top_k_renorm_probs",
        "top_p_renorm_probs",
        "sampling_from_probs",
        "top_k_top_p_sampling_from_logits",
    ):
        original = getattr(S, f)
        monkeypatch.setattr(S, f, lambda *a, f=f, original=original, **k: calls.append(f) or original(*a, **k))
    x = rng.standard_normal((3, 50)).astype(np.float32)
    LogitsPipe([Softmax(), TopK(), TopP(), Sample()])(x, top_k=5, top_p=0.9, seed=1)
    assert calls == ["top_k_top_p_sampling_from_logits"]


# ---- what is no sample -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_probabilities_against_float64(backend, rng, dtype, compile):
    rows, vocab = 5, 200
    x = inputs(backend, rng, "logits", rows, vocab, dtype)
    x64 = backend.float64(x)
    g = parameters(backend, rng, rows, vocab, True)
    t, k, q, m = (backend.float64(g[name]) for name in ("temperature", "top_k", "top_p", "min_p"))
    t32 = t.reshape(-1, 1)

    def run(processors, data=x, kind=LOGITS):
        return backend.float64(LogitsPipe(processors, compile=compile, input_type=kind)(data, **used(processors, g)))

    with np.errstate(invalid="ignore"):
        assert_close(run([Temperature()]), x64 / t32, rtol=1e-6)
    assert_close(run([Softmax()]), ref.softmax(x64), rtol=2e-6)
    assert_close(run([Temperature(), Softmax()]), ref.softmax(x64, t), rtol=4e-6)
    largest = -np.sort(-x64, axis=1)
    edge = largest[np.arange(rows), k.astype(int) - 1][:, None]
    assert_close(run([TopK()]), np.where(x64 >= edge, x64, -np.inf), rtol=0)
    p = backend.array(ref.softmax(x64), "float32")
    p32 = backend.numpy(p)
    for name in ("k", "p", "m", "kp", "joint", "joint m"):
        want = np.zeros((rows, vocab))
        for r in range(rows):
            keep = ref.kept(
                p32[r], int(k[r]) if name[0] in "kj" else None, q[r] if name not in ("k", "m") else 1.0, m[r] if name == "m" else 0.0, "joint" in name
            )  # fmt: skip
            want[r] = ref.renorm(p32[r], keep)
            if name == "joint m":
                want[r] = ref.renorm(want[r], want[r] >= np.float32(m[r]) * want[r].max())
        assert_close(run(FILTERS[name], p, PROBS), want, rtol=3e-6, name=name)


def test_temperature_zero_is_an_infinite_one(backend):
    x = backend.array([[1.0, -np.inf, 3.0], [2.0, 0.0, 1.0]], "float32")
    want = [[0.0, -np.inf, 0.0], [2.0, 0.0, 1.0]]
    np.testing.assert_array_equal(
        backend.numpy(LogitsPipe([Temperature()])(x, temperature=backend.array([0.0, 1.0], "float32"))), want
    )
    np.testing.assert_array_equal(backend.numpy(LogitsPipe([Temperature()])(x, temperature=0))[0], want[0])
    for compile in (False, True):
        got = backend.numpy(LogitsPipe([Temperature(), Softmax()], compile=compile)(x, temperature=0.0))
        np.testing.assert_allclose(got[0], [0.5, 0, 0.5])


# ---- runtime parameters ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("compile", [False, True])
def test_indices_and_parameters_of_rows(backend, rng, compile):
    """A parameter of one value a row goes with the row, also where there are as many outputs."""
    rows, vocab = 6, 100
    p = inputs(backend, rng, "probs", rows, vocab)
    which = rng.integers(0, rows, 6)
    index = backend.array(which.astype(np.int32))
    g = parameters(backend, rng, rows, vocab, True)
    seed = backend.array(ints(rng, 6))
    for name in ("k", "p", "m", "kp", "joint"):
        pipe = LogitsPipe([*FILTERS[name], Sample()], compile=compile, input_type=PROBS)
        given = used(FILTERS[name], g)
        picked = {n: backend.array(backend.numpy(v)[which]) for n, v in given.items()}
        got = pipe(p, indices=index, seed=seed, **given)
        want = pipe(backend.array(backend.numpy(p)[which]), seed=seed, **picked)
        assert_same_bits(backend.numpy(got), backend.numpy(want), name)


def test_generator(device, backend_arrays, rng):
    import torch

    x = inputs(backend_arrays, rng, "logits", 32, 200)
    processors = [Temperature(), Softmax(), TopK(), TopP(), Sample()]
    got = []
    for compile in (True, False):
        generator = torch.Generator(device).manual_seed(5)
        pipe = LogitsPipe(processors, compile=compile)
        runs = [pipe(x, temperature=1.5, top_k=50, top_p=0.9, generator=generator) for _ in range(2)]
        assert (backend_arrays.numpy(runs[0]) != backend_arrays.numpy(runs[1])).any()
        got.append(np.stack([backend_arrays.numpy(r) for r in runs]))
    assert_same_bits(got[0], got[1])


@pytest.mark.cpu
def test_parameters_given_at_construction(rng):
    x = rng.standard_normal((3, 40)).astype(np.float32)
    fixed = LogitsPipe([Temperature(temperature=0.5), Softmax(), TopK(top_k=3), Sample()])
    free = LogitsPipe([Temperature(), Softmax(), TopK(), Sample()])
    assert_same_bits(fixed(x, seed=4), free(x, temperature=0.5, top_k=3, seed=4))
    assert_same_bits(fixed(x, top_k=1, seed=4), x.argmax(1).astype(np.int32))  # what is given later counts


@pytest.mark.cpu
def test_chi_square_of_three_filters(rng):
    """An order that no kernel has."""
    p = spread_probs(rng, 1, 40, 0.5)
    keep = ref.kept(p[0], min_p=0.3)
    first = ref.renorm(p[0], keep).astype(np.float32)
    second = ref.renorm(first, ref.kept(first, None, 0.9)).astype(np.float32)
    want = ref.renorm(second, ref.kept(second, 8))
    draws = 100_000
    pipe = LogitsPipe([MinP(), TopP(), TopK(), Sample()])
    ids = pipe(p, min_p=0.3, top_p=0.9, top_k=8, indices=np.zeros(draws, np.int32), seed=int(rng.integers(2**62)))
    observed = np.bincount(ids, minlength=40)
    assert not observed[want == 0].any() and (want > 0).sum() > 3
    assert ref.chi_square_sigmas(observed[want > 0], want[want > 0] * draws) < 5


# ---- your own --------------------------------------------------------------------------------------------------------
class BiasOp(ParameterizedOp):
    """Adds to the logits of some tokens."""

    IN, OUT, reads = LOGITS, LOGITS, ("bias",)

    def __call__(self, tensor, **kwargs):
        self._validate_input_type(tensor)
        return TaggedTensor.logits(tensor.data + self._get_param("bias", kwargs))


class Bias(LogitsProcessor):
    def legalize(self, input_type):
        if input_type is not LOGITS:
            raise LegalizationError(f"Bias takes LOGITS, got {input_type}")
        return [BiasOp(**self.params)]


class BiasedSoftmaxOp(Op):
    """What a fusion rule of one's own puts in the place of two."""

    IN, OUT, reads = LOGITS, PROBS, ("bias",)

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __call__(self, tensor, **kwargs):
        return TaggedTensor.probs(S.softmax(tensor.data + kwargs["bias"]))


@pytest.mark.parametrize("compile", [False, True])
def test_your_own_processor(backend, rng, compile):
    x = inputs(backend, rng, "logits", 4, 60)
    bias = backend.array(rng.standard_normal((1, 60)), "float32")
    pipe = LogitsPipe([Bias(), Temperature(), Softmax(), TopK(), Sample()], compile=compile)
    assert pipe.initial_type is LOGITS
    want = S.top_k_sampling_from_probs(S.softmax(x + bias, 0.5), 7, seed=3)
    assert_same_bits(backend.numpy(pipe(x, bias=bias, temperature=0.5, top_k=7, seed=3)), backend.numpy(want))
    # Between two that would share one kernel: what it returns is what counts.
    pipe = LogitsPipe([Temperature(), Bias(), Softmax(), Sample()], compile=compile)
    scaled = LogitsPipe([Temperature()])(x, temperature=0.5)
    want = S.sampling_from_probs(S.softmax(scaled + bias), seed=3)
    assert_same_bits(backend.numpy(pipe(x, bias=bias, temperature=0.5, seed=3)), backend.numpy(want))


@pytest.mark.cpu
def test_your_own_fusion_rule_and_check(rng):
    rule = FusionRule((BiasOp, SoftmaxOp), lambda window: True, BiasedSoftmaxOp, prio=1000)
    processors = [Bias(), Softmax(), TopK(), Sample()]
    pipe = LogitsPipe(processors, custom_fusion_rules=[rule])
    assert [type(op).__name__ for op in pipe.compiled_ops] == ["BiasedSoftmaxOp", "FusedProbsTopKSampleOp"]
    x, bias = rng.standard_normal((4, 60)).astype(np.float32), rng.standard_normal((1, 60)).astype(np.float32)
    assert_same_bits(pipe(x, bias=bias, top_k=9, seed=3), LogitsPipe(processors)(x, bias=bias, top_k=9, seed=3))
    never = FusionRule((BiasOp, SoftmaxOp), lambda window: False, BiasedSoftmaxOp, prio=1000)
    assert isinstance(LogitsPipe(processors, custom_fusion_rules=[never]).compiled_ops[0], BiasOp)

    def must_sample(ops):
        if ops[-1].OUT is not INDICES:
            raise CompileError("no Sample at the end")

    LogitsPipe(processors, custom_validity_checks=[must_sample])
    for compile in (True, False):
        with pytest.raises(CompileError, match="no Sample at the end"):
            LogitsPipe([Softmax()], compile=compile, custom_validity_checks=[must_sample])
    compiler = Compiler()
    compiler.register_fusion_rule(FusionRule((SoftmaxOp, ProbsSampleOp), build=lambda window: window[0], prio=1000))
    with pytest.raises(
        CompileError,
        match=r"SoftmaxOp stands for SoftmaxOp -> ProbsSampleOp: got LOGITS -> PROBS, wanted LOGITS -> INDICES",
    ):
        compiler.compile(legalize_processors([Softmax(), Sample()], LOGITS))
    compiler = Compiler()
    compiler.register_fusion_rule(FusionRule((SoftmaxOp,), build=lambda window: window[0], prio=1000))
    with pytest.raises(CompileError, match="SoftmaxOp is built from itself: got a rule without end"):
        compiler.compile([SoftmaxOp()])


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.cpu
@pytest.mark.parametrize("compile", [False, True])
def test_pipelines_that_are_none(compile):
    class Nothing(LogitsProcessor):
        def legalize(self, input_type):
            return []

    class Picky(LogitsProcessor):
        def legalize(self, input_type):
            raise ValueError("not today")

    for processors, kind, text in (
        ([], None, "LogitsPipe: processors are missing: got an empty list, wanted one or more."),
        (
            [TopK],
            None,
            "processors hold something else: got TopK at place 0, wanted instances of LogitsProcessor. Write TopK(), not TopK.",
        ),
        ([Softmax()], INDICES, "input_type is no input: got INDICES, wanted TensorType.LOGITS"),
        (
            [TopK(), Sample()],
            None,
            "input_type is needed: got None, wanted TensorType.LOGITS or TensorType.PROBS, for TopK takes both.",
        ),
        ([Sample()], None, "for Sample takes both"),
        ([TopP(), Softmax()], None, "Softmax cannot stand here: got PROBS, wanted LOGITS."),
        ([Softmax(), Temperature()], None, "Temperature cannot stand here: got PROBS, wanted LOGITS."),
        ([Temperature(), TopP()], None, "TopP cannot stand here: got LOGITS, wanted PROBS."),
        ([Softmax()], PROBS, "Softmax cannot stand here: got PROBS, wanted LOGITS."),
        ([MinP(), Sample(), TopK()], None, "TopK cannot stand here: got INDICES, wanted LOGITS or PROBS."),
        ([Picky()], None, "Picky comes first: got a processor that takes neither LOGITS nor PROBS"),
        ([Softmax(), Picky()], None, "processor 1 (Picky): not today"),
        ([Softmax(), Nothing()], None, "processor 1 (Nothing): got no operators, wanted one or more."),
    ):
        with pytest.raises(ValueError) as info:
            LogitsPipe(processors, compile=compile, input_type=kind)
        assert text in str(info.value)


class BackOp(Op):
    """Probabilities into logits."""

    IN, OUT = PROBS, LOGITS

    def __call__(self, tensor, **kwargs):
        return TaggedTensor.logits(np.log(tensor.data))


class FromIdsOp(Op):
    IN, OUT = INDICES, INDICES

    def __call__(self, tensor, **kwargs):
        return tensor


@pytest.mark.cpu
def test_operators_that_make_no_pipeline():
    for ops, text in (
        ([], "operators: got none, wanted one or more."),
        ([FromIdsOp()], "FromIdsOp comes first: got token ids as its input, wanted LOGITS or PROBS."),
        (
            [ProbsSampleOp(), FromIdsOp()],
            r"ProbsSampleOp gives token ids: got 1 operators behind it \(FromIdsOp, ...\), wanted none.",
        ),
        (
            [SoftmaxOp(), BackOp(), SoftmaxOp()],
            "operators from logits to probabilities: got 2, wanted one Softmax at most.",
        ),
        (
            [SoftmaxOp(), TemperatureOp()],
            r"operator 1 \(TemperatureOp\) does not fit operator 0 \(SoftmaxOp\): got PROBS, wanted LOGITS.",
        ),
    ):
        with pytest.raises(CompileError, match=text):
            compile_pipeline(ops)
    with pytest.raises(ValueError, match="FusionRule: got pattern"):
        FusionRule((SoftmaxOp,))

    class Untyped(BackOp):
        IN = None

    with pytest.raises(ValueError, match="Untyped: IN is missing: got None, wanted a TensorType"):
        Untyped()


@pytest.mark.parametrize("compile", [False, True])
def test_bad_arguments_of_a_run(backend, rng, compile):
    x = inputs(backend, rng, "logits", 3, 50)
    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), Sample()], compile=compile)
    good = dict(temperature=1.0, top_k=5)

    def refused(text, x=x, **kwargs):
        with pytest.raises(ValueError) as info:
            pipe(x, **kwargs)
        assert text in str(info.value)

    refused("temperature is missing: got None, wanted a value: pipe(x, temperature=...)", top_k=5)
    refused("top_k is missing", temperature=1.0)
    refused(
        "LogitsPipe: top_p is read by no processor of this pipeline: got a value, wanted only: check_nan, generator, indices",
        **good,
        top_p=0.9,
    )
    refused("temperature", temperature=-1.0, top_k=5)
    refused("top_k", temperature=1.0, top_k=0)
    refused("x is of the wrong type: got PROBS, wanted LOGITS", TaggedTensor.probs(x), **good)
    refused("operator 0 (", backend.array(np.ones((3, 50)), "int32"), **good)
    bad = backend.numpy(x).copy()
    bad[1, 2] = np.nan
    refused(
        "cannot be sampled: got NaN or nothing to draw from at output 1",
        backend.array(bad, "float32"),
        **good,
        check_nan=True,
    )
    assert backend.is_own(pipe(TaggedTensor.logits(x), **good))
    with pytest.raises(ValueError, match="tensor is of the wrong type: got PROBS, wanted LOGITS"):
        TemperatureOp()(TaggedTensor.probs(x), temperature=1.0)
    with pytest.raises(ValueError, match=r"temperature is negative or NaN: got -1.0, wanted 0 or more"):
        TemperatureOp()(TaggedTensor.logits(x), temperature=-1.0)
    if backend.device == "cpu":
        with pytest.raises(ValueError, match="temperature is negative or NaN"):
            TemperatureOp()(TaggedTensor.logits(x), temperature=backend.array([1.0, -1.0, 1.0], "float32"))


@pytest.mark.cpu
def test_other_objects_are_refused():
    class Foreign:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **kwargs):
            return self.x.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    with pytest.raises(
        ValueError, match=r"x is of another framework: got .*Foreign, wanted a torch, CuPy or NumPy array"
    ):
        LogitsPipe([Temperature()])(Foreign(np.ones((2, 4), np.float32)), temperature=1.0)


@pytest.mark.cpu
def test_names_and_types():
    for kind, other in itertools.permutations((LOGITS, PROBS), 2):
        t = {LOGITS: TaggedTensor.logits, PROBS: TaggedTensor.probs}[kind](np.ones((2, 4), np.float32))
        assert (
            t.type is kind is not other and t.shape == t.size() == (2, 4) and t.size(1) == 4 and t.dtype == np.float32
        )
    assert TaggedTensor.indices(np.ones(3, np.int32)).type is INDICES
    assert repr(TaggedTensor.indices(np.ones(3, np.int32))) == "TaggedTensor(INDICES, (3,), int32)"
    assert str(LOGITS) == "LOGITS" and repr(LOGITS) == "TensorType.LOGITS"
    assert repr(TopK(top_k=4)) == "TopK(joint_topk_topp=False, top_k=4)"
    assert repr(SoftmaxOp()) == "SoftmaxOp(LOGITS -> PROBS)"
