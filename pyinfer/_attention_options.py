"""The options of attention on the host: what a plan fixes, custom masks, multi-item scoring, sinks; checked, packed and brought to where the kernels run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from pyinfer.core.dtypes import BOOL, FLOAT32, INT16, INT32, UINT8, UINT16, UINT32, DType
from pyinfer.core.errors import check_dtype, check_ndim, check_shape, device_name, fail
from pyinfer.core.tensor import TensorView, as_numpy, host_ints, view
from pyinfer.jit.attention_options import PLAIN, AttentionOptions, UserVariant

if TYPE_CHECKING:
    import numpy as np

    from pyinfer.schedulers.plan import AttentionPlan


class PlanKey(NamedTuple):
    """What plan() was told besides the metadata. In CUDA graph mode the first plan fixes all of it: it is baked into captured launches."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    page_size: int
    q_data_type: DType
    kv_data_type: DType
    o_data_type: DType
    fixed_split_size: int | None = None
    disable_split_kv: bool = False
    causal: bool = False
    window_left: int = -1
    logits_soft_cap: float = 0.0
    sm_scale: float = 1.0
    pos_encoding_mode: str = "NONE"
    rope_scale: float = 1.0
    rope_theta: float = 1e4
    custom_mask: bool = False
    token_pos_in_items_len: int = 0
    variant: UserVariant | None = None
    family: str = ""

    @property
    def options(self) -> AttentionOptions:
        """What selects the kernel."""
        return options_of(
            self.pos_encoding_mode,
            self.rope_scale,
            self.rope_theta,
            self.custom_mask,
            self.token_pos_in_items_len > 0,
            self.variant,
            self.family,
        )


def options_of(
    pos_encoding_mode: str,
    rope_scale: float,
    rope_theta: float,
    mask: bool = False,
    multi_item: bool = False,
    variant: UserVariant | None = None,
    family: str = "",
) -> AttentionOptions:
    """The kernels' options; PLAIN itself if all are off."""
    if pos_encoding_mode == "NONE" and not mask and not multi_item and variant is None and not family:
        return PLAIN
    rope = (rope_scale, rope_theta) if pos_encoding_mode == "ROPE_LLAMA" else None
    return AttentionOptions(
        pos_encoding_mode == "ALIBI", rope, mask=mask, multi_item=multi_item, user=variant, family=family
    )


# ---- custom masks ----------------------------------------------------------------------------------------------------------------
class Mask(NamedTuple):
    """A packed mask of a plan: bits on the host (`host`, a copy of its own) or on the device (`view`), and byte offsets."""

    host: np.ndarray | None
    view: TensorView | None
    byte_indptr: np.ndarray


def mask_view(op: str, custom_mask: Any, packed_custom_mask: Any) -> TensorView | None:
    """The view of the mask that counts: the packed one if both are given, None without any."""
    if packed_custom_mask is not None:
        v = view(packed_custom_mask, op, "packed_custom_mask")
        check_dtype(op, "packed_custom_mask", v, (UINT8,))
        check_ndim(op, "packed_custom_mask", v, 1)
        return v
    if custom_mask is None:
        return None
    v = view(custom_mask, op, "custom_mask")
    check_dtype(op, "custom_mask", v, (BOOL, UINT8))
    return v


