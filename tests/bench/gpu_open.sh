#!/usr/bin/env bash
# What issues 16 to 18 still want of a GPU (and how 15's figures were made): measuring calls on one warm machine, 200 to 580 s each.
#
# Before the lease, here: `python -m tests.real.fetch REAL && bash tests/bench/pack_real.sh REAL .pack && bash tests/bench/pack_gpu.sh .pack` (p1, p2 and p5 hold vLLM, which only
# ENGINE=vllm needs; p4 holds Ray, which none of these parts needs). `.pack` is ignored by git and is named in `carry`. The machine goes back 30 s after a call: send the next at once.
# Stashes of 7 s each, then the parts; check the answer of each stash before the next call, since what was not stashed costs the whole call:
#     run(carry=[".pack/r1"], timeout_s=120, command="bash tests/bench/gpu_setup.sh stash .pack/r1")                          # and so r2 and p3
#     run(timeout_s=590, command="bash tests/bench/gpu_open.sh own /tmp/real 570")                                            # and so on
# The last number is the budget in seconds, from the start of the call. `own`: 400 off-policy steps, then 200 more off-policy and on-policy, three seeds (350 s were not enough for six
# runs at once with engine hf on one H100: three a card, or ENGINE=vllm, which writes 14 times as fast at 1.5B shapes and starts for 80 s). `pipeline`: rollouts beside training, and
# one after the other. `journey`: cross_loss, plan_memory, qlora, and the curriculum on the real pair. `kernels` (500 s): tests/gpu, the kernels alone, the server's costs on the first card,
# a student's on the last one. `layers` (530 s): more layers, one seed, 400 steps; cos 12 and cos 24, three seeds, 1,200 steps.
# Every part leaves JSON and logs in $OUT as it goes, and one that fails does not end the others. Figures are compared within one call: cards differ.
# PER_GPU: runs at a time on a card. SMALL=1: tiny sizes, to rehearse without a GPU (REAL may then be any pair of `tests.real.fetch`'s names).
set -uo pipefail
usage="usage: gpu_open.sh kernels|layers|own|pipeline|journey REAL SECONDS"
part=${1:?$usage} real=${2:?$usage} budget=${3:?$usage}
: "${OUT:?is where the figures go}"
began=$SECONDS
left() { echo $((budget - (SECONDS - began) - ${1:-0})); }
said() { echo "== $* ($((SECONDS - began)) s)"; }
python=${PYTHON:-python3}
small=${SMALL:-}
steps() { [ -n "$small" ] && echo "--steps $1"; }
pair=(--real "$real" --json)
[ -z "$small" ] || pair+=(--work "$OUT/work" --batch 2 --held-out 4)

quietly() { # LOG COMMAND ...: within what is left; its end is shown
    local log=$OUT/$1.log code=0
    [ "$(left 5)" -gt 10 ] || { said "$1: not started, $(left) s are left"; return; }
    shift
    timeout -k 10 "$(left 5)" "$@" >"$log" 2>&1 || code=$?
    said "$(basename "$log" .log): exit $code"
    tail -n "${LINES_SHOWN:-14}" "$log" | cut -c1-240
}
bench() { # LOG MODULE ...
    local log=$1
    shift
    quietly "$log" "$python" -W ignore -m "tests.bench.$@"
}
prepare() {
    [ -n "$small" ] && return
    if [ ! -e /tmp/site.env ]; then
        parts=()
        for sums in /tmp/pack/SHA256SUMS.p?; do parts+=("${sums##*.}"); done
        bash tests/bench/gpu_setup.sh finish "${parts[@]}" || exit 1
    fi
    # shellcheck disable=SC1091
    . /tmp/site.env
    [ -e "$real/smollm2-15/model.safetensors" ] || bash tests/bench/gpu_setup.sh real "$real" || exit 1
    said prepared
}
warm() { # SECONDS
    # shellcheck disable=SC2046
    LINES_SHOWN=6 bench on_policy-warm real_on_policy warm "${pair[@]}" --budget-s "$1" --per-gpu "${PER_GPU:-2}" $(steps 2) $([ -n "$small" ] && echo --seeds 0 --sampled 2 --max-new-tokens 8)
}
card() { # NUMBER COMMAND ...: with one card alone, if there are several
    local number=$1
    shift
    if [ "$gpus" -gt 1 ]; then CUDA_VISIBLE_DEVICES=$number "$@"; else "$@"; fi
}
server_side() {
    # The tests of pytest alone: the machine has none of its plugins. Kernels are tested where they are.
    quietly gpu-tests timeout -k 10 220 "$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:warnings -q --maxfail=5 ${small:+--collect-only} \
        tests/teacher_server/signals/test_feature_kernels.py tests/teacher_server/backends/test_kernels.py tests/student_trainer/losses/test_fused.py tests/gpu
    if [ -n "$small" ]; then
        TRITON_INTERPRET=1 bench feature-kernels feature_kernels --json --sequences 1 --tokens 5 --heads 4 --groups 2 --channels 16 --ffn 64
    else
        bench feature-kernels feature_kernels --json
    fi
    bench features-server features --half server --json
}
student_side() {
    if [ -n "$small" ]; then
        quietly features-student bash tests/bench/rehearse.sh features --half student --steps 2
    else
        bench features-student features --half student --json --steps 16
    fi
}

