"""What distinguishes one attention from another beyond shapes: the options that select a kernel, and the values that come with each run."""

from __future__ import annotations

from typing import NamedTuple

from pyinfer.core.errors import fail
from pyinfer.core.params import Field
from pyinfer.jit.spec import DeviceFunction

HOOKS = ("query", "logits", "mask", "output")
"""What a user's functions may do; `common/attention_variant.cuh` says where each is called."""


class UserVariant(NamedTuple):
    """Functions of the user's, compiled into the attention kernels (`pyinfer.AttentionVariant` makes one).

    Attributes
    ----------
    name
        Part of the kernel's name: letters, digits and underscores.
    source
        CUDA source that defines the hooks (`common/attention_variant.cuh` lists their signatures).
    hooks
        Which ones it defines: of `HOOKS`.
    fields
        Extra parameters, read in the source as `p.NAME`; their values come with each run in `AttentionExtras.user`, in this order.
    functions
        Python functions that the source calls, linked into the kernel.
    softmax
        False: logits are weights as they are, the output is their plain weighted sum, and there is no LSE.
    places
        Whether a logits or mask hook asks where it is called: that costs registers, and so a narrower tile.
    raw_scores
        The logits hook gets q·k times what the host passes as sm_scale and gives a logit in base 2; neither ALiBi nor a soft cap goes with it.
    """

    name: str
    source: str
    hooks: tuple[str, ...] = ("logits",)
    fields: tuple[Field, ...] = ()
    functions: tuple[DeviceFunction, ...] = ()
    softmax: bool = True
    raw_scores: bool = False
    places: bool = True


class AttentionOptions(NamedTuple):
    """What selects a kernel or is fixed by a plan. All off by default.

    Attributes
    ----------
    alibi
        Bias slope[q_head] * (kv_idx - q_row), the slopes by the ALiBi paper's formula from the number of query heads.
    rope
        (rope_scale, rope_theta): queries and keys are rotated on the fly. None: not.
    mask
        A custom mask in packed bits.
    multi_item
        Multi-item scoring: items behind a shared prefix do not see each other.
    sinks
        A logit per query head that joins the denominator.
    user
        Functions of the user's.
    family
        "sm80" or "sm90": the kernels to take, whatever is faster (`backend="fa2"`, `"fa3"`). "": no matter.
    """

    alibi: bool = False
    rope: tuple[float, float] | None = None
    mask: bool = False
    multi_item: bool = False
    sinks: bool = False
    user: UserVariant | None = None
    family: str = ""


class AttentionExtras(NamedTuple):
    """What the options need at each run: device addresses (0: none) and numbers.

    Attributes
    ----------
    mask_ptr, mask_indptr_ptr
        uint8 bits, little-endian, rows of kv_len bits without padding between them; int32 [batch + 1] byte offsets (0: one request, from byte 0).
    sinks_ptr
        float32 [num_qo_heads], natural-log logits.
    prefix_len_ptr, token_pos_ptr, token_pos_len
        uint32 [batch]; uint16 [batch, token_pos_len].
    user
        Values of `UserVariant.fields`, pointers as ints.
    merge
        False: the splits of a tile stay in the workspace, for a kernel of the caller's to merge. Plans for prefill kernels alone.
    q_scales_ptr, k_scales_ptr, v_scales_ptr
        float32 [num_qo_heads], [num_kv_heads], [num_kv_heads]: what a stored 1 of a head is worth. Queries in 8 bits only.
    """

    mask_ptr: int = 0
    mask_indptr_ptr: int = 0
    sinks_ptr: int = 0
    prefix_len_ptr: int = 0
    token_pos_ptr: int = 0
    token_pos_len: int = 0
    user: tuple[int | float, ...] = ()
    merge: bool = True
    q_scales_ptr: int = 0
    k_scales_ptr: int = 0
    v_scales_ptr: int = 0


PLAIN = AttentionOptions()
NO_EXTRAS = AttentionExtras()


def check_extras(op: str, options: AttentionOptions, extras: AttentionExtras) -> None:
    """ValueError if an option lacks its tensor, or a tensor its option: nothing is accepted and ignored."""
    needs = (
        ("mask", options.mask, extras.mask_ptr),
        ("sinks", options.sinks, extras.sinks_ptr),
        ("prefix_len_ptr", options.multi_item, extras.prefix_len_ptr),
        ("token_pos_in_items_ptr", options.multi_item, extras.token_pos_ptr),
    )
    for name, wanted, given in needs:
        if wanted and not given:
            fail(op, name, "is missing", "no address", "a tensor on the device")
        if given and not wanted:
            fail(op, name, "was not planned", "an address", "none", "Ask for it in the options.")
    expected = len(options.user.fields) if options.user is not None else 0
    if len(extras.user) != expected:
        fail(op, "extra arguments", "do not fit the variant", len(extras.user), expected)
