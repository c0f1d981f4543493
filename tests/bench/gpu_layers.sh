#!/usr/bin/env bash
# On the GPU machine, once gpu_setup.sh has made /tmp/site.env and REAL: the measurements of terms on layers, in three calls of less than ten minutes on one warm
# machine of one, two or four GPUs. Each reads what the one before has left in /tmp/lyceum-real, and leaves JSON in $OUT.
#     bash tests/bench/gpu_layers.sh sweep REAL 450     # every arm; beside it, on the CPU, tasks 1 and 2 of docs/concepts/method.md 12
#     bash tests/bench/gpu_layers.sh final REAL 540     # the best of it, its neighbours and others, three seeds
#     bash tests/bench/gpu_layers.sh rest REAL 330      # seconds a step; what layers cost the server and a student's step at 7B and 1.5B shapes
# The last number is the budget in seconds: of `rest` with one or two GPUs one part after the other takes twice as long. WEIGHTS names the tasks' weights,
# PER_GPU the runs at a time on a card (4; 6 where there is one card).
set -euo pipefail
usage="usage: gpu_layers.sh sweep|final|rest REAL SECONDS"
part=${1:?$usage} real=${2:?$usage} budget=${3:?$usage}
: "${OUT:?is where the figures go}"
layers() { python3 -W ignore -m tests.bench.real_layers "$@" --real "$real" --per-gpu "${PER_GPU:-4}" --json 2>&1 | tee -a "$OUT/layers-$1.log"; }
features() { timeout "$budget" python3 -W ignore -m tests.bench.features --half "$1" --json >"$OUT/features-$1.log" 2>&1 || echo "features $1: $?" >&2; }

case $part in
sweep)
    cores=$(nproc)
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES='' OMP_NUM_THREADS=1 timeout "$((budget + 60))" nice python3 -W ignore -m tests.bench.tasks --weights ${WEIGHTS:-1 3 12} \
        --workers "$((cores / 3))" --json >"$OUT/tasks.log" 2>&1 &
    tasks=$!
    code=0
    layers sweep --budget-s "$budget" || code=$?
    wait "$tasks" || tail -n 3 "$OUT/tasks.log"
    exit "$code"
    ;;
final)
    layers final --budget-s "$budget"
    ;;
rest)
    gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
    if [ "$gpus" -ge 3 ]; then
        CUDA_VISIBLE_DEVICES=0 features server &
        CUDA_VISIBLE_DEVICES=1 features student &
        CUDA_VISIBLE_DEVICES=$(seq -s, 2 $((gpus - 1))) layers time --budget-s "$budget"
        wait
    elif [ "$gpus" -eq 2 ]; then
        (CUDA_VISIBLE_DEVICES=0 features student; CUDA_VISIBLE_DEVICES=0 features server) &
        CUDA_VISIBLE_DEVICES=1 layers time --budget-s "$budget"
        wait
    else
        layers time --budget-s "$((budget / 2))"
        features student
        features server
    fi
    tail -n 25 "$OUT"/features-*.log
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
