"""Block-sparse attention: which keys a query sees is given by blocks of the attention matrix.

A row of blocks is a request of a batch prefill: its queries are the block row's, its pages are the blocks of columns that it sees. Keys in blocks that
are not there are never read.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from pyinfer import _attention as common
from pyinfer.core.dtypes import FLOAT32, canonical_dtype
from pyinfer.core.errors import check_shape, device_name, fail, fail_type
from pyinfer.core.tensor import as_numpy, empty, host_ints, view
from pyinfer.torch_ops import attach

if TYPE_CHECKING:
    from pyinfer.core.tensor import TensorView

__all__ = ["BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper", "convert_bsr_mask_layout"]


def _on_host(op: str, arg: str, x: Any, ndim: int, strict: bool) -> np.ndarray:
    """Any array of integers or booleans as a NumPy array; from a GPU by one copy, which `strict` forbids."""
    if isinstance(x, list | tuple):
        x = np.asarray(x)
    v = view(x, op, arg)
    if len(v.shape) != ndim:
        fail(op, arg, "has the wrong number of axes", f"{len(v.shape)} (shape {tuple(v.shape)})", ndim)
    if v.device < 0:
        array = np.asarray(as_numpy(v))
    elif strict:
        fix = "Keep a host copy and pass that."
        fail(op, arg, "is on the GPU under strict=True", device_name(v.device), "host metadata", fix)
    elif v.framework == "torch":
        array = v.obj.cpu().numpy()
    else:
        import cupy

        array = cupy.asnumpy(v.obj)
    if array.dtype.kind not in "biu":
        fail_type(op, arg, "holds neither integers nor booleans", array.dtype, "int32, int64 or bool")
    return array


def _transposed(x: Any, axes: tuple[int, ...]) -> Any:
    """x with its axes in this order, in its own framework."""
    return x.permute(axes) if view(x).framework == "torch" else x.transpose(axes)


def _blocks_first(counts: np.ndarray, starts: np.ndarray, rows: int) -> np.ndarray:
    """For block rows of `counts` blocks, the first of them at `starts`: where in [blocks, rows] the rows of [rows, count] lie, one block row after another."""
    sizes = counts * rows
    total = int(sizes.sum())
    place = np.arange(total) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    width = np.repeat(counts, sizes)
    return (np.repeat(starts, sizes) + place % np.maximum(width, 1)) * rows + place // np.maximum(width, 1)


def convert_bsr_mask_layout(mask: Any, indptr: Any) -> Any:
    """The mask of a BSR matrix as the attention kernels read it: one block row after another, each row-major over all its blocks.

    Parameters
    ----------
    mask
        [nnz, R, C]: a mask for every block.
    indptr
        [block rows + 1], integers: block row i has blocks indptr[i] .. indptr[i + 1] - 1.

    Returns
    -------
    mask
        [nnz * R * C] in mask's dtype and framework: for each block row [R, blocks * C], flattened.

    Raises
    ------
    ValueError, TypeError
        If the shapes do not fit.
    """
    op = "convert_bsr_mask_layout"
    v = view(mask, op, "mask")
    if len(v.shape) != 3:
        fail(op, "mask", "has the wrong number of axes", f"{len(v.shape)} (shape {tuple(v.shape)})", "3: [nnz, R, C]")
    nnz, r, c = v.shape
    host = host_ints(indptr, op, "indptr", np.int64)
    counts = np.diff(host)
    if not len(host) or host[0] != 0 or host[-1] != nnz or (counts < 0).any():
        fail(op, "indptr", "does not lead from 0 to the number of blocks", host.tolist()[:8], f"0, ..., {nnz}")
    order = _blocks_first(counts, host[:-1], r)
    rows = v.obj.reshape(nnz * r, c)
    if v.framework == "torch":
        index = sys.modules["torch"].from_numpy(order).to(rows.device)
        return rows[index].reshape(-1)
    if v.device >= 0:
        import cupy

        order = cupy.asarray(order)
    return rows[order].reshape(-1)


class _Sparse:
    """What both wrappers share: the batch prefill that does the work."""

    _op = ""

    def __init__(self, float_workspace_buffer: Any = None, backend: str = "auto") -> None:
        from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        self._inner = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, "NHD", backend=backend)
        self._inner._op = self._op  # errors name what was called

    @property
    def plan_info(self) -> Any:
        """The current plan (immutable), None before plan()."""
        return self._inner.plan_info

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace from the next plan() on, which refuses one that is too small."""
        self._inner.reset_workspace_buffer(float_workspace_buffer)

    def _kv(self, k: Any, v: Any, shape: tuple[int, ...], pages: tuple[int, ...]) -> tuple[Any, Any]:
        """k and v as paged caches."""
        if self._inner.plan_info is None:
            fail(self._op, "plan()", "was not called", "run() first", "plan() before run()")
        kv, vv = view(k, self._op, "k"), view(v, self._op, "v")
        check_shape(self._op, "k", kv, shape)
        check_shape(self._op, "v", vv, shape)
        return kv.obj.reshape(pages), vv.obj.reshape(pages)  # splitting an axis copies nothing

    def begin_forward(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated: `plan`."""
        common.deprecated(f"{self._op}.begin_forward", "plan")
        self.plan(*args, **kwargs)  # type: ignore[attr-defined]

    def end_forward(self) -> None:
        """Deprecated: does nothing."""
        common.deprecated(f"{self._op}.end_forward", "nothing: it does nothing")


class BlockSparseAttentionWrapper(_Sparse):
    """Attention under a block-sparse (BSR) mask that all heads share.

    Parameters
    ----------
    float_workspace_buffer
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    backend
        "auto" or "fa2".
    """

    _op = "BlockSparseAttentionWrapper"

    def plan(
        self,
        indptr: Any,
        indices: Any,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: Any = None,
        packed_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule an attention matrix of M queries and N keys in blocks of R by C.

        Parameters
        ----------
        indptr, indices
            int32 [M / R + 1], [nnz]: block row i sees the keys of block columns indices[indptr[i]] .. indices[indptr[i + 1] - 1], in this order. Host arrays
            never synchronise; those on a GPU cost a copy.
        M, N, R, C
            Queries, keys, rows and columns of a block; R divides M and C divides N.
        num_qo_heads, num_kv_heads, head_dim
            Shapes; num_qo_heads is a multiple of num_kv_heads.
        mask
            bool [nnz, R, C]: what is seen within each block; None: all of it.
        packed_mask
            The same in bits, as `segment_packbits(convert_bsr_mask_layout(mask, indptr), bits per block row, "little")` gives it.
        causal
            A block row's keys, in the order of `indices`, count as one sequence that ends with its R queries: query i of the block row sees its key j iff
            j <= keys - R + i. With R = C, sorted indices and the diagonal block last in each row that is the causal mask of the matrix.
        pos_encoding_mode, use_fp16_qk_reduction, logits_soft_cap, sm_scale, rope_scale, rope_theta, q_data_type, kv_data_type
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`; places are those of `causal`.
        o_data_type
            Of the output; None: q_data_type (FlashInfer's default is float16, whatever the inputs are).
        non_blocking
            Accepted; copies never block.
        strict
            Refuse indptr and indices on a GPU, whose reading would wait for it.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what it got and what is wanted.
        """
        op = self._op
        for arg, whole, part_arg, part in (("M", M, "R", R), ("N", N, "C", C)):
            if part < 1:
                fail(op, part_arg, "is no block size", part, "1 or more")
            if whole < 0 or whole % part:
                fail(op, arg, f"is no multiple of {part_arg}", f"{whole} ({part_arg} {part})", f"a multiple of {part}")
        host_indptr, host_indices = common.host_metadata(op, strict=strict, indptr=indptr, indices=indices)
        rows = M // R
        if len(host_indptr) != rows + 1:
            fail(op, "indptr", "has the wrong length", len(host_indptr), f"{rows + 1} (M / R + 1)")
        nnz = int(host_indptr[-1])
        used = host_indices[: max(nnz, 0)]
        if used.size and (int(used.min()) < 0 or int(used.max()) >= N // C):
            bad = used[(used < 0) | (used >= N // C)]
            fail(
                op, "indices", "names a block column outside the matrix", int(bad[0]), f"0..{N // C - 1} (N / C blocks)"
            )
        filled = np.diff(host_indptr) > 0
        options: dict[str, Any] = {}
        if packed_mask is not None:
            options["packed_custom_mask"] = packed_mask
        elif mask is not None:
            check_shape(op, "mask", view(mask, op, "mask"), (nnz, R, C))
            options["custom_mask"] = convert_bsr_mask_layout(mask, host_indptr)
        if o_data_type is not None and canonical_dtype(o_data_type, op, "o_data_type") is not canonical_dtype(
            q_data_type, op, "q_data_type"
        ):
            options["o_data_type"] = o_data_type
        self._inner.plan(
            np.arange(rows + 1, dtype=np.int32) * np.int32(R), host_indptr, host_indices, np.where(filled, C, 0).astype(np.int32), num_qo_heads,
            num_kv_heads, head_dim, C, causal=causal, pos_encoding_mode=pos_encoding_mode, use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale,
            logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type, kv_data_type=kv_data_type, **options,
        )  # fmt: skip
        self._k_shape = (N, num_kv_heads, head_dim)
        self._pages = (N // C, C, num_kv_heads, head_dim)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        scale_q: Any = None,
        scale_k: Any = None,
        scale_v: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention under the planned mask.

        Parameters
        ----------
        q
            [M, num_qo_heads, head_dim] in the planned dtype.
        k, v
            [N, num_kv_heads, head_dim]; any strides but a last one of 1.
        scale_q, scale_k, scale_v
            Numbers: scale_q and scale_k multiply sm_scale, scale_v the output.
        out, lse
            Where to write, instead of new tensors: q's shape; float32 [M, num_qo_heads].
        return_lse
            Also return the base-2 log-sum-exp.
        enable_pdl
            As in `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns
        -------
        out, or (out, lse)
            A row that sees no key: zeros and -inf.
        """
        cache = self._kv(k, v, getattr(self, "_k_shape", ()), getattr(self, "_pages", ()))
        return self._inner.run(
            q, cache, q_scale=scale_q, k_scale=scale_k, v_scale=scale_v, out=out, lse=lse, return_lse=return_lse, enable_pdl=enable_pdl
        )  # fmt: skip

    def forward(self, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        """Deprecated: `run`."""
        common.deprecated(f"{self._op}.forward", "run")
        return self.run(q, k, v, **kwargs)


class VariableBlockSparseAttentionWrapper(_Sparse):
    """Attention under a block mask whose blocks differ in size, each kv head with a pattern of its own.

    Parameters
    ----------
    float_workspace_buffer
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    backend
        "auto" or "fa2".
    """

    _op = "VariableBlockSparseAttentionWrapper"

    def plan(
        self,
        block_mask_map: Any,
        block_row_sz: Any,
        block_col_sz: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule.

        Parameters
        ----------
        block_mask_map
            bool [num_kv_heads, MB, NB]: whether block (i, j) of a kv head's matrix is seen.
        block_row_sz, block_col_sz
            Integers [num_kv_heads, MB], [num_kv_heads, NB]: rows and columns of the blocks. All heads have as many rows in all, and as many columns.
            Pages are as large as the greatest common divisor of the column sizes.
        num_qo_heads, num_kv_heads, head_dim
            Shapes; num_qo_heads is a multiple of num_kv_heads.

        Other parameters and errors as `BlockSparseAttentionWrapper.plan`. Arrays on a GPU cost a copy each, which `strict` forbids.
        """
        op = self._op
        common.check_head_counts(op, num_qo_heads, num_kv_heads)
        seen = _on_host(op, "block_mask_map", block_mask_map, 3, strict).astype(bool)
        row_sz = _on_host(op, "block_row_sz", block_row_sz, 2, strict).astype(np.int64)
        col_sz = _on_host(op, "block_col_sz", block_col_sz, 2, strict).astype(np.int64)
        heads, mb, nb = seen.shape
        for arg, got, wanted in (
            ("block_mask_map", seen.shape, (num_kv_heads, mb, nb)),
            ("block_row_sz", row_sz.shape, (num_kv_heads, mb)),
            ("block_col_sz", col_sz.shape, (num_kv_heads, nb)),
        ):
            if got != wanted:
                fail(op, arg, "has the wrong shape", got, wanted)
        for arg, sizes in (("block_row_sz", row_sz), ("block_col_sz", col_sz)):
            if sizes.size and int(sizes.min()) < 0:
                fail(op, arg, "holds a negative size", int(sizes.min()), "0 or more")
            totals = sizes.sum(1)
            if (totals != totals[:1]).any():
                fail(op, arg, "differs between heads in its sum", totals.tolist(), "as many for every kv head")
        rows, keys = int(row_sz[0].sum()), int(col_sz[0].sum())
        if heads * max(rows, keys) > 2147483647:
            fail(
                op,
                "block_row_sz",
                "makes the matrix too large",
                f"{heads} heads of {rows} x {keys}",
                "at most 2147483647 rows in all",
            )
        page = math.gcd(*col_sz.reshape(-1).tolist()) or 1

        # A kv head's keys lie behind the last one's: pages of head h begin at h * keys / page. Its rows likewise.
        pages = col_sz // page
        first = np.cumsum(pages, 1) - pages + (np.arange(heads) * (keys // page))[:, None]
        h, i, j = np.nonzero(seen)  # in order of head, block row, block column
        count = pages[h, j]
        offsets = np.cumsum(count) - count
        indices = np.repeat(first[h, j] - offsets, count) + np.arange(int(count.sum()))
        per_row = np.bincount(h * mb + i, weights=count, minlength=heads * mb).astype(np.int64)
        indptr = np.concatenate([[0], np.cumsum(per_row)]).astype(np.int32)
        qo_indptr = np.concatenate([[0], np.cumsum(row_sz.reshape(-1))]).astype(np.int32)
        last = np.where(per_row > 0, page, 0).astype(np.int32)
        group = num_qo_heads // num_kv_heads
        self._inner.plan(
            qo_indptr, indptr, indices.astype(np.int32), last, group, 1, head_dim, page, causal=causal, pos_encoding_mode=pos_encoding_mode,
            use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap, rope_scale=rope_scale, rope_theta=rope_theta,
            q_data_type=q_data_type, kv_data_type=kv_data_type,
        )  # fmt: skip
        self._q_shape = (num_kv_heads, group, rows, head_dim)
        self._k_shape = (num_kv_heads, keys, head_dim)
        self._pages = (heads * keys // page, page, 1, head_dim)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention under the planned mask.

        Parameters
        ----------
        q
            [num_qo_heads, rows, head_dim] in the planned dtype. With more query heads than kv heads it is copied, head by head into token order.
        k, v
            [num_kv_heads, keys, head_dim]. Copied unless the heads lie one behind the other.
        out, lse
            Where to write, instead of new tensors: q's shape; float32 [num_qo_heads, rows].
        return_lse
            Also return the base-2 log-sum-exp.
        enable_pdl
            As in `BatchDecodeWithPagedKVCacheWrapper.run`.

        Returns
        -------
        out, or (out, lse)
            [num_qo_heads, rows, head_dim] (and base-2 float32 [num_qo_heads, rows]). A row that sees no key: zeros and -inf.
        """
        op = self._op
        cache = self._kv(k, v, getattr(self, "_k_shape", ()), getattr(self, "_pages", ()))
        heads, group, rows, dim = self._q_shape
        qv = view(q, op, "q")
        check_shape(op, "q", qv, (heads * group, rows, dim))
        out_view = None if out is None else common.check_out(op, "out", out, qv, (heads * group, rows, dim), qv.dtype)
        lse_view = None if lse is None else common.check_out(op, "lse", lse, qv, (heads * group, rows), FLOAT32)
        by_token = _transposed(qv.obj.reshape(self._q_shape), (0, 2, 1, 3)).reshape(heads * rows, group, dim)
        got = self._inner.run(by_token, cache, return_lse=return_lse, enable_pdl=enable_pdl)
        o, s = got if return_lse else (got, None)
        result = self._by_head(qv, o, out_view, (heads, rows, group, dim), (0, 2, 1, 3))
        if s is None:
            return result
        return result, self._by_head(qv, s, lse_view, (heads, rows, group), (0, 2, 1))

    def _by_head(
        self, q: TensorView, x: Any, given: TensorView | None, shape: tuple[int, ...], axes: tuple[int, ...]
    ) -> Any:
        """Results in token order, [kv heads, rows, group, ...], into a tensor [query heads, rows, ...]."""
        x = _transposed(x.reshape(shape), axes)
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        v = view(x)
        if given is None:
            if v.is_contiguous():
                return x
            given = view(empty(q, v.shape, v.dtype))
        given.obj[...] = x
        return given.obj

    def forward(self, q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
        """Deprecated: `run`."""
        common.deprecated(f"{self._op}.forward", "run")
        return self.run(q, k, v, **kwargs)


attach(__name__)  # what torch.compile traces in the place of these functions
