#!/usr/bin/env bash
# What is still wanted of GPUs, on a machine with one to four cards, in process sessions of their own that go on between calls (gpu_open.sh has the same parts for one card and one call).
#     bash tests/bench/gpu_four.sh begin REAL PART ...   # after gpu_setup.sh finish and real; the parts run at the same time
#     bash tests/bench/gpu_four.sh watch SECONDS         # until all is done or the time is up; what there is then lies in $OUT/four.tgz
# Parts: `own`, 400 off-policy steps, then 200 more of each kind, three seeds (ENGINE=vllm writes the samples by vLLM: p1, p2 and p5 too; MORE_S and PER_GPU bound the latter half);
# `memory`, plan beside peaks; `curriculum`, on the real pair; `timed`, the losses of several teachers (also with the partitions in .pack/parts) and the pipeline, and `ways`, the three ways of training: these want a card
# to themselves.
# They run from a copy of the tree, so that later calls may bring another one. Write the next call before this one ends: the machine goes back 30 s after it, with all that runs
# there. SmolLM2's parts, p3 and p4 are needed: six stashes, 130 s until `begin`.
set -euo pipefail
work=/tmp/four
usage="usage: gpu_four.sh begin REAL own|memory|curriculum|timed|ways ... | watch SECONDS"
case ${1:-} in
begin)
    real=${2:?$usage}
    shift 2
    # shellcheck disable=SC1091
    . /tmp/site.env
    rm -rf /tmp/tree
    cp -r . /tmp/tree
    export PYTHONPATH=${PYTHONPATH//$PWD//tmp/tree}
    cd /tmp/tree
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
    on() { echo $(($1 % count)); } # a card; of fewer than four some are shared
    for part in "$@"; do
        case $part in
        own)
            engine=${ENGINE:+--engine $ENGINE}
            chain own "$(seq -s, 0 $((count - 1)))" "420 real_on_policy warm --real $real --json --budget-s 410 --per-gpu $((count > 2 ? 1 : 3))" \
                "1300 real_on_policy more --real $real --json --budget-s ${MORE_S:-1000} --per-gpu ${PER_GPU:-3} $engine --arms \"on-policy, JSD\" \"on-policy, reverse KL\" \"off-policy, the recipe\""
            ;;
        memory)
            chain memory "$(on 1)" "300 plan_memory --device cuda --json --shape 0.5B --ways qlora full" "400 plan_memory --device cuda --json --shape 1.5B --ways qlora full"
            ;;
        curriculum)
            chain curriculum "$(on 2)" "900 real --real $real --work /tmp/lyceum-curriculum --json --per-gpu 3 --steps 400 --budget-s 890 --arms gkd \"gkd, curriculum\""
            ;;
        timed)
            cross=("120 cross_loss --device cuda --json")
            for file in .pack/parts/*.safetensors; do # of tests.bench.coverage --partitions, carried with the call
                [ -e "$file" ] && cross+=("60 cross_loss --device cuda --json --partition $file")
            done
            chain timed "$(on 3)" "${cross[@]}" "900 rollouts pipeline --json --engine vllm --staleness 0 1 --steps 6 --limit 440"
            ;;
        ways)
            chain ways "$(on 3)" "700 qlora --device cuda --json --steps 40"
            ;;
        *)
            echo "$usage" >&2
            exit 2
            ;;
        esac
    done
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
