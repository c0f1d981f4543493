#!/usr/bin/env bash
# Everything that is still wanted of GPUs at once, on a machine with several cards, in process sessions of their own that go on between calls:
# card 0 times kernels and steps alone, card 1 measures memory and trains the real pair, the others train on-policy; the cores train small models (gpu_tasks.sh).
#     bash tests/bench/gpu_four.sh begin REAL          # after gpu_setup.sh finish
#     bash tests/bench/gpu_four.sh watch SECONDS       # until all is done or the time is up; what there is then lies in $OUT/four.tgz. Send the next call within 30 s.
set -euo pipefail
work=/tmp/four
case ${1:-} in
begin)
    real=${2:?usage: gpu_four.sh begin REAL}
    # shellcheck disable=SC1091
    . /tmp/site.env
    last=$(python3 -c 'import torch; print(torch.cuda.device_count() - 1)')
    rest=$([ "$last" -gt 2 ] && seq -s, 2 "$last" || echo "$last")
    chain() { # NAME CARDS COMMAND ...: one after the other, each with a log of its own
        local name=$1 cards=$2 script=""
        mkdir -p "$work/$name"
        shift 2
        for command in "$@"; do
            script+="timeout -k 10 ${command%% *} python3 -W ignore -m tests.bench.${command#* } >>\"\$OUT/log\" 2>&1; echo \"== \$? \$SECONDS s: ${command//\"/}\" >>\"\$OUT/log\"; "
        done
        OUT=$work/$name CUDA_VISIBLE_DEVICES=$cards setsid nohup bash -c "$script touch \$OUT/ended" >/dev/null 2>&1 </dev/null &
    }
    chain timed 0 "120 cross_loss --device cuda --json" "240 qlora --device cuda --json --steps 40" \
        "270 rollouts pipeline --json --batch 16 --new-tokens 128 --limit 120 --engine hf --staleness 0 1 --steps 4"
    chain memory 1 "160 plan_memory --device cuda --json --shape 0.5B" "200 plan_memory --device cuda --json --shape 1.5B" \
        "560 real --real $real --work /tmp/lyceum-curriculum --json --per-gpu 9 --steps 400 --budget-s 480 --arms sft gkd \"gkd, curriculum\""
    chain own "$rest" "260 real_on_policy warm --real $real --json --budget-s 250 --per-gpu 3" \
        "760 real_on_policy more --real $real --json --budget-s ${MORE_S:-600} --per-gpu 3 --arms \"on-policy, JSD\" \"on-policy, reverse KL\" \"off-policy, the recipe\""
    bash tests/bench/gpu_tasks.sh start
    ;;
watch)
    : "${OUT:?is where the figures go}"
    until=$((SECONDS + ${2:?usage: gpu_four.sh watch SECONDS}))
    while [ "$SECONDS" -lt "$until" ]; do
        [ -e $work/timed/ended ] && [ -e $work/memory/ended ] && [ -e $work/own/ended ] && ! pgrep -f 'tests.bench.(on_policy|many|curr)' >/dev/null && break
        sleep 3
    done
    cp /tmp/lyceum-real/on_policy.json $work/own/ 2>/dev/null || true
    tar -C /tmp -czf "$OUT/four.tgz" four tasks
    grep -h "^== " $work/*/log || true
    tail -n 2 $work/*/log /tmp/tasks/*.log | cut -c1-250
    nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader
    ;;
*)
    echo "usage: gpu_four.sh begin REAL | watch SECONDS" >&2
    exit 2
    ;;
esac
