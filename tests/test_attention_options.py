"""Every option of the CUDA attention kernels, through the launch functions and against float64: alone, and drawn together.

The wrappers' own tests are in test_options.py; here nothing stands between the case and the kernel. `run_case` takes the device's functions, so that an
emulator can run the same cases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from pyinfer.core.dtypes import canonical_dtype
from pyinfer.core.params import f32, ptr
from pyinfer.core.tensor import view
from pyinfer.jit.attention_options import NO_EXTRAS, AttentionExtras, AttentionOptions, UserVariant
from pyinfer.schedulers.prefill import prefill_plan, single_schedule
from tests.reference.attention import attention

NUMPY = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
BITS = {1: np.uint8, 2: np.int16, 4: np.int32}

BIASED = UserVariant(
    "biased",
    """
PYINFER_DEVICE float user_logits_transform(const Params& p, float logit, const VariantPlace& at) {
    return logit + p.bias[at.qo_head] * (at.q_token + at.kv_token % 3) * p.strength;
}
PYINFER_DEVICE bool user_mask(const Params& p, const VariantPlace& at) {
    return (at.q_token + at.kv_token + at.request) % 2 == 0;
}
PYINFER_DEVICE float user_output_transform(const Params& p, float value, const VariantPlace& at, int column) {
    return value + 0.5f * at.request + 0.25f * at.q_token + at.qo_head + (column % 4 == 3 ? 1.0f : 0.0f);
}
""",
    ("logits", "mask", "output"),
    (ptr("bias", "const float"), f32("strength")),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch and its options; `pads` are elements between the rows of q, of k and v, and of out, `offset` those in front of each."""

    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    out_dtype: str | None = None
    dims: tuple[int, int] = (128, 128)
    qo: tuple[int, ...] = (1, 1)
    kv: tuple[int, ...] = (77, 300)
    kv_heads: int = 2
    group: int = 4
    page_size: int = 16  # 0: ragged
    single: bool = False
    layout: str = "NHD"
    causal: bool = False
    window: int = -1
    soft_cap: float = 0.0
    v_scale: float = 1.0
    alibi: bool = False
    rope: tuple[float, float] | None = None
    mask: bool = False
    items: bool = False
    sinks: bool = False
    user: bool = False
    pads: tuple[int, int, int] = (0, 0, 0)
    offset: int = 0
    sms: int = 16


