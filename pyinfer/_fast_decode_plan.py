"""decode's plan() as a function, by the name and arguments that serving loops know."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyinfer.core.tensor import view

if TYPE_CHECKING:
    from pyinfer.decode import BatchDecodeWithPagedKVCacheWrapper


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    indptr: Any,
    indices: Any,
    last_page_len: Any,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    pos_encoding_mode: str = "NONE",
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    q_data_type: Any = None,
    kv_data_type: Any = None,
    data_type: Any = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    non_blocking: bool = True,
    fixed_split_size: int | None = None,
    disable_split_kv: bool = False,
    global_override_indptr_cpu: Any = None,
) -> None:
    """`BatchDecodeWithPagedKVCacheWrapper.plan` by the name and arguments that serving loops bind to a wrapper: `partial(fast_decode_plan, wrapper)`.

    Parameters
    ----------
    self
        The wrapper.
    global_override_indptr_cpu
        indptr on the host: spares reading `indptr` from the GPU. With pages of one token last_page_len is known too (all ones), and nothing waits for
        the GPU.
    fixed_split_size
        None or -1: none.

    Others as in `BatchDecodeWithPagedKVCacheWrapper.plan`; q_data_type None is data_type, or float16.
    """
    if q_data_type is None:
        q_data_type = "float16" if data_type is None else data_type
    host = indptr if global_override_indptr_cpu is None else global_override_indptr_cpu
    if page_size == 1 and not isinstance(last_page_len, list | tuple):
        last = view(last_page_len, self._op, "last_page_len")
        if last.device >= 0:
            import numpy as np

            last_page_len = np.ones(last.shape, np.int32)
    self.plan(
        host, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, pos_encoding_mode, window_left, logits_soft_cap, q_data_type,
        kv_data_type, data_type, sm_scale, rope_scale, rope_theta, non_blocking, fixed_split_size=None if fixed_split_size == -1 else fixed_split_size,
        disable_split_kv=disable_split_kv,
    )  # fmt: skip
