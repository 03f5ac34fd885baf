#!/usr/bin/env bash
# Build FlashInfer's modules ahead, one Python process each, side by side and detached (they outlive the call that started them).
# usage: warm_flashinfer.sh start [MODULE…]   default: decode prefill_fa2 norm activation sampling rope page (prefill_fa3 takes 120–220 s: name it to have it)
#        warm_flashinfer.sh wait [SECONDS]    until all that were started have ended (default 300), then report
#        warm_flashinfer.sh status            what is built and what is still running
#        warm_flashinfer.sh save              $OUT/flashinfer_aot.tar.xz: put it into .peers/, and setup.sh on a fresh machine has them built
# Each process makes the very call that the benchmark will time (python -m benchmarks.peers warm MODULE), so that its cache is hit later.
source "$(dirname "$0")/common.sh"
action=${1:-start}; shift || true

status() {
    for log in "$PEERS"/logs/*.log; do
        [ -e "$log" ] || { echo "nothing started"; return; }
        name=$(basename "$log" .log)
        if [ -e "$PEERS/built/$name.json" ]; then echo "built   $name $(grep -o '"seconds": [0-9.]*' "$PEERS/built/$name.json")"
        elif kill -0 "$(cat "$PEERS/logs/$name.pid" 2>/dev/null)" 2>/dev/null; then echo "running $name"
        else echo "FAILED  $name: $(grep -v '^ ' "$log" | tail -1 | cut -c1-300)"
        fi
    done
    cat "$PEERS"/logs/*.log >"$OUT/flashinfer_build.log" 2>/dev/null
}

case $action in
start)
    [ $# -gt 0 ] || set -- decode prefill_fa2 norm activation sampling rope page
    for module in "$@"; do
        MAX_JOBS=${MAX_JOBS:-4} setsid nohup timeout 900 nice -n 5 python3 -m benchmarks.peers warm "$module" >"$PEERS/logs/$module.log" 2>&1 </dev/null &
        echo $! >"$PEERS/logs/$module.pid"
    done
    say "started: $*"
    ;;
wait)
    end=$((SECONDS + ${1:-300}))
    while [ $SECONDS -lt $end ]; do
        alive=0
        for pid in "$PEERS"/logs/*.pid; do kill -0 "$(cat "$pid")" 2>/dev/null && alive=1; done
        [ $alive = 1 ] || break
        sleep 1
    done
    status
    ;;
status) status ;;
save)
    # FlashInfer loads flashinfer/data/aot/NAME/NAME.so without asking ninja: same library, same call path.
    aot=$PYINFER_BENCH_SITE/flashinfer/data/aot
    mkdir -p "$aot/built" && cp "$PEERS"/built/*.json "$aot/built/"
    for library in "$PEERS"/.cache/flashinfer/*/90a/cached_ops/*/*.so; do
        [ -e "$library" ] && name=$(basename "$library" .so) && mkdir -p "$aot/$name" && cp "$library" "$aot/$name/"
    done
    tar -C "$PYINFER_BENCH_SITE" -cJf "$OUT/flashinfer_aot.tar.xz" flashinfer/data/aot && ls -l "$OUT/flashinfer_aot.tar.xz"
    ;;
*) sed -n '2,7p' "$0"; exit 2 ;;
esac