def strided(shape: tuple[int, ...], dtype: type, pad: int, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """(the memory, a view of it with `pad` elements behind each row), all NaN."""
    row = shape[-1] + pad
    memory = np.full(int(np.prod(shape[:-1])) * row + offset + 16, np.nan, np.float32).astype(dtype)
    bits = memory.view(BITS[memory.itemsize])[offset : offset + int(np.prod(shape[:-1])) * row]
    return memory, bits.reshape(*shape[:-1], row)[..., : shape[-1]].view(dtype)


def run_case(
    case: Case,
    rng: np.random.Generator,
    upload: Callable[[np.ndarray, np.ndarray], Any],
    download: Callable[[Any], np.ndarray],
    stream: int,
) -> None:
    """Run a case twice and compare. `upload(memory, view)` gives a tensor of the device like the view, `download` its values as NumPy."""
    from pyinfer.jit import attention_launch as launch

    c = case
    kv_name, out_name = c.kv_dtype or c.dtype, c.out_dtype or c.dtype
    (qk, vo), batch, heads, hnd = c.dims, len(c.qo), c.kv_heads * c.group, c.layout == "HND"

    def draw(shape: tuple[int, ...], name: str) -> np.ndarray:
        return rng.standard_normal(shape).astype(NUMPY[name])

    def put(x: np.ndarray) -> Any:
        return upload(x, x)

    qo_indptr = np.concatenate([[0], np.cumsum(c.qo)]).astype(np.int32)
    memory, q_host = strided((int(qo_indptr[-1]), heads, qk), NUMPY[c.dtype], c.pads[0], c.offset)
    q_host[...] = draw(q_host.shape, c.dtype)
    q = upload(memory, q_host)
    keys = [draw((n, c.kv_heads, qk), kv_name) for n in c.kv]
    values = [draw((n, c.kv_heads, vo), kv_name) for n in c.kv]

    pages = -(-np.array(c.kv) // max(c.page_size, 1))
    paged = c.page_size > 0 and not c.single
    kv_indptr = np.concatenate([[0], np.cumsum(pages if paged else c.kv)]).astype(np.int32)
    table = rng.permutation(int(kv_indptr[-1]) + 2)[: kv_indptr[-1]].astype(np.int32)
    caches = []
    for rows, dim in ((keys, qk), (values, vo)):
        outer = (len(table) + 2, c.page_size) if paged else (int(kv_indptr[-1]),)
        shape = (*outer[:-1], c.kv_heads, outer[-1], dim) if hnd else (*outer, c.kv_heads, dim)
        memory, host = strided(shape, NUMPY[kv_name], c.pads[1], c.offset)
        by_token = host.swapaxes(-2, -3) if hnd else host
        for b, x in enumerate(rows):
            for t in range(len(x)):
                where = (table[kv_indptr[b] + t // c.page_size], t % c.page_size) if paged else kv_indptr[b] + t
                by_token[where] = x[t]
        caches.append(upload(memory, host))
    k, v = caches

    masks, items, sinks, bias = None, None, None, None
    extras: dict[str, Any] = {}
    keep = []  # device tensors behind bare addresses

    def address(x: np.ndarray) -> int:
        keep.append(put(x))
        return view(keep[-1]).ptr

    if c.mask:
        masks = [rng.random((n, m)) < rng.choice([0.1, 0.5, 0.9]) for n, m in zip(c.qo, c.kv, strict=True)]
        packed = [np.packbits(m.reshape(-1), bitorder="little") for m in masks]
        ends = np.concatenate([[0], np.cumsum([len(x) for x in packed])]).astype(np.int32)
        extras["mask_ptr"] = address(np.concatenate([*packed, np.zeros(1, np.uint8)]))
        extras["mask_indptr_ptr"] = 0 if c.single else address(ends)
    if c.items:
        prefix = rng.integers(0, np.maximum(c.kv, 1)).astype(np.uint32)
        place = rng.integers(0, 7, (batch, max(1, max(c.kv) - 3))).astype(np.uint16)
        items = [(int(p), x.tolist()) for p, x in zip(prefix, place, strict=True)]
        extras |= {
            "prefix_len_ptr": address(prefix.view(np.int32)),
            "token_pos_ptr": address(place.view(np.int16)),
            "token_pos_len": place.shape[1],
        }
    if c.sinks:
        sinks = (3.0 * rng.standard_normal(heads)).astype(np.float32)
        sinks[0] = -np.inf
        extras["sinks_ptr"] = address(sinks)
    if c.user:
        bias = rng.standard_normal(heads).astype(np.float32)
        extras["user"] = (address(bias), 0.125)
    options = AttentionOptions(c.alibi, c.rope, c.mask, c.items, c.sinks, BIASED if c.user else None)
    extra_values = AttentionExtras(**extras) if extras else NO_EXTRAS

    rows = max(c.qo) * c.group
    dt, kv_dt = canonical_dtype(c.dtype), canonical_dtype(kv_name)
    config = launch.device_config(0, dt, qk, vo, rows, kv_dt, options)
    tiles = dict(
        tile_q=config.tile_q,
        tile_kv=config.tile_kv,
        num_sms=c.sms,
        ctas_per_sm=config.ctas_per_sm,
        window_left=c.window,
        causal=c.causal,
    )
    results = []
    for _ in range(2):
        memory, out_host = strided((*q_host.shape[:2], vo), NUMPY[out_name], c.pads[2], c.offset)
        out = upload(memory, out_host)
        lse = put(np.full(q_host.shape[:2], np.nan, np.float32))
        common: dict[str, Any] = dict(
            config=config,
            sm_scale=qk**-0.5,
            logits_soft_cap=c.soft_cap,
            v_scale=c.v_scale,
            options=options,
            extras=extra_values,
        )
        if c.single:
            cut = single_schedule(
                c.qo[0], c.kv[0], num_qo_heads=heads, num_kv_heads=c.kv_heads, head_dim_vo=vo, **tiles
            )
            space = put(np.zeros(cut.workspace_bytes // 4 + 4, np.float32))
            launch.launch_single(
                0, stream, view(q), view(k), view(v), c.layout, view(out), view(lse), -(-view(space).ptr // 16) * 16,
                causal=c.causal, window_left=c.window, kv_chunk=cut.kv_chunk, num_splits=cut.num_splits, **common,
            )  # fmt: skip
        else:
            shape = dict(num_qo_heads=heads, num_kv_heads=c.kv_heads, head_dim_qk=qk, head_dim_vo=vo, **tiles)
            if paged:
                last = np.where(pages > 0, np.array(c.kv) - (pages - 1) * c.page_size, 0).astype(np.int32)
                plan = prefill_plan(
                    qo_indptr, kv_indptr, kv_indices=table, last_page_len=last, page_size=c.page_size, **shape
                )
            else:
                plan = prefill_plan(qo_indptr, kv_indptr, page_size=0, **shape)
            buffer = put(np.array(plan.pack()))
            space = put(np.full(plan.workspace_bytes // 4 + 4, np.nan, np.float32))
            at = view(buffer).ptr
            launch.launch_attention(
                0, stream, at, plan, view(q), view(k), view(v), at + 4 * plan.offsets.kv_indices if paged else 0, c.layout,
                view(out), view(lse), -(-view(space).ptr // 16) * 16, **common,
            )  # fmt: skip
            assert not download(buffer)[plan.offsets.semaphore :].any(), "a semaphore is left behind"
        results.append((download(out).astype(np.float64), download(lse).astype(np.float64)))
    (got, got_lse), (again, again_lse) = results
    np.testing.assert_array_equal(got, again)
    np.testing.assert_array_equal(got_lse, again_lse)

    low = "bfloat16" in (c.dtype, out_name)
    for b in range(batch):
        part = slice(int(qo_indptr[b]), int(qo_indptr[b + 1]))
        q64, k64 = np.asarray(q_host[part], np.float64), np.asarray(keys[b], np.float64)
        arguments = dict(
            causal=c.causal,
            window_left=c.window,
            logits_soft_cap=c.soft_cap,
            v_scale=c.v_scale,
            alibi=c.alibi,
            rope=c.rope,
            sinks=sinks,
        )
        arguments |= {"mask": masks[b] if masks else None, "items": items[b] if items else None}
        v64 = np.asarray(values[b], np.float64)
        if c.user:
            want, want_lse = biased_reference(q64, k64, v64, b, bias, arguments)
        else:
            want, want_lse = attention(q64, k64, v64, **arguments)
        seen = np.isfinite(want_lse)
        np.testing.assert_array_equal(got_lse[part] == -np.inf, ~seen)
        size = max(1.0, float(np.abs(want).max(initial=0)) / 3)
        np.testing.assert_allclose(got[part], want, rtol=0, atol=(0.035 if low else 0.008) * size)
        lse_error = (0.06 if c.dtype == "bfloat16" else 0.01) if c.rope else 2e-3
        np.testing.assert_allclose(got_lse[part][seen], want_lse[seen], rtol=1e-4, atol=lse_error)


def biased_reference(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, request: int, bias: Any, arguments: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """What BIASED means: a logit bias by head and position, as one more pair of columns; a parity mask; an output offset."""
    n, heads, dim = q.shape
    m, kv_heads, _ = k.shape
    out, lse = np.zeros((n, heads, v.shape[2])), np.zeros((n, heads))
    token, key = np.arange(n)[:, None], np.arange(m)[None]
    parity = (token + key + request) % 2 == 0
    for h in range(heads):
        # bias * (token + key % 3) / 8 = [token, 1] . [1, key % 3] * bias / 8, times sqrt(dim) for the scale that follows
        left = np.concatenate([token, np.ones((n, 1))], axis=1) * (bias[h] / 8.0 * dim**0.5)
        right = np.concatenate([np.ones((m, 1)), key.T % 3], axis=1)
        one = h // (heads // kv_heads)
        found = attention(
            np.concatenate([q[:, h], left], axis=1)[:, None],
            np.concatenate([k[:, one], right], axis=1)[:, None],
            v[:, one][:, None],
            sm_scale=dim**-0.5,
            mask=parity,
            **{name: arguments[name] for name in ("causal", "window_left", "logits_soft_cap", "v_scale")},
        )
        out[:, h], lse[:, h] = found[0][:, 0], found[1][:, 0]
    column = (np.arange(v.shape[2]) % 4 == 3).astype(float)
    offset = 0.5 * request + 0.25 * np.arange(n)[:, None, None] + np.arange(heads)[None, :, None] + column
    return out + offset, lse


ROPE, SLOW_ROPE = (1.0, 1e4), (4.0, 5e5)
E4M3, E5M2, F16 = "float8_e4m3fn", "float8_e5m2", "float16"
MANY = dict(qo=(40, 3, 1), kv=(130, 3, 90))
CASES = {
    "mask_decode": Case(mask=True),
    "mask_window": Case(mask=True, window=30, dtype=F16, **MANY),
    "mask_single": Case(mask=True, single=True, qo=(19,), kv=(200,), group=3),
    "mask_empty": Case(mask=True, qo=(2, 1, 3), kv=(0, 5, 1), page_size=0),
    "alibi_decode": Case(alibi=True, group=5, dtype=F16),
    "alibi_softcap": Case(alibi=True, soft_cap=8.0, group=3, causal=True, dtype=F16, **MANY),
    "rope_decode": Case(rope=ROPE, dims=(64, 64), kv=(77, 900)),
    "rope_prefill": Case(rope=SLOW_ROPE, causal=True, dtype=F16, **MANY),
    "rope_single": Case(rope=ROPE, single=True, qo=(1,), kv=(700,)),
    "rope_256": Case(rope=ROPE, dims=(256, 256), dtype=F16, qo=(20, 1), kv=(70, 9), causal=True),
    "sinks_split": Case(sinks=True, kv=(77, 900)),
    "sinks_short": Case(sinks=True, causal=True, qo=(12,), kv=(3,), single=True, dtype=F16),
    "sinks_prefill": Case(sinks=True, causal=True, window=20, **MANY),
    "items": Case(items=True, causal=True, dtype=F16, **MANY),
    "e4m3_decode": Case(kv_dtype=E4M3, kv=(77, 900)),
    "e4m3_decode_f16": Case(kv_dtype=E4M3, dtype=F16, layout="HND", page_size=1),
    "e4m3_prefill": Case(kv_dtype=E4M3, causal=True, **MANY),
    "e5m2_decode": Case(kv_dtype=E5M2, dims=(64, 64), v_scale=0.5),
    "e5m2_prefill": Case(kv_dtype=E5M2, dtype=F16, causal=True, layout="HND", **MANY),
    "e4m3_256": Case(kv_dtype=E4M3, dims=(256, 256)),
    "e4m3_256_prefill": Case(kv_dtype=E4M3, dims=(256, 256), alibi=True, soft_cap=5.0, out_dtype="float32", qo=(30,), kv=(50,)),
    "e4m3_rope_decode": Case(kv_dtype=E4M3, rope=ROPE, dtype=F16, kv=(150, 400)),
    "e5m2_rope_prefill": Case(kv_dtype=E5M2, rope=ROPE, causal=True, dtype=F16, **MANY),
    "e4m3_odd_dims": Case(kv_dtype=E4M3, rope=ROPE, dims=(120, 104), qo=(30, 1), kv=(40, 7)),
    "f32_out": Case(out_dtype="float32", dtype=F16, **MANY),
    "f16_out_split": Case(out_dtype=F16, kv=(900, 1)),
    "dims_192_128": Case(dims=(192, 128), causal=True, **MANY),
    "dims_192_128_decode": Case(dims=(192, 128)),
    "dims_96": Case(dims=(96, 96), dtype=F16, causal=True, **MANY),
    "dims_72_200": Case(dims=(72, 200), dtype=F16, **MANY),
    "dims_8": Case(dims=(8, 8)),
    "unaligned_decode": Case(pads=(3, 5, 1), offset=1, dims=(40, 40)),
    "unaligned_prefill": Case(pads=(1, 3, 7), offset=3, dtype=F16, causal=True, **MANY),
    "unaligned_e4m3": Case(pads=(8, 3, 8), offset=0, kv_dtype=E4M3, dims=(128, 72), qo=(20, 1), kv=(50, 7)),
    "pages_of_256": Case(page_size=256, kv=(513, 40)),
    "group_128": Case(group=128, kv_heads=1, qo=(1, 2), kv=(100, 60)),
    "user_decode": Case(user=True, dtype=F16),
    "user_prefill": Case(user=True, dtype=F16, causal=True, qo=(30, 3), kv=(60, 9), soft_cap=9.0),
    "everything": Case(alibi=True, mask=True, items=True, sinks=True, soft_cap=8.0, rope=ROPE, window=40, causal=True, dtype=F16, group=5, **MANY),
    "everything_e4m3": Case(alibi=True, mask=True, sinks=True, soft_cap=8.0, rope=ROPE, kv_dtype=E4M3, out_dtype="float32", dtype=F16, dims=(64, 64)),
}  # fmt: skip


def torch_functions() -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """`upload`, `download` and the stream of torch on the GPU. Strides and the offset in front are kept."""
    import torch

    dtypes = {np.dtype(n): getattr(torch, name) for name, n in NUMPY.items()}

    def upload(memory: np.ndarray, part: np.ndarray) -> Any:
        bits = memory.view(BITS[memory.itemsize])
        device = torch.from_numpy(bits.reshape(-1)).cuda()
        offset = (part.__array_interface__["data"][0] - memory.__array_interface__["data"][0]) // memory.itemsize
        strides = [s // memory.itemsize for s in part.strides]
        return device.view(dtypes.get(memory.dtype, device.dtype)).as_strided(part.shape, strides, offset)

    def download(x: Any) -> np.ndarray:
        return (x.float() if x.is_floating_point() else x).cpu().numpy()

    return upload, download, torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_option(name: str, rng: np.random.Generator) -> None:
    run_case(CASES[name], rng, *torch_functions())


def random_case(rng: np.random.Generator) -> Case:
    """Options drawn together; head dimensions out of three, so that not every draw is a compile of its own."""

    def sometimes(p: float = 0.3) -> bool:
        return bool(rng.random() < p)

    dtype = str(rng.choice(["float16", "bfloat16"]))
    single, decode = sometimes(), sometimes(0.4)
    batch = 1 if single else int(rng.integers(1, 5))
    return Case(
        dtype=dtype,
        kv_dtype=str(rng.choice([dtype, dtype, E4M3, E5M2])),
        dims=[(64, 64), (128, 128), (96, 40)][int(rng.integers(3))],
        qo=(1,) * batch if decode else tuple(rng.integers(1, 40, batch).tolist()),
        kv=tuple(rng.integers(1, 300, batch).tolist()),
        kv_heads=int(rng.choice([1, 2, 3])),
        group=int(rng.choice([1, 2, 3, 4, 7, 8])),
        page_size=int(rng.choice([0, 1, 3, 16, 64, 256])),
        single=single,
        layout=str(rng.choice(["NHD", "HND"])),
        causal=sometimes(0.5),
        window=int(rng.choice([-1, -1, 0, 5, 40])),
        soft_cap=float(rng.choice([0.0, 8.0])),
        v_scale=float(rng.choice([1.0, 0.5])),
        alibi=sometimes(),
        rope=[None, None, ROPE, SLOW_ROPE][int(rng.integers(4))],
        mask=sometimes(),
        sinks=sometimes(),
        pads=(0, 0, 0) if sometimes(0.8) else tuple(rng.integers(0, 9, 3).tolist()),
        sms=int(rng.choice([1, 16, 132])),
    )


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_options_together(seed: int, rng: np.random.Generator) -> None:
    case = random_case(rng)
    print(case)
    run_case(case, rng, *torch_functions())
