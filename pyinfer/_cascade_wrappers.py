"""Attention with shared prefixes: every part of the keys is attended to once, by all queries that share it, and the parts are merged.

Level 0 holds what most requests share. A level is a batch prefill whose "requests" are groups of rows that see the same keys; at each level a
row leaves an output and a log-sum-exp, and one more launch merges these. With a prefix of P tokens and B requests of U own tokens the keys read are
P + B U tokens instead of B (P + U).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyinfer import _attention as common
from pyinfer.core.errors import fail
from pyinfer.core.tensor import view

if TYPE_CHECKING:
    from collections.abc import Sequence


_BUFFERS = (
    "qo_indptr_buf_arr",
    "paged_kv_indptr_buf_arr",
    "paged_kv_indices_buf_arr",
    "paged_kv_last_page_len_buf_arr",
)


def _refuse_places(op: str, pos_encoding_mode: str, window_left: int) -> None:
    """What depends on a token's place in the whole sequence: a level knows only places within itself."""
    fix = "Use BatchPrefillWithPagedKVCacheWrapper over the whole sequence."
    if common.check_window(op, window_left) >= 0:
        fail(op, "window_left", "does not reach across levels", window_left, "-1 with more than one level", fix)
    if pos_encoding_mode != "NONE":
        fail(
            op,
            "pos_encoding_mode",
            "does not reach across levels",
            repr(pos_encoding_mode),
            "'NONE' with more than one level",
            "Rotate q and k beforehand with pyinfer.apply_rope_pos_ids." if pos_encoding_mode == "ROPE_LLAMA" else fix,
        )


