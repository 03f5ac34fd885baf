# shellcheck shell=bash
# Sourced by every script here. The machine is bare when it starts, and what lies under /tmp lives as long as it is held.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
export OUT=${OUT:-/tmp/out}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export PEERS=${PEERS:-/tmp/peers}                    # unpacked peers, build logs, markers of what is built
export PYINFER_BENCH_SITE=$PEERS/site                # benchmarks/peers.py appends it to sys.path; never PYTHONPATH, tests must not see it
export PYINFER_BENCH_BUILT=$PEERS/built              # one JSON file per FlashInfer module that is built
export FLASHINFER_WORKSPACE_BASE=$PEERS FLASHINFER_CUDA_ARCH_LIST=9.0a
export PYINFER_WORKSPACE_BASE=${PYINFER_WORKSPACE_BASE:-/tmp/pyinfer-cache}
export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-/tmp/numba-cache}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT" "$PEERS/built" "$PEERS/logs"
say() { printf '%s  %s\n' "$(date -u +%H:%M:%S)" "$*"; }
