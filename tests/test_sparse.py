"""Block-sparse attention against dense float64 attention under the mask that the blocks spell out."""

# ruff: noqa: E501 - tables of cases, one a line
from __future__ import annotations

import itertools

import numpy as np
import pytest

import pyinfer
from tests import attention_cases as cases
from tests.arrays import assert_close, assert_same_bits

BLOCK, VARIABLE = "BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper"


def masked(q, k, v, visible, sm_scale=None, cap=0.0, v_scale=1.0):
    """q [M, Hq, D], k, v [N, Hkv, D], visible [Hkv, M, N] -> out, base-2 lse."""
    m, heads, dim = q.shape
    group = heads // k.shape[1]
    out, lse = np.zeros((m, heads, v.shape[2])), np.full((m, heads), -np.inf)
    for h in range(heads):
        s = q[:, h] @ k[:, h // group].T * (dim**-0.5 if sm_scale is None else sm_scale)
        s = cap * np.tanh(s / cap) if cap else s
        for i in range(m):
            row = s[i, visible[h // group, i]]
            if row.size:
                w = np.exp(row - row.max())
                out[i, h] = w @ v[visible[h // group, i], h // group] / w.sum() * v_scale
                lse[i, h] = (row.max() + np.log(w.sum())) / np.log(2)
    return out, lse


def random_bsr(rng, rows, columns, density=0.4):
    seen = rng.random((rows, columns)) < density
    if rows > 1:
        seen[1] = False  # a block row without blocks
    indptr = np.concatenate([[0], np.cumsum(seen.sum(1))]).astype(np.int32)
    return seen, indptr, np.nonzero(seen)[1].astype(np.int32)


SHAPES = [
    (1, 1, 6, 9, 2, 2),
    (16, 16, 5, 7, 4, 2),
    (1, 16, 20, 8, 8, 1),
    (3, 5, 7, 11, 6, 2),
    (64, 1, 2, 90, 2, 1),
    (128, 128, 2, 2, 3, 3),
    (7, 64, 4, 1, 7, 1),
]


@pytest.mark.parametrize("i", range(len(SHAPES)))
@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 3.0, "sm_scale": 0.2}], ids=str)
def test_block_sparse(rng, backend, device, i, options):
    r, c, mb, nb, hq, hk = SHAPES[i]
    dtype = cases.dtypes(device)[i % len(cases.dtypes(device))]
    seen, indptr, indices = random_bsr(rng, mb, nb)
    q, k, v = (
        backend.array(rng.standard_normal(s), dtype) for s in ((mb * r, hq, 64), (nb * c, hk, 64), (nb * c, hk, 64))
    )
    wrapper = pyinfer.BlockSparseAttentionWrapper()
    on_device = i % 2 == 1
    tables = [backend.array(x) if on_device else x for x in (indptr, indices)]
    wrapper.plan(*tables, mb * r, nb * c, r, c, hq, hk, 64, q_data_type=dtype, **options)
    visible = np.broadcast_to(np.kron(seen, np.ones((r, c), bool)), (hk, mb * r, nb * c))
    want, want_lse = masked(
        *(backend.float64(x) for x in (q, k, v)), visible, options.get("sm_scale"), options.get("logits_soft_cap", 0.0)
    )
    out, lse = backend.full(want.shape, np.nan, dtype), backend.full(want_lse.shape, np.nan, "float32")
    got = wrapper.run(q, k, v, out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse
    assert_close(backend.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device))
    assert_same_bits(backend.numpy(wrapper.run(q, k, v)), backend.numpy(out), "second run")


def test_order_scales_and_strides(rng, backend, device):
    """Columns in any order, twice even; k and v strided."""
    dtype = cases.dtypes(device)[0]
    k, v = (cases.strided(backend, rng.standard_normal((24, 2, 64)), dtype, rng) for _ in range(2))
    q = backend.array(rng.standard_normal((16, 4, 64)), dtype)
    wrapper = pyinfer.BlockSparseAttentionWrapper(backend.array(np.zeros(1 << 16, np.uint8)))
    wrapper.plan([0, 3, 4], [5, 0, 2, 1], 16, 24, 8, 4, 4, 2, 64, q_data_type=dtype)
    seen = np.zeros((2, 6), bool)
    seen[0, [5, 0, 2]] = seen[1, 1] = True
    visible = np.broadcast_to(np.kron(seen, np.ones((8, 4), bool)), (2, 16, 24))
    want, _ = masked(*(backend.float64(x) for x in (q, k, v)), visible, 0.75 / 8, v_scale=2.0)
    assert_close(backend.float64(wrapper.run(q, k, v, 0.5, 1.5, 2.0)), want, **cases.tolerance(dtype, device))
    with pytest.warns(DeprecationWarning, match="forward is deprecated; use run"):
        assert wrapper.forward(q, k, v).shape == (16, 4, 64)


def test_causal_blocks(rng, backend_arrays, device):
    """Square blocks, the diagonal one last: the causal mask of the matrix."""
    b, dtype = backend_arrays, cases.dtypes(device)[0]
    seen = np.tril(rng.random((5, 5)) < 0.5) | np.eye(5, dtype=bool)
    indptr, indices = (
        np.concatenate([[0], np.cumsum(seen.sum(1))]).astype(np.int32),
        np.nonzero(seen)[1].astype(np.int32),
    )
    q, k, v = (b.array(rng.standard_normal((40, 2, 64)), dtype) for _ in range(3))
    wrapper = pyinfer.BlockSparseAttentionWrapper()
    wrapper.plan(indptr, indices, 40, 40, 8, 8, 2, 2, 64, causal=True, q_data_type=dtype)
    visible = np.broadcast_to(np.kron(seen, np.ones((8, 8), bool)) & np.tril(np.ones((40, 40), bool)), (2, 40, 40))
    want, _ = masked(*(b.float64(x) for x in (q, k, v)), visible)
    assert_close(b.float64(wrapper.run(q, k, v)), want, **cases.tolerance(dtype, device))


@pytest.mark.parametrize("i", range(5))
def test_variable_block_sparse(rng, backend, device, i):
    heads, group, mb, nb = [(1, 1, 3, 4), (2, 4, 3, 5), (3, 1, 4, 2), (2, 3, 1, 1), (2, 2, 6, 6)][i]
    dtype = cases.dtypes(device)[i % len(cases.dtypes(device))]

    def sizes(n, total, unit):
        cuts = np.sort(rng.integers(0, total // unit + 1, (heads, n - 1)), 1) * unit
        return np.diff(np.concatenate([np.zeros((heads, 1), int), cuts, np.full((heads, 1), total)], 1), axis=1)

    rows, keys = 50, 96
    row_sz, col_sz = sizes(mb, rows, 1), sizes(nb, keys, (1, 4, 16)[i % 3])
    seen = rng.random((heads, mb, nb)) < 0.6
    seen[0, 0] = False
    q, k, v = (
        backend.array(rng.standard_normal(s), dtype)
        for s in ((heads * group, rows, 64), (heads, keys, 64), (heads, keys, 64))
    )
    wrapper = pyinfer.VariableBlockSparseAttentionWrapper()
    arrays = [seen, row_sz, col_sz]
    wrapper.plan(
        *([backend.array(x) for x in arrays] if i % 2 else arrays), heads * group, heads, 64, q_data_type=dtype
    )
    visible = np.stack([np.repeat(np.repeat(seen[h], row_sz[h], 0), col_sz[h], 1) for h in range(heads)])
    want, want_lse = masked(*(backend.float64(x).swapaxes(0, 1) for x in (q, k, v)), visible)
    want, want_lse = want.swapaxes(0, 1), want_lse.T
    out, lse = wrapper.run(q, k, v, return_lse=True)
    assert backend.is_own(out) and backend.is_own(lse)
    assert_close(backend.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device))
    given = backend.full(want.shape, np.nan, dtype), backend.full(want_lse.shape, np.nan, "float32")
    got = wrapper.run(q, k, v, *given, return_lse=True)
    assert got[0] is given[0] and got[1] is given[1]
    assert_same_bits(backend.numpy(given[0]), np.ascontiguousarray(backend.numpy(out)), "given out")
    assert_same_bits(backend.numpy(given[1]), np.ascontiguousarray(backend.numpy(lse)), "given lse")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape", [(16, 16, 4, 5, 4, 2), (3, 5, 7, 6, 6, 2), (1, 8, 9, 4, 4, 1), (70, 9, 2, 8, 2, 2)], ids=str
)
def test_masks_within_blocks(rng, backend, device, shape, packed):
    r, c, mb, nb, hq, hk = shape
    dtype = cases.dtypes(device)[0]
    seen, indptr, indices = random_bsr(rng, mb, nb, 0.6)
    mask = rng.random((len(indices), r, c)) < 0.5
    q, k, v = (
        backend.array(rng.standard_normal(s), dtype) for s in ((mb * r, hq, 64), (nb * c, hk, 64), (nb * c, hk, 64))
    )
    visible = np.zeros((mb, r, nb, c), bool)
    for row in range(mb):
        for b in range(indptr[row], indptr[row + 1]):
            visible[row, :, indices[b], :] = mask[b]
    options = {"mask": backend.array(mask)}
    if packed:
        flat = pyinfer.sparse.convert_bsr_mask_layout(mask, indptr)
        parts = [np.packbits(flat[a * r * c : b * r * c], bitorder="little") for a, b in itertools.pairwise(indptr)]
        options = {"packed_mask": backend.array(np.concatenate(parts))}
    wrapper = pyinfer.BlockSparseAttentionWrapper()
    wrapper.plan(indptr, indices, mb * r, nb * c, r, c, hq, hk, 64, q_data_type=dtype, **options)
    out, lse = wrapper.run(q, k, v, return_lse=True)
    full = np.broadcast_to(visible.reshape(mb * r, nb * c), (hk, mb * r, nb * c))
    want, want_lse = masked(*(backend.float64(x) for x in (q, k, v)), full)
    assert_close(backend.float64(out), want, **cases.tolerance(dtype, device))
    assert_close(backend.float64(lse), want_lse, **cases.lse_tolerance(device))
    wrapper.plan(
        indptr, indices, mb * r, nb * c, r, c, hq, hk, 64, q_data_type=dtype
    )  # a mask from an earlier plan is forgotten
    want, _ = masked(
        *(backend.float64(x) for x in (q, k, v)), np.broadcast_to(np.kron(seen, np.ones((r, c), bool)), full.shape)
    )
    assert_close(backend.float64(wrapper.run(q, k, v)), want, **cases.tolerance(dtype, device))


def test_convert_bsr_mask_layout(rng, backend):
    indptr = np.array([0, 3, 3, 4, 6])
    mask = rng.random((6, 5, 4)) < 0.5
    want = np.concatenate([mask[a:b].transpose(1, 0, 2).reshape(-1) for a, b in itertools.pairwise(indptr)])
    got = pyinfer.sparse.convert_bsr_mask_layout(backend.array(mask), indptr)
    assert backend.is_own(got)
    np.testing.assert_array_equal(backend.numpy(got), want)


def block(wrapper=None, **changes):
    args = dict(indptr=[0, 1, 2], indices=[1, 0], M=8, N=8, R=4, C=4, num_qo_heads=2, num_kv_heads=1, head_dim=64)
    wrapper = wrapper or pyinfer.BlockSparseAttentionWrapper()
    wrapper.plan(**{**args, **changes})
    return wrapper


def variable(**changes):
    args = dict(
        block_mask_map=np.ones((2, 1, 2), bool),
        block_row_sz=np.array([[3], [3]]),
        block_col_sz=np.array([[4, 2], [2, 4]]),
        num_qo_heads=2,
        num_kv_heads=2,
        head_dim=64,
    )
    wrapper = pyinfer.VariableBlockSparseAttentionWrapper()
    wrapper.plan(**{**args, **changes})
    return wrapper


REFUSED = {
    "M": (lambda b: block(M=9), ValueError, rf"{BLOCK}: M is no multiple of R: got 9 \(R 4\), wanted a multiple of 4"),
    "N": (lambda b: block(N=10), ValueError, r"N is no multiple of C: got 10 \(C 4\)"),
    "R": (lambda b: block(R=0), ValueError, "R is no block size: got 0, wanted 1 or more"),
    "indptr": (lambda b: block(indptr=[0, 1]), ValueError, r"indptr has the wrong length: got 2, wanted 3 \(M / R \+ 1\)"),
    "indices": (lambda b: block(indices=[1, 2]), ValueError, r"indices names a block column outside the matrix: got 2, wanted 0\.\.1 \(N / C blocks\)"),
    "negative": (lambda b: block(indices=[1, -1]), ValueError, "indices names a block column outside the matrix: got -1"),
    "few indices": (lambda b: block(indices=[1]), ValueError, rf"{BLOCK}: paged_kv_indices is too short: got 1"),
    "mask": (lambda b: block(mask=np.ones((3, 4, 4), bool)), ValueError, r"mask has the wrong shape: got \(3, 4, 4\), wanted \(2, 4, 4\)"),
    "heads": (lambda b: block(num_qo_heads=3, num_kv_heads=2), ValueError, "num_qo_heads does not divide among the kv heads"),
    "run first": (lambda b: pyinfer.BlockSparseAttentionWrapper().run(*[b.full((8, 2, 64), 0, "float16")] * 3), ValueError, rf"{BLOCK}: plan\(\) was not called"),
    "k": (lambda b: block().run(*[b.full((8, 2, 64), 0, "float16")] * 3), ValueError, r"k has the wrong shape: got \(8, 2, 64\), wanted \(8, 1, 64\)"),
    "map": (lambda b: variable(block_mask_map=np.ones((1, 1, 2), bool)), ValueError, rf"{VARIABLE}: block_mask_map has the wrong shape: got \(1, 1, 2\), wanted \(2, 1, 2\)"),
    "map axes": (lambda b: variable(block_mask_map=np.ones((1, 2), bool)), ValueError, r"block_mask_map has the wrong number of axes: got 2 \(shape \(1, 2\)\), wanted 3"),
    "float map": (lambda b: variable(block_mask_map=np.ones((2, 1, 2))), TypeError, "block_mask_map holds neither integers nor booleans: got float64"),
    "row sizes": (lambda b: variable(block_row_sz=np.array([[3, 1], [3, 1]])), ValueError, r"block_row_sz has the wrong shape: got \(2, 2\), wanted \(2, 1\)"),
    "sums": (lambda b: variable(block_col_sz=np.array([[4, 2], [2, 2]])), ValueError, r"block_col_sz differs between heads in its sum: got \[6, 4\], wanted as many for every kv head"),
    "negative size": (lambda b: variable(block_col_sz=np.array([[7, -1], [2, 4]])), ValueError, "block_col_sz holds a negative size: got -1, wanted 0 or more"),
    "variable run first": (lambda b: pyinfer.VariableBlockSparseAttentionWrapper().run(*[b.full((2, 3, 64), 0, "float16")] * 3), ValueError, rf"{VARIABLE}: plan\(\) was not called"),
    "variable q": (lambda b: variable().run(b.full((2, 4, 64), 0, "float16"), *[b.full((2, 6, 64), 0, "float16")] * 2), ValueError, r"q has the wrong shape: got \(2, 4, 64\), wanted \(2, 3, 64\)"),
    "mask axes": (lambda b: pyinfer.sparse.convert_bsr_mask_layout(np.ones((2, 2)), [0, 2]), ValueError, r"mask has the wrong number of axes: got 2 .* wanted 3: \[nnz, R, C\]"),
    "mask indptr": (lambda b: pyinfer.sparse.convert_bsr_mask_layout(np.ones((2, 2, 2)), [0, 3]), ValueError, r"indptr does not lead from 0 to the number of blocks: got \[0, 3\], wanted 0, \.\.\., 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(backend_arrays, name):
    call, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        call(backend_arrays)
