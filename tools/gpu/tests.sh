#!/usr/bin/env bash
# The suite on the GPU: natively, and as compute_80 PTX that the driver compiles (DESIGN §4). Caches apart, records for tests/gpu_results/ in $OUT.
# usage: tests.sh native|ptx|both [pytest arguments]     e.g. tests.sh native tests/test_norm.py -x
# LIMIT: seconds for each of the runs (default 250). WORKERS: pytest-xdist processes (default 8; kernels compile on 8 cores then; 0: none).
source "$(dirname "$0")/common.sh"
what=${1:-both}; shift || true
limit=${LIMIT:-250} workers=${WORKERS:-8}
# One seed for all workers (each would draw its own), shown with the failures.
seed=${SEED:-$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}
python3 -c 'import xdist' 2>/dev/null || workers=0
parallel=(); [ "$workers" = 0 ] || parallel=(-n "$workers" --dist worksteal)

run_suite() {  # NAME ARCH_LIST pytest arguments…
    local name=$1 arch=$2; shift 2
    (
        export PYINFER_WORKSPACE_BASE=/tmp/pyinfer-cache-$name
        [ -z "$arch" ] || export PYINFER_CUDA_ARCH_LIST=$arch
        # Interrupted, not killed: pytest then still prints what failed.
        timeout -s INT -k 15 "$limit" python3 -m pytest --device cuda --seed "$seed" -q -p no:cacheprovider "${parallel[@]}" --junit-xml "$OUT/junit_$name.xml" \
            -o junit_logging=no --durations=8 --tb=short --disable-warnings "$@" >"$OUT/pytest_$name.log" 2>&1
        code=$?
        [ $code != 124 ] && [ $code != 137 ] || echo "TIMED OUT after $limit s" >>"$OUT/pytest_$name.log"
        python3 tools/gpu/record.py --name "$name" --arch-list "$arch" --seed "$seed" --junit "$OUT/junit_$name.xml" --exit-code $code --out "$OUT" \
            --args "$*" >"$OUT/record_$name.txt" 2>&1
    )
}

case $what in
native) run_suite native "" "$@" ;;
ptx) run_suite ptx 8.0+PTX "$@" ;;
both) run_suite native "" "$@"; run_suite ptx 8.0+PTX "$@" ;;
*) sed -n '2,4p' "$0"; exit 2 ;;
esac

# Short, last: failures first, then the counts.
for name in native ptx; do
    log=$OUT/pytest_$name.log
    [ -e "$log" ] || continue
    echo "=== $name: first failures"; awk '/^=+ (FAILURES|ERRORS) =+$/ {on = 1} /^=+ (warnings summary|slowest|short test summary)/ {on = 0} on' "$log" | head -c "${SHOW:-3500}"
    echo; echo "=== $name: summary"; grep -E '^(FAILED|ERROR)|TIMED OUT|^E  ' "$log" | cut -c1-260 | sort -u | head -40; tail -3 "$log" | cut -c1-300
    cat "$OUT/record_$name.txt"
done
xz -f "$OUT"/junit_*.xml 2>/dev/null
rm -f "$OUT"/record_*.txt
exit 0
