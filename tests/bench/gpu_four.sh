#!/usr/bin/env bash
# What is still wanted of GPUs, on a machine with one to four cards, in process sessions of their own that go on between calls (gpu_open.sh has the same parts for one card and one call).
#     bash tests/bench/gpu_four.sh begin REAL own       # after gpu_setup.sh finish and real: 400 off-policy steps, then 200 more of each kind, three seeds; about 1,200 s on four cards. ENGINE=vllm writes the samples by vLLM (p1, p2 and p5 too)
#     bash tests/bench/gpu_four.sh begin REAL journey   # the losses of several teachers and the pipeline; plan beside peaks; the three ways of training; the curriculum on the real pair; about 750 s on four cards
#     bash tests/bench/gpu_four.sh watch SECONDS        # until all is done or the time is up; what there is then lies in $OUT/four.tgz
# Write the next call before this one ends: the machine goes back 30 s after it, with all that runs there. SmolLM2's parts, p3 and p4 are needed: six stashes, 130 s until `begin`.
set -euo pipefail
work=/tmp/four
usage="usage: gpu_four.sh begin REAL own|journey | watch SECONDS"
case ${1:-} in
begin)
    real=${2:?$usage} part=${3:?$usage}
    # shellcheck disable=SC1091
    . /tmp/site.env
    chain() { # NAME CARDS COMMAND ...: one after the other, each with the seconds that it may take in front, and all with one log
        local name=$1 cards=$2 script=""
        mkdir -p "$work/$name"
        shift 2
        for command in "$@"; do
            script+="timeout -k 10 ${command%% *} python3 -W ignore -m tests.bench.${command#* } >>\"\$OUT/log\" 2>&1; echo \"== \$? \$SECONDS s: ${command//\"/}\" >>\"\$OUT/log\"; "
        done
        OUT=$work/$name CUDA_VISIBLE_DEVICES=$cards setsid nohup bash -c "$script touch \$OUT/ended" >/dev/null 2>&1 </dev/null &
    }
    count=$(nvidia-smi -L | wc -l)
    on() { echo $(($1 % count)); } # a card; of fewer than four some are shared, and times of what is on them together are not to be compared
    case $part in
    own)
        engine=${ENGINE:+--engine $ENGINE}
        chain own "$(seq -s, 0 $((count - 1)))" "280 real_on_policy warm --real $real --json --budget-s 270 --per-gpu $((count > 2 ? 1 : 2))" \
            "1200 real_on_policy more --real $real --json --budget-s ${MORE_S:-1000} --per-gpu 3 $engine --arms \"on-policy, JSD\" \"on-policy, reverse KL\" \"off-policy, the recipe\""
        ;;
    journey)
        pipeline=("120 cross_loss --device cuda --json" "600 rollouts pipeline --json --batch 16 --new-tokens 64 --limit 280 --engine hf --staleness 0 1 --steps 4")
        memory=("300 plan_memory --device cuda --json --shape 0.5B --ways qlora full" "400 plan_memory --device cuda --json --shape 1.5B --ways qlora full")
        qlora="700 qlora --device cuda --json --steps 40"
        curriculum="700 real --real $real --work /tmp/lyceum-curriculum --json --per-gpu 3 --steps 400 --budget-s 690 --arms gkd \"gkd, curriculum\""
        if [ "$count" -ge 4 ]; then
            chain pipeline 0 "${pipeline[@]}"
            chain memory 1 "${memory[@]}"
            chain curriculum 2 "$curriculum"
            chain qlora 3 "$qlora"
        else # what is timed has a card to itself as long as there are two
            chain pipeline 0 "${pipeline[@]}" "$qlora"
            chain memory "$(on 1)" "${memory[@]}" "$curriculum"
        fi
        ;;
    *)
        echo "$usage" >&2
        exit 2
        ;;
    esac
    ;;
watch)
    : "${OUT:?is where the figures go}"
    until=$((SECONDS + ${2:?$usage}))
    while [ "$SECONDS" -lt "$until" ]; do
        running=0
        for folder in "$work"/*/; do [ -e "$folder/ended" ] || running=1; done
        [ "$running" = 1 ] || pgrep -f 'tests.bench.(on_policy|many_teachers|curriculum)' >/dev/null || break
        sleep 3
    done
    cp /tmp/lyceum-real/on_policy.json "$work/own/" 2>/dev/null || true
    tar -C /tmp -czf "$OUT/four.tgz" four $([ -d /tmp/tasks ] && echo tasks)
    grep -h "^== " "$work"/*/log || true
    tail -n 2 "$work"/*/log | cut -c1-250
    nvidia-smi --query-gpu=memory.used,utilization.gpu --format=csv,noheader
    ;;
*)
    echo "$usage" >&2
    exit 2
    ;;
esac
