#!/usr/bin/env bash
# compute-sanitizer over the smoke set and one split run of every attention wrapper: memcheck, racecheck, synccheck, initcheck.
# usage: sanitizer.sh [TOOL…] [-- pytest arguments]     default: all four tools, SET below
# First the set runs without a tool: it fills the kernel cache (compiling under a tool is slow). Then the tools side by side, on the same GPU, each in a
# process of its own. LIMIT: seconds for all of them (default 150). SERIAL=1: one after another, LIMIT for each.
# $OUT: sanitizer_TOOL.log, and the record <gpu>_<date>_sanitizer.json for tests/gpu_results/ with errors, tests and seconds of each tool.
source "$(dirname "$0")/common.sh"
tools=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do tools+=("$1"); shift; done
[ $# = 0 ] || shift
[ ${#tools[@]} -gt 0 ] || tools=(memcheck racecheck synccheck initcheck)
SET=(tests/test_smoke.py tests/test_batch_invariance.py::test_repeated_runs)
[ $# -gt 0 ] || set -- "${SET[@]}"
command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer on this machine"; exit 1; }
export PYINFER_WORKSPACE_BASE=/tmp/pyinfer-cache-native PYINFER_REPEATS=1
pytest=(python3 -m pytest --device cuda -q -p no:cacheprovider --timeout 0)
start=$SECONDS
timeout -k 10 "${LIMIT:-150}" "${pytest[@]}" "$@" >"$OUT/sanitizer_plain.log" 2>&1
echo "without a tool: exit $? in $((SECONDS - start)) s; $(tail -1 "$OUT/sanitizer_plain.log" | cut -c1-200)"

# Allocators that hand out pieces of large blocks hide an access past a tensor from memcheck: turn torch's off, and CuPy's (no_pool.py).
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=$PWD/tools/gpu
run_tool() {
    local tool=$1 start=$SECONDS code; shift
    # initcheck does not see what the copy engine writes (TMA stores: outputs and partials of the sm90 kernels), and reports every read of it.
    [ "$tool" != initcheck ] || export PYINFER_SM90=0
    timeout -k 10 "${LIMIT:-150}" compute-sanitizer --tool "$tool" --target-processes all --error-exitcode 86 --print-limit 20 --log-file "$OUT/sanitizer_$tool.log" \
        "${pytest[@]}" -p no_pool --junit-xml "$OUT/sanitizer_$tool.xml" -o junit_logging=no "$@" >"$OUT/sanitizer_${tool}_pytest.log" 2>&1
    code=$?
    echo "$code $((SECONDS - start))" >"$OUT/sanitizer_$tool.status"
}
for tool in "${tools[@]}"; do
    if [ "${SERIAL:-0}" = 1 ]; then run_tool "$tool" "$@"; else run_tool "$tool" "$@" & fi
done
wait
python3 tools/gpu/record_sanitizer.py --out "$OUT" --args "$*" "${tools[@]}"
for tool in "${tools[@]}"; do
    grep -hE '=========     (at|by)|Invalid|hazard|Barrier error|Uninitialized|Error:' "$OUT/sanitizer_$tool.log" 2>/dev/null | sort | uniq -c | sort -rn | head -6 | cut -c1-220
done
cat "$OUT"/sanitizer_*_pytest.log >"$OUT/sanitizer_pytest.log" 2>/dev/null
rm -f "$OUT"/sanitizer_*_pytest.log "$OUT"/sanitizer_*.status "$OUT"/sanitizer_*.xml
