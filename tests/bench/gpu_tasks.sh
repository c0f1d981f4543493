#!/usr/bin/env bash
# Benches of small models on the CPU cores of a GPU machine, beside what its GPUs do: runs of one thread each, in process sessions of their own, which go on between calls.
#     bash tests/bench/gpu_tasks.sh start      # after gpu_setup.sh finish; `.cache/classroom`, carried along, saves the training of teachers that are there
#     bash tests/bench/gpu_tasks.sh collect    # what there is, into $OUT; also while they run
# ONLY_ON_POLICY=1: addition and hint alone. HINT_STEPS, HINT_WORKERS: steps of a student, and processes. 55 cores are used at most.
set -euo pipefail
work=/tmp/tasks
case ${1:-} in
start)
    # shellcheck disable=SC1091
    . /tmp/site.env
    export OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" OUT=$work
    mkdir -p "$work"
    begin() { # NAME MODULE ...
        local name=$1
        shift
        setsid nohup python3 -W ignore -m "tests.bench.$@" >"$work/$name.log" 2>&1 </dev/null &
    }
    begin addition on_policy addition --arms "off-policy alone" "ramp to 0.7" --workers 10 --json
    begin hint on_policy hint --workers "${HINT_WORKERS:-25}" --steps "${HINT_STEPS:-200}" --json
    [ -n "${ONLY_ON_POLICY:-}" ] || begin many_teachers many_teachers --workers 18 --work "$work/many" --json
    [ -n "${ONLY_ON_POLICY:-}" ] || begin curriculum curriculum --seeds 5 --json
    ;;
collect)
    : "${OUT:?is where the figures go}"
    tar -C /tmp -czf "$OUT/tasks.tgz" tasks # one file: more than some forty do not come back
    tail -n 3 "$work"/*.log | cut -c1-300
    ;;
*)
    echo "usage: gpu_tasks.sh start | collect" >&2
    exit 2
    ;;
esac
