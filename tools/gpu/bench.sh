#!/usr/bin/env bash
# Benchmarks on the GPU machine, results and log to $OUT (copy the JSON to benchmarks/results/ and run python -m benchmarks.readme_tables).
# usage: bench.sh SUITE… [--peers flashinfer fa3 torch triton] [--cases GLOB]     LIMIT: seconds (default 400). What is measured before the limit is kept.
# Best alone on the machine: wait for FlashInfer's builds first (warm_flashinfer.sh wait). One SUITE list makes one file.
source "$(dirname "$0")/common.sh"
timeout -k 10 "${LIMIT:-400}" python3 -m benchmarks "$@" --device cuda --out "$OUT" 2>&1 | tee "$OUT/bench_$1.log"
code=${PIPESTATUS[0]}
[ "$code" != 124 ] || echo "TIMED OUT after ${LIMIT:-400} s; the file holds what was measured"
nvidia-smi --query-gpu=clocks.sm,temperature.gpu,power.draw,clocks_throttle_reasons.active --format=csv,noheader
exit "$code"
