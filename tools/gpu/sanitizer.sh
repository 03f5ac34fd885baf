#!/usr/bin/env bash
# compute-sanitizer over the smoke set. Its tools slow a kernel 10–100 times: keep the set small.
# usage: sanitizer.sh [TOOL…] -- [pytest arguments]     tools: memcheck racecheck synccheck initcheck (default the first three); default arguments: tests/test_smoke.py
# LIMIT: seconds for each tool (default 150). Run tests.sh first: its cache then holds the kernels (compiling under the sanitizer is slow).
source "$(dirname "$0")/common.sh"
tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ $# = 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck)
[ $# -gt 0 ] || set -- tests/test_smoke.py
command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on this machine"; exit 1; }
export PYINFER_WORKSPACE_BASE=/tmp/pyinfer-cache-native
# Allocators that hand out pieces of large blocks hide an access past a tensor from memcheck: turn torch's off, and CuPy's (no_pool.py).
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$PWD/tools/gpu
for tool in "${tools[@]}"; do
    start=$SECONDS
    timeout -k 10 "${LIMIT:-150}" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 86 --print-limit 20 --log-file "$OUT/sanitizer_$tool.log" \
        python3 -m pytest -p no_pool --device cuda -q -x -p no:cacheprovider --timeout 0 "$@" >"$OUT/sanitizer_${tool}_pytest.log" 2>&1
    code=$?
    echo "$tool: exit $code in $((SECONDS - start)) s; $(tail -1 "$OUT/sanitizer_${tool}_pytest.log" | cut -c1-200); $(grep -h 'ERROR SUMMARY\|RACECHECK SUMMARY' "$OUT/sanitizer_$tool.log" 2>/dev/null | tail -1)"
    grep -hE '=========     (at|by)|Invalid|hazard|Barrier error' "$OUT/sanitizer_$tool.log" 2>/dev/null | sort | uniq -c | sort -rn | head -6 | cut -c1-220
done
cat "$OUT"/sanitizer_*_pytest.log >"$OUT/sanitizer_pytest.log" 2>/dev/null; rm -f "$OUT"/sanitizer_*_pytest.log