def bind_mask(op: str, v: TensorView, packed: bool, qo_len: np.ndarray, kv_len: np.ndarray) -> Mask:
    """Check a mask's size against the requests' lengths and pack it, where it lies.

    Parameters
    ----------
    v, packed
        The mask, and whether it is `packed_custom_mask`.
    qo_len, kv_len
        Integers [batch].
    """
    import numpy as np

    bits = qo_len.astype(np.int64) * kv_len
    offsets = np.zeros(len(bits) + 1, np.int64)
    np.cumsum((bits + 7) >> 3, out=offsets[1:])
    total = int(offsets[-1])
    if total > 2147483647:
        fail(op, "custom_mask", "is too large", f"{total} bytes packed", "at most 2147483647")
    byte_indptr = offsets.astype(np.int32)
    if packed:
        if v.size < total:
            fail(
                op,
                "packed_custom_mask",
                "is too short",
                f"{v.size} bytes",
                f"{total} (each request's qo_len * kv_len bits in whole bytes)",
            )
        if v.device < 0:
            return Mask(np.array(as_numpy(v)[:total]), None, byte_indptr)
        if not v.is_contiguous():
            fail(op, "packed_custom_mask", "is not contiguous", f"strides {tuple(v.strides)}", "a contiguous tensor")
        return Mask(None, v, byte_indptr)
    elements = np.zeros(len(bits) + 1, np.int64)
    np.cumsum(bits, out=elements[1:])
    if v.size != elements[-1]:
        wanted = f"{int(elements[-1])} (the sum of qo_len * kv_len)"
        fail(op, "custom_mask", "has the wrong size", f"{v.size} (shape {tuple(v.shape)})", wanted)
    if v.device < 0:
        from pyinfer.cpu.attention import pack_mask

        flat = np.ascontiguousarray(as_numpy(v)).reshape(-1).view(np.uint8)
        return Mask(pack_mask(flat, elements, byte_indptr), None, byte_indptr)
    return Mask(None, _pack_on_device(v, elements, byte_indptr), byte_indptr)


def _pack_on_device(v: TensorView, elements: np.ndarray, byte_indptr: np.ndarray) -> TensorView:
    """Pack with the framework's own operations, in stream order: the lengths are known, so nothing synchronises."""
    if v.framework == "torch":
        import torch

        flat = v.obj.reshape(-1) != 0
        padded = flat
        if 8 * int(byte_indptr[-1]) != v.size:
            padded = torch.zeros(8 * int(byte_indptr[-1]), dtype=torch.bool, device=flat.device)
            _spread(flat, padded, elements, byte_indptr)
        place = torch.arange(8, dtype=torch.uint8, device=flat.device)
        return view((padded.view(-1, 8).to(torch.uint8) << place).sum(1, dtype=torch.uint8))
    import cupy

    with cupy.cuda.Device(v.device):
        flat = v.obj.reshape(-1) != 0
        padded = flat
        if 8 * int(byte_indptr[-1]) != v.size:
            padded = cupy.zeros(8 * int(byte_indptr[-1]), dtype=cupy.bool_)
            _spread(flat, padded, elements, byte_indptr)
        return view(cupy.packbits(padded, bitorder="little"))


def _spread(flat: Any, padded: Any, elements: np.ndarray, byte_indptr: np.ndarray) -> None:
    for b in range(len(elements) - 1):
        begin, end, at = int(elements[b]), int(elements[b + 1]), 8 * int(byte_indptr[b])
        padded[at : at + end - begin] = flat[begin:end]