class MultiLevelCascadeAttentionWrapper:
    """Attention of a batch whose requests share prefixes, in any number of levels.

    Parameters
    ----------
    num_levels
        Levels of sharing, 1 or more. Level 0 is the most shared one, the last holds each request's own keys.
    float_workspace_buffer
        As in `BatchPrefillWithPagedKVCacheWrapper`; the levels run one after another and share it.
    kv_layout
        "NHD" or "HND".
    use_cuda_graph
        Keep every buffer and grid fixed, so that run() may be captured and later plans are seen by replays. Needs the four lists of buffers.
    qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr
        CUDA graph mode: an int32 buffer for each level, as in `BatchPrefillWithPagedKVCacheWrapper`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument.
    """

    _op = "MultiLevelCascadeAttentionWrapper"

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[Any] | None = None,
        paged_kv_indptr_buf_arr: Sequence[Any] | None = None,
        paged_kv_indices_buf_arr: Sequence[Any] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[Any] | None = None,
    ) -> None:
        from pyinfer._cascade_levels import SharedLevel
        from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        if not isinstance(num_levels, int) or num_levels < 1:
            fail(self._op, "num_levels", "is no number of levels", repr(num_levels), "1 or more")
        common.check_layout(self._op, kv_layout)
        self._use_cuda_graph = bool(use_cuda_graph)
        buffers: list[Sequence[Any]] = [[None] * num_levels] * len(_BUFFERS)
        if self._use_cuda_graph:
            given = (
                qo_indptr_buf_arr,
                paged_kv_indptr_buf_arr,
                paged_kv_indices_buf_arr,
                paged_kv_last_page_len_buf_arr,
            )
            for arg, value in zip(_BUFFERS, given, strict=True):
                self._check_levels(arg, value, num_levels)
            buffers = [list(value) for value in given if value is not None]
        classes = [BatchPrefillWithPagedKVCacheWrapper] * num_levels
        if num_levels > 1:
            classes[0] = SharedLevel
        self._levels = [
            make(float_workspace_buffer, kv_layout, self._use_cuda_graph, *of_level)
            for make, *of_level in zip(classes, *buffers, strict=True)
        ]
        for level in self._levels:
            level._op = self._op  # errors name what was called
        self._planned = False

    def _check_levels(self, arg: str, value: Any, levels: int) -> None:
        if not isinstance(value, list | tuple):
            fail(self._op, arg, "is no list of levels", type(value).__name__, f"a list of {levels}, one for each level")
        if len(value) != levels:
            fail(self._op, arg, "has the wrong number of levels", len(value), levels)

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper was made for CUDA graphs."""
        return self._use_cuda_graph

    @property
    def plan_info(self) -> tuple[Any, ...]:
        """The levels' plans (immutable), None before plan()."""
        return tuple(level.plan_info for level in self._levels)

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffers: Any = None) -> None:
        """Use another workspace from the next plan() on, which refuses one that is too small."""
        for level in self._levels:
            level.reset_workspace_buffer(float_workspace_buffer)

    def plan(
        self,
        qo_indptr_arr: Sequence[Any],
        paged_kv_indptr_arr: Sequence[Any],
        paged_kv_indices_arr: Sequence[Any],
        paged_kv_last_page_len: Sequence[Any],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        *,
        strict: bool = False,
    ) -> None:
        """Schedule every level.

        Parameters
        ----------
        qo_indptr_arr
            For each level int32 [groups + 1]: group g's queries are rows qo_indptr[g] .. qo_indptr[g + 1] - 1 of q. All levels cover all rows.
        paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len
            For each level the page table of its groups, as in `BatchDecodeWithPagedKVCacheWrapper.plan`. A group may have no pages.
        num_qo_heads, num_kv_heads, head_dim, page_size
            Shapes.
        causal
            Of the last level: query i of a request sees its own key j iff j <= kv_len - qo_len + i. All keys of the other levels are seen.
        sm_scale, logits_soft_cap, q_data_type, kv_data_type
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        pos_encoding_mode, window_left
            With one level as there. With more they are refused: they depend on places in the whole sequence, which a level does not know.
        strict
            Refuse metadata whose reading would wait for the GPU: everything on a GPU but the page indices. Host metadata costs one copy a level.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what it got and what is wanted.
        """
        op, levels = self._op, len(self._levels)
        tables = {
            "qo_indptr_arr": qo_indptr_arr,
            "paged_kv_indptr_arr": paged_kv_indptr_arr,
            "paged_kv_indices_arr": paged_kv_indices_arr,
            "paged_kv_last_page_len": paged_kv_last_page_len,
        }
        for arg, value in tables.items():
            self._check_levels(arg, value, levels)
        if levels > 1:
            _refuse_places(op, pos_encoding_mode, window_left)
        rows: list[int] = []
        self._planned = False  # until all levels are: half of a new plan is none
        for i, (level, *table) in enumerate(zip(self._levels, *tables.values(), strict=True)):
            level.plan(
                *table, num_qo_heads, num_kv_heads, head_dim, page_size, causal=bool(causal) and i == levels - 1, pos_encoding_mode=pos_encoding_mode,
                use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale, window_left=window_left, logits_soft_cap=logits_soft_cap,
                rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type, kv_data_type=kv_data_type, strict=strict,
            )  # fmt: skip
            assert level.plan_info is not None
            rows.append(level.plan_info.total_rows)
            if rows[i] != rows[0]:
                fail(op, f"qo_indptr_arr[{i}]", "covers another number of rows", rows[i], f"{rows[0]} (as level 0)")
        self._planned = True

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention of the planned batch: one launch a level, and one that merges them.

        Parameters
        ----------
        q
            [rows, num_qo_heads, head_dim]. In CUDA graph mode it may have more rows than the plan; the result of those is undefined.
        paged_kv_cache
            The cache that holds the pages of all levels, as in `BatchDecodeWithPagedKVCacheWrapper.run`.
        q_scale, k_scale, v_scale, out, lse, return_lse, enable_pdl
            As there.

        Returns
        -------
        out, or (out, lse)
            [rows, num_qo_heads, head_dim] (and base-2 float32 [rows, num_qo_heads]). A row that sees no key at any level: zeros and -inf.
        """
        if not self._planned:
            fail(self._op, "plan()", "was not called", "run() first", "plan() before run()")
        from pyinfer._cascade_levels import SharedLevel, States

        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        options: dict[str, Any] = {k: None if x is None else common.scale(self._op, k, x) for k, x in scales.items()}
        options["enable_pdl"] = enable_pdl
        if len(self._levels) == 1:
            return self._levels[0].run(q, paged_kv_cache, out=out, lse=lse, return_lse=return_lse, **options)
        qv = common.q_view(self._op, q)
        states = States(len(self._levels), qv, qv.shape[2])
        # Level 0 last: it may leave splits in the workspace, which the levels share.
        for level, (level_out, level_lse) in reversed(list(zip(self._levels, states.parts(), strict=True))):
            level.run(q, paged_kv_cache, out=level_out, lse=level_lse, return_lse=True, **options)
        shared = self._levels[0]
        assert isinstance(shared, SharedLevel)
        pdl = qv.device >= 0 and common.use_pdl(qv.device, enable_pdl)
        return states.merge(self._op, out, lse, return_lse, shared, 1.0 if v_scale is None else options["v_scale"], pdl)

    def begin_forward(self, *args: Any, **kwargs: Any) -> None:
        """Deprecated: `plan`."""
        common.deprecated(f"{self._op}.begin_forward", "plan")
        self.plan(*args, **kwargs)

    def forward(self, q: Any, paged_kv_cache: Any, **kwargs: Any) -> Any:
        """Deprecated: `run`."""
        common.deprecated(f"{self._op}.forward", "run")
        return self.run(q, paged_kv_cache, **kwargs)

    def end_forward(self) -> None:
        """Deprecated: does nothing."""
        common.deprecated(f"{self._op}.end_forward", "nothing: it does nothing")


class _SharedPrefix:
    """The two-level forms: a dense shared prefix, and a wrapper for the requests' own keys."""

    _op = ""
    _unique: Any

    def __init__(self, kv_layout: str) -> None:
        self._kv_layout = common.check_layout(self._op, kv_layout)
        common.deprecated(self._op, "MultiLevelCascadeAttentionWrapper")

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace from the next plan() on, which refuses one that is too small."""
        self._unique.reset_workspace_buffer(float_workspace_buffer)

    def end_forward(self) -> None:
        """Deprecated: does nothing."""

    def _forward(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        causal: bool,
        sm_scale: float | None,
        rope: dict[str, float | None],
    ) -> Any:
        from pyinfer._cascade_levels import States

        op = self._op
        for arg, value in rope.items():
            if value is not None:
                fix = "Rotate q and k beforehand with pyinfer.apply_rope_pos_ids."
                fail(op, arg, "has nothing to act on: nothing is rotated here", value, "None", fix)
        if self._unique.plan_info is None:
            fail(op, "begin_forward()", "was not called", "forward() first", "begin_forward() before forward()")
        qv = common.q_view(op, q)
        kv, vv = common.dense_views(op, qv, k_shared, v_shared, self._kv_layout)
        states = States(2, qv, vv.shape[2])
        common.run_single(
            op, qv, kv, vv, self._kv_layout, view(states.v[0]), view(states.s[0]), causal=False, window_left=-1,
            sm_scale=common.softmax_scale(op, sm_scale, qv.shape[2]), logits_soft_cap=0.0, v_scale=1.0,
        )  # fmt: skip
        self._unique._override("NONE", -1, None, sm_scale, causal)
        self._unique.run(q, unique_kv_cache, out=states.v[1], lse=states.s[1], return_lse=True)
        return states.merge(op, None, None, False)


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Deprecated: decode over a dense prefix that all requests share, and each one's own pages. `MultiLevelCascadeAttentionWrapper` does this and more.

    Parameters
    ----------
    float_workspace_buffer, kv_layout
        As in `BatchDecodeWithPagedKVCacheWrapper`.
    """

    _op = "BatchDecodeWithSharedPrefixPagedKVCacheWrapper"

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD") -> None:
        from pyinfer.decode import BatchDecodeWithPagedKVCacheWrapper

        super().__init__(kv_layout)
        self._unique = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._unique._op = self._op  # errors name what was called

    def begin_forward(
        self,
        unique_kv_indptr: Any,
        unique_kv_indices: Any,
        unique_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Any = "float16",
    ) -> None:
        """Schedule the requests' own keys: a page table as in `BatchDecodeWithPagedKVCacheWrapper.plan`. `data_type` is that of q and both caches."""
        self._unique.plan(
            unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, q_data_type=data_type,
            kv_data_type=data_type,
        )  # fmt: skip

    def forward(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        allow_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Any:
        """Attention over the shared and the own keys.

        Parameters
        ----------
        q
            [batch, num_qo_heads, head_dim].
        k_shared, v_shared
            [prefix_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, prefix_len, head_dim] (HND).
        unique_kv_cache
            The paged cache of the own keys.
        allow_fp16_qk_reduction
            Accepted: scores are accumulated in float32, which is never less exact.
        rope_scale, rope_theta
            Must be None: nothing is rotated here.
        sm_scale
            1 / sqrt(head_dim) by default.

        Returns
        -------
        out
            [batch, num_qo_heads, head_dim].
        """
        return self._forward(
            q, k_shared, v_shared, unique_kv_cache, False, sm_scale, dict(rope_scale=rope_scale, rope_theta=rope_theta)
        )


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Deprecated: prefill over a dense prefix that all requests share, and each one's own pages. `MultiLevelCascadeAttentionWrapper` does this and more.

    Parameters
    ----------
    float_workspace_buffer, kv_layout
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    """

    _op = "BatchPrefillWithSharedPrefixPagedKVCacheWrapper"

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD") -> None:
        from pyinfer.prefill import BatchPrefillWithPagedKVCacheWrapper

        super().__init__(kv_layout)
        self._unique = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout)
        self._unique._op = self._op  # errors name what was called

    def begin_forward(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        q_data_type: Any = "float16",
    ) -> None:
        """Schedule the requests' own keys: indptr and page table as in `BatchPrefillWithPagedKVCacheWrapper.plan`."""
        self._unique.plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size,
            q_data_type=q_data_type,
        )  # fmt: skip

    def forward(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> Any:
        """Attention over the shared keys, all of which every query sees, and the own ones.

        Parameters
        ----------
        q
            [qo_indptr[-1], num_qo_heads, head_dim].
        causal
            Among a request's own tokens.

        Other parameters and the result as `BatchDecodeWithSharedPrefixPagedKVCacheWrapper.forward`.
        """
        return self._forward(
            q,
            k_shared,
            v_shared,
            unique_kv_cache,
            bool(causal),
            sm_scale,
            dict(rope_scale=rope_scale, rope_theta=rope_theta),
        )