prepare
gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
case $part in
kernels)
    if [ "$gpus" -gt 1 ]; then
        card $((gpus - 1)) student_side &
        other=$!
        card 0 server_side
        wait "$other"
    else
        server_side
        student_side
    fi
    [ "$(left)" -lt 90 ] || warm "$(left 25)"
    ;;
layers)
    # shellcheck disable=SC2046
    bench layers-sweep real_layers sweep "${pair[@]}" --per-gpu "${PER_GPU:-3}" --seeds 0 --budget-s $(($(left) * 2 / 5)) $(steps 2) \
        --arms "cos 3 uniform(6)" "cos 12 uniform(6)" "cos 12 uniform(14)" "cos 6" "attention relation 0.05"
    # shellcheck disable=SC2046
    bench layers-final real_layers final "${pair[@]}" --per-gpu "${PER_GPU:-5}" --seeds $([ -n "$small" ] && echo 0 || echo 0 1 2) --budget-s "$(left 25)" $(steps 2) --arms "cos 12" "cos 24"
    ;;
own)
    work=/tmp/lyceum-real warm_s=230
    [ -z "$small" ] || work=$OUT/work warm_s=300
    for seed in 0 $([ -n "$small" ] || echo 1 2); do
        [ -d "$work/warm-$seed/final" ] || { PER_GPU=3 warm "$warm_s"; break; }
    done
    # shellcheck disable=SC2046
    bench on_policy-more real_on_policy more "${pair[@]}" --budget-s "$(left 20)" --per-gpu "${PER_GPU:-3}" --engine "${ENGINE:-hf}" $(steps 2) \
        $([ -n "$small" ] && echo --seeds 0 --sampled 2 --max-new-tokens 8) --arms "on-policy, JSD" "on-policy, reverse KL" "off-policy, the recipe"
    ;;
pipeline)
    shape=(--batch 16 --new-tokens 128 --limit 200)
    [ -z "$small" ] || shape=(--shape tiny --batch 2 --limit 100)
    bench rollouts-pipeline rollouts pipeline --json "${shape[@]}" --engine "${ENGINE:-hf}" --staleness 0 1 --steps $([ -n "$small" ] && echo 1 || echo 4)
    ;;
journey)
    # What a run takes of the card, by `plan` and by itself; then the three ways of training. Peaks are a process's own, times are not: the shapes go first, two at a time.
    if [ -n "$small" ]; then
        bench plan_memory plan_memory --device cpu --tiny --json
        bench qlora qlora --device cpu --json --steps 5
    else
        bench cross_loss cross_loss --device cuda --json
        card 0 bench plan_memory-small plan_memory --device cuda --json --shape 0.5B &
        other=$!
        card $((gpus - 1)) bench plan_memory-large plan_memory --device cuda --json --shape 1.5B
        wait "$other"
        bench qlora qlora --device cuda --json --steps 40
    fi
    # shellcheck disable=SC2046
    bench curriculum real "${pair[@]}" --per-gpu "${PER_GPU:-5}" --budget-s "$(left 25)" $(steps 2) --arms "sft" "gkd" "gkd, curriculum"
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
said done