def joined_mask(mask: Mask) -> np.ndarray:
    """Byte offsets, padded to a multiple of four, then bits: one int32 array, one copy to the device. Bits begin at `mask_bits_offset`."""
    import numpy as np

    assert mask.host is not None
    at = mask_bits_offset(mask)
    out = np.zeros(at // 4 + (len(mask.host) + 3) // 4, np.int32)
    out[: len(mask.byte_indptr)] = mask.byte_indptr
    out.view(np.uint8)[at : at + len(mask.host)] = mask.host
    return out


def mask_bits_offset(mask: Mask) -> int:
    """Bytes before the bits in `joined_mask`."""
    return 4 * ((len(mask.byte_indptr) + 3) & -4)


# ---- multi-item scoring ----------------------------------------------------------------------------------------------------------
class Items(NamedTuple):
    """Multi-item scoring of a plan: host copies (int64), or views of device tensors."""

    prefix_len: Any
    token_pos: Any
    token_pos_len: int
    device: int


def items_of(
    op: str, prefix_len: Any, token_pos: Any, token_pos_len: int, max_item_len: Any, batch: int
) -> Items | None:
    """Multi-item arguments, checked; None if there are none. max_item_len_ptr is a hint that these kernels do without."""
    if prefix_len is None:
        for arg, value in (
            ("token_pos_in_items_ptr", token_pos),
            ("token_pos_in_items_len", token_pos_len or None),
            ("max_item_len_ptr", max_item_len),
        ):
            if value is not None:
                fail(op, arg, "was given without prefix_len_ptr", type(value).__name__, "prefix_len_ptr as well")
        return None
    if token_pos is None:
        fail(op, "token_pos_in_items_ptr", "is missing", "None", "uint16 [batch * token_pos_in_items_len]")
    if token_pos_len < 1:
        fail(op, "token_pos_in_items_len", "is no length", token_pos_len, "1 or more")
    on_device = []
    for arg, x in (("prefix_len_ptr", prefix_len), ("token_pos_in_items_ptr", token_pos)):
        on_device.append(not isinstance(x, list | tuple) and view(x, op, arg).device >= 0)
    if on_device[0] != on_device[1]:
        wanted = "prefix_len_ptr and token_pos_in_items_ptr on one device"
        fail(op, "token_pos_in_items_ptr", "is on another device", "one on the host, one on a GPU", wanted)
    need = batch * token_pos_len
    if on_device[0]:
        p, t = view(prefix_len, op, "prefix_len_ptr"), view(token_pos, op, "token_pos_in_items_ptr")
        check_dtype(op, "prefix_len_ptr", p, (UINT32, INT32))
        check_dtype(op, "token_pos_in_items_ptr", t, (UINT16, INT16))
        for arg, x, least in (("prefix_len_ptr", p, batch), ("token_pos_in_items_ptr", t, need)):
            if not x.is_contiguous():
                fail(op, arg, "is not contiguous", f"strides {tuple(x.strides)}", "a contiguous tensor")
            _check_count(op, arg, x.size, least)
        return Items(p, t, token_pos_len, p.device)
    import numpy as np

    lengths = host_ints(prefix_len, op, "prefix_len_ptr", np.int64)
    places = host_ints(token_pos, op, "token_pos_in_items_ptr", np.int64)
    _check_count(op, "prefix_len_ptr", len(lengths), batch)
    _check_count(op, "token_pos_in_items_ptr", len(places), need)
    if places.size and not 0 <= int(places.min()) <= int(places.max()) <= 65535:
        got = f"values from {int(places.min())} to {int(places.max())}"
        fail(op, "token_pos_in_items_ptr", "does not fit uint16", got, "0 to 65535")
    return Items(lengths[:batch].copy(), places[:need].reshape(batch, token_pos_len).copy(), token_pos_len, -1)


def _check_count(op: str, arg: str, have: int, need: int) -> None:
    if have < need:
        fail(op, arg, "is too short", f"{have} entries", f"at least {need}")


def joined_items(items: Items) -> np.ndarray:
    """prefix_len as 32 bits each, padded to a multiple of four, then token_pos as 16 bits: one int32 array."""
    import numpy as np

    at = (len(items.prefix_len) + 3) & -4
    out = np.zeros(at + (items.token_pos.size + 1) // 2, np.int32)
    out[: len(items.prefix_len)] = items.prefix_len
    out[at:].view(np.uint16)[: items.token_pos.size] = items.token_pos.reshape(-1)
    return out


# ---- sinks -----------------------------------------------------------------------------------------------------------------------
def sinks_view(op: str, sinks: Any, q: TensorView, num_qo_heads: int) -> TensorView:
    """View of attention sinks: contiguous float32 [num_qo_heads] where q is."""
    v = view(sinks, op, "sinks")
    check_dtype(op, "sinks", v, (FLOAT32,))
    check_shape(op, "sinks", v, (num_qo_heads,))
    if v.device != q.device:
        fail(op, "sinks", "is on another device", device_name(v.device), f"{device_name(q.device)} (where q is)")
    if not v.is_contiguous():
        fail(op, "sinks", "is not contiguous", f"strides {tuple(v.strides)}", "a contiguous tensor")
    return v


def qo_lengths(plan: AttentionPlan) -> np.ndarray:
    """Query tokens of every request."""
    return plan.qo_indptr[1:] - plan.qo_indptr[:-1]
