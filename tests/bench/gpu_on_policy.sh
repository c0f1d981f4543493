#!/usr/bin/env bash
# On the GPU machine, once gpu_setup.sh has made /tmp/site.env (p1 p2 p3: `speed` needs vLLM) and REAL: the measurements of issue 16, in calls of less than ten minutes on
# one warm machine of one or more GPUs. Each reads what the one before has left in /tmp/lyceum-real and .cache, and leaves JSON and logs in $OUT.
#     bash tests/bench/gpu_on_policy.sh warm REAL 400    # 400 off-policy steps of three seeds; beside it, on the CPU, self-distillation with a hint
#     bash tests/bench/gpu_on_policy.sh more REAL 540    # 200 more steps, off-policy and on-policy; beside it, on the CPU, addition with five digits
#     bash tests/bench/gpu_on_policy.sh speed REAL 540   # engines hf and vllm, then the pipeline with each (on the GPU), and the pipeline on the CPU
# The last number is the budget in seconds. PER_GPU: runs at a time on a card (4); ENGINE: that writes on the real pair (hf).
set -euo pipefail
usage="usage: gpu_on_policy.sh warm|more|speed REAL SECONDS"
part=${1:?$usage} real=${2:?$usage} budget=${3:?$usage}
: "${OUT:?is where the figures go}"
workers=$(($(nproc) / 3))
real_pair() { python3 -W ignore -m tests.bench.real_on_policy "$1" --real "$real" --budget-s "$budget" --per-gpu "${PER_GPU:-4}" --engine "${ENGINE:-hf}" --json 2>&1 | tee -a "$OUT/on_policy-$1.log"; }
task() { CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 timeout "$((budget + 45))" nice python3 -W ignore -m tests.bench.on_policy "$1" --workers "$workers" --json >"$OUT/on_policy-$1.log" 2>&1; }
beside() { # PART TASK
    task "$2" &
    running=$!
    code=0
    real_pair "$1" || code=$?
    wait "$running" || tail -n 3 "$OUT/on_policy-$2.log"
    tail -n 20 "$OUT/on_policy-$2.log"
    exit "$code"
}
speed() { # LOG OPTION ...
    log=$OUT/rollouts-$1.log
    shift
    timeout "$left" python3 -W ignore -m tests.bench.rollouts "$@" --json >"$log" 2>&1 || echo "rollouts $*: $?" >&2
    tail -n 16 "$log"
}

case $part in
warm) beside warm hint ;;
more) beside more addition ;;
speed)
    mkdir -p "$OUT/cpu"
    left=$budget
    (OUT=$OUT/cpu CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 speed cpu pipeline --shape cpu --staleness 0 1 2 --teacher-delay 0.2) &
    running=$!
    left=$((budget / 2)) speed engines engines --batch 32 128 --repeat 2
    left=$((budget / 2)) speed pipeline pipeline --engine hf vllm --staleness 0 1 2 --steps 6
    wait "$running" || true
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
