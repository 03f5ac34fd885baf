"""One module per suite, each with `run(ctx)`; `DEVICES` says where it makes sense."""

from __future__ import annotations

NAMES = (
    "decode",
    "prefill",
    "variants",
    "cascade",
    "mla",
    "memory_bound",
    "sampling",
    "host_cost",
    "cold_start",
    "cpu_attention",
    "llm",
)
