#!/usr/bin/env bash
# On the GPU machine: puts what pack_gpu.sh made into /tmp/site. A carried folder a call, then once `finish`:
#     bash tests/bench/gpu_setup.sh stash .pack/p1     # and p2 to p5, each in the call that carries it
#     bash tests/bench/gpu_setup.sh finish && . /tmp/site.env && python3 -m tests.bench.gpu_vllm
# `finish p3` where the small packages are enough, `finish p3 p4` with Ray; `real FOLDER` after stashing r1 and r2 of pack_real.sh makes the real pair there.
# `finish` checks that all parts are there and whole, and says which of the machine's own packages /tmp/site puts others in front of.
# /tmp/site.env sets PYTHONPATH (absolute, since Ray's and vLLM's processes inherit it) and what this set of packages needs.
set -euo pipefail
stash=/tmp/pack site=/tmp/site

unpack() { # ARCHIVE
    if command -v xz >/dev/null; then
        xz -dc -T0 "$1" | tar -C "$site" -xf -
    else
        python3 -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2], filter="tar")' "$1" "$site"
    fi
}

case ${1:-} in
stash)
    mkdir -p "$stash"
    cp "${2:?usage: gpu_setup.sh stash FOLDER}"/* "$stash/"
    du -sh "$stash"
    ;;
finish)
    shift
    parts=("$@")
    [ $# -gt 0 ] || parts=(p1 p2 p3 p4 p5)
    for part in "${parts[@]}"; do
        [ -e "$stash/SHA256SUMS.$part" ] || { echo "$stash lacks $part: the machine was given back in between?" >&2; exit 1; }
    done
    for part in "${parts[@]}"; do (cd "$stash" && sha256sum --quiet -c "SHA256SUMS.$part"); done
    rm -rf "$site"
    mkdir -p "$site"
    running=()
    for archive in "$stash"/*.tar.xz; do
        [ "$(basename "$archive")" = gguf.tar.xz ] && continue
        unpack "$archive" &
        running+=($!)
    done
    for job in "${running[@]}"; do wait "$job"; done
    python3 -m compileall -q -j 0 "$site" >/dev/null 2>&1 || true # once, rather than in each of many processes
    cat >/tmp/site.env <<END
export PYTHONPATH=$site:$PWD/proto:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 RAY_USAGE_STATS_ENABLED=0
export VLLM_USE_FLASHINFER_SAMPLER=0 # flashinfer is not among the packages
END
    . /tmp/site.env
    python3 - "$site" <<'END'
import sys
from importlib.metadata import distributions

site = sys.argv[1]
there = {d.name.lower().replace("_", "-"): d.version for d in distributions(path=[p for p in sys.path if p != site and "site-packages" in p])}
ours: dict[str, list[str]] = {}
for d in distributions(path=[site]):
    ours.setdefault(d.name.lower().replace("_", "-"), []).append(d.version)
twice = {name: versions for name, versions in ours.items() if len(versions) > 1}
shadowed = {name: f"{there[name]} -> {versions[0]}" for name, versions in ours.items() if name in there}
kept = {"torch", "triton", "numpy", "transformers", "tokenizers", "safetensors"} & set(ours)
print(f"{len(ours)} packages in {site}; put in front of the machine's own: {shadowed}")
if twice or kept:
    sys.exit(f"wrong: two versions {twice}, must stay the machine's {kept}")
import grpc
import google.protobuf
import numpy
import importlib.util

import pydantic
import torch
import transformers

print(f"grpcio {grpc.__version__}, protobuf {google.protobuf.__version__}, pydantic {pydantic.__version__}, ray {importlib.util.find_spec('ray') and __import__('ray').__version__}, "
      f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {numpy.__version__}")
END
    ;;
real)
    real=${2:?usage: gpu_setup.sh real FOLDER}
    for part in r1 r2; do (cd "$stash" && sha256sum --quiet -c "SHA256SUMS.$part"); done
    mkdir -p "$real/gguf/gguf-package"
    cat "$stash"/model.gguf.* >"$real/gguf/model.gguf"
    (site=$real/gguf/gguf-package && unpack "$stash/gguf.tar.xz")
    cp "$stash"/*.jsonl "$real/"
    mkdir -p /tmp/aside # transformers, when it finds mistral-common (which vLLM needs), reads tokenizers of gguf files by it and fails
    mv "$site"/mistral_common* /tmp/aside/ 2>/dev/null || true
    python3 -W ignore -m tests.real.fetch "$real" --gguf "$real/gguf" 2>&1 | tail -n 3
    mv /tmp/aside/mistral_common* "$site"/ 2>/dev/null || true
    ls "$real"
    ;;
*)
    echo "usage: gpu_setup.sh stash FOLDER | finish [PART ...] | real FOLDER" >&2
    exit 2
    ;;
esac
