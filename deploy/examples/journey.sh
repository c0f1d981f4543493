#!/usr/bin/env bash
# The whole way of a student, from raw files of several shapes to a served model that answers as the trained one does:
#
#   deploy/examples/journey.sh TEACHER_FOLDER WORK_FOLDER [LAYERS]
#
# TEACHER_FOLDER is any causal language model with a chat template; on a machine without a GPU a small one. Everything is written below
# WORK_FOLDER, which must not exist. PYTHON, PORT and STEPS may be set. It stops at the first command that fails.
set -euo pipefail
teacher=$1 work=$2 layers=${3:-1}
python=${PYTHON:-python3} port=${PORT:-50061} steps=${STEPS:-6}
until_ready() { # the server that is $pid says so in its log
  until grep -q "teacher-server ready on" "$1"; do
    kill -0 $pid 2>/dev/null || { cat "$1" >&2; exit 1; }
    sleep 0.5
  done
}
student() { echo "== student-trainer $*" >&2; "$python" -m student_trainer.cli "$@"; }
[ ! -e "$work" ] || { echo "$work is there already" >&2; exit 2; }
mkdir -p "$work/raw"

# Raw files as people have them: instructions, conversations, prompts with completions, a table.
"$python" - "$work/raw" <<'PY'
import csv, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
animals = ["cat", "dog", "mat", "old cat", "old dog", "run"]
lines = lambda name, rows: (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
lines("instructions.jsonl", [{"instruction": "Say what you saw.", "input": f"the {a}", "output": f"saw the {a} sat on a mat"} for a in animals])
lines("chat.jsonl", [{"messages": [{"role": "user", "content": f"and the {a}?"}, {"role": "assistant", "content": f"the {a} sat by 一 mat 🐈"}]} for a in animals])
lines("sharegpt.jsonl", [{"conversations": [{"from": "human", "value": f"by {a}"}, {"from": "gpt", "value": f"the {a} and an old dog"}]} for a in animals])
with open(folder / "pairs.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["prompt", "completion"])
    table.writerows([f"run, {a}", f"the {a} run on"] for a in animals)
lines("heldout.jsonl", [{"instruction": "Say what you saw.", "input": f"an {a}", "output": f"saw an {a} by the mat"} for a in animals])
lines("questions.jsonl", [{"prompt": f"Say what you saw. the {a}"} for a in animals])
with open(folder / "exam.csv", "w", newline="") as file:
    table = csv.writer(file)
    table.writerow(["id", "question", "A", "B", "C", "D", "answer"])
    table.writerows([i, f"What sat on the mat, {a}?", "the cat", "the dog", "a mat", "an old dog", "ABCD"[i % 4]] for i, a in enumerate(animals))
PY

student new "$work/student" --from "$teacher" --layers "$layers"
config=("$work/student/student.yaml" "run.output_dir=$work/run" "run.cache_dir=$work/cache" "teacher.address=127.0.0.1:$port"
  "data.train=[$work/raw/instructions.jsonl,$work/raw/chat.jsonl,$work/raw/sharegpt.jsonl,$work/raw/pairs.csv]"
  "data.eval=[$work/raw/heldout.jsonl]" "train.max_steps=$steps" "train.eval_steps=$steps" "train.save_steps=$steps" "train.warmup_steps=1"
  "train.log_steps=2" "train.report_to=[]" "model.threads=1" "model.lora={rank: 4}" "train.learning_rate=1.0e-2")

# One deployment teaches every command below; the end of this script ends it.
"$python" -m teacher_server.cli up "$work/student/teacher.yaml" "edge.port=$port" >"$work/teacher.log" 2>&1 &
pid=$!
trap 'kill -TERM $pid 2>/dev/null; wait $pid 2>/dev/null || true' EXIT
until_ready "$work/teacher.log"

student plan "${config[@]}" --budget 24GiB
student label "${config[@]}"
student train "${config[@]}"
student evaluate "$work/run" --teacher "127.0.0.1:$port" --rows "$work/raw/heldout.jsonl" --tasks "$work/raw/exam.csv" --answers 2 --max-new-tokens 8 --out "$work/evaluation"
student infer "$work/run" --prompts "$work/raw/questions.jsonl" --out "$work/before.jsonl" --max-new-tokens 12
student compare "${config[@]}" --arms sft gkd --seeds 2 --out "$work/compare"
student report "$work/run" "$work/compare" --evaluation "$work/evaluation/evaluation.json" --out "$work/report.html"
kill -TERM $pid
wait $pid || true

student export "$work/run" "$work/exported" --rows "$work/raw/questions.jsonl" --max-new-tokens 12

# The export, served by vLLM through the same server, answers the same greedy tokens as the student did before it was exported.
cat >"$work/served.yaml" <<YAML
edge: {host: 127.0.0.1, port: $port}
ray: {object_store_mb: 256}
teachers:
  - name: exported
    num_cpus: 0.5
    backend: {kind: vllm, model: $work/exported, dtype: float32, roles: [generate], kv_cache_gb: 0.25, enforce_eager: true}
YAML
"$python" -m teacher_server.cli up "$work/served.yaml" >"$work/served.log" 2>&1 &
pid=$!
until_ready "$work/served.log"
student infer "127.0.0.1:$port" --teacher-tokenizer "$work/exported" --prompts "$work/raw/questions.jsonl" --out "$work/after.jsonl" --max-new-tokens 12
"$python" - "$work" <<'PY'
import json, sys
from pathlib import Path
before, after = ([json.loads(line) for line in (Path(sys.argv[1]) / f"{name}.jsonl").open()] for name in ("before", "after"))
answers = [[row["messages"][-1]["content"] for row in rows] for rows in (before, after)]
assert len(answers[0]) == len(answers[1]) > 0 and answers[0] == answers[1], f"another answer is served than was trained: {answers}"
print(f"done: {len(answers[0])} answers of the served export are those of the trained student; look at {sys.argv[1]}/report.html")
PY
