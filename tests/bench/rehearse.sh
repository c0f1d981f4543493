#!/usr/bin/env bash
# Tries gpu_student, features (`--half student`), gpu_server, student_layers or recordings (its plain way) without a GPU, so that no lent minute goes into a typing error: a copy in which "cuda" is "cpu" and
# every shape is small. The figures mean nothing; that it comes to its table does.
#     bash tests/bench/rehearse.sh gpu_student --steps 8
#     bash tests/bench/rehearse.sh gpu_server --quick --seconds 12 --anchors /nonexistent
set -euo pipefail
bench=${1:?usage: rehearse.sh BENCH [OPTION ...]}
shift
top=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$top/.venv/bin/python}
layers=2
[ "$bench" != features ] || layers=13 # the article's preset reads block 12
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$top/tests" "$copy/"
cd "$copy/tests/bench"
sed -i 's/device="cuda"/device="cpu"/g; s/torch.device("cuda")/torch.device("cpu")/g; s/\.cuda(non_blocking=True)//g; s/\.cuda()//g
        s/torch.autocast("cuda"/torch.autocast("cpu"/g; s/pinned=True/pinned=False/; s/ProfilerActivity.CUDA/ProfilerActivity.CPU/' ./*.py
sed -i 's/^V, K, SEQUENCES, LENGTH, TEACHER_WIDTH = .*/V, K, SEQUENCES, LENGTH, TEACHER_WIDTH = 2000, 64, 2, 80, 96/
        s/"hidden_size": 1536/"hidden_size": 64/; s/"intermediate_size": 8960/"intermediate_size": 128/
        s/"num_hidden_layers": 28/"num_hidden_layers": '$layers'/; s/"num_attention_heads": 12/"num_attention_heads": 4/' student_memory.py
sed -i 's/^VOCAB, /VOCAB, /; s/152_064/2_048/; s/"hidden_size": 3584/"hidden_size": 96/; s/"intermediate_size": 18944/"intermediate_size": 128/
        s/"num_hidden_layers": 28/"num_hidden_layers": '$layers'/; s/"num_attention_heads": 28/"num_attention_heads": 4/' gpu_teacher.py
# Recorded passes need a GPU: here the same runs are made without.
sed -i 's/"graphs": graphs/"graphs": False/; s/^import torch$/import torch\nimport no_gpu/' gpu_student.py
sed -i "s/^import torch$/import torch\nimport no_gpu/" gpu_server.py student_layers.py recordings.py features.py
cat >"$copy/no_gpu.py" <<'END'
import torch

for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "set_device"):
    setattr(torch.cuda, name, lambda *_, **__: None)
torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = torch.cuda.memory_reserved = lambda *_, **__: 0
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_name = lambda *_: "no GPU"
END
cd "$copy"
OUT=$copy OMP_NUM_THREADS=2 PYTHONPATH=$copy:$top/proto:$top "$python" -W ignore -m "tests.bench.$bench" "$@"
