"""Schedulers: pure functions of NumPy arrays and a few device constants that cut a batch into work items.

No GPU and no tensors here; CPU and CUDA backends consume the same plan. The format is described in docs/internals.md, "Attention plans".
Numba is imported when the first plan is made.
"""

from __future__ import annotations

from pyinfer.schedulers.decode import decode_capacity, decode_plan
from pyinfer.schedulers.plan import WORK_FIELDS, AttentionPlan, PlanCapacity, PlanOffsets
from pyinfer.schedulers.prefill import SingleSchedule, prefill_capacity, prefill_plan, single_schedule

__all__ = [
    "WORK_FIELDS",
    "AttentionPlan",
    "PlanCapacity",
    "PlanOffsets",
    "SingleSchedule",
    "decode_capacity",
    "decode_plan",
    "prefill_capacity",
    "prefill_plan",
    "single_schedule",
]
