#!/usr/bin/env bash
# Packs vLLM 0.25.1, Ray 2.60, bitsandbytes 0.50.2 and what they and our edge need for a GPU machine (x86-64, Python 3.12, torch 2.11+cu130, Hopper) that
# reaches no package registry: p1, p2 and p5 (vLLM), p3 (the small packages) and p4 (Ray), folders of archives, each at least 10 MiB below the 64 MiB that
# travel with the tree; gpu_setup.sh unpacks them there into one folder.
#     bash tests/bench/pack_gpu.sh .pack        # about six minutes on two cores; 400 MB of downloads, none of them kept
#     bash tests/bench/pack_gpu.sh .pack p3     # without vLLM: p3 and p4 alone
# Left out: vLLM's attention library for Ampere, its Rust front end and kernels for other chips; of Ray its jars, dashboard pages, debug
# symbols and the libraries that ray.serve does not import. torch, triton, numpy, transformers are the machine's own.
set -euo pipefail
out=${1:?usage: pack_gpu.sh FOLDER [p3]}
only=${2:-}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
target=(--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none)
for n in 39 35 34 31 28 27 26 24 17 12 5; do target+=(--platform "manylinux_2_${n}_x86_64"); done
target+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)

pack() { # ARCHIVE LEVEL FOLDER NAME...: blocks of 8 MiB, so that unpacking uses all cores
    local archive=$1 level=$2 folder=$3
    shift 3
    mkdir -p "$(dirname "$archive")"
    tar -C "$folder" -cf - "$@" | xz -T0 "-$level" --block-size=8MiB >"$archive"
}

rm -rf "$out"/p[1-5]
# Without vLLM its mistral-common stays out too: transformers, when it finds it, reads tokenizers of gguf files by it and fails.
cp "$here/gpu_packages.txt" "$work/packages.txt"
[ "$only" != p3 ] || sed -i '/^mistral-common/d' "$work/packages.txt"
python3 -m pip install -q --no-compile "${target[@]}" --target "$work/site" -r "$work/packages.txt"
rm -rf "$work/site/bin"
pack "$out/p3/site.tar.xz" 6 "$work/site" .

python3 -m pip download -q "${target[@]}" -d "$work" ray==2.60.0
unzip -q "$work"/ray-*.whl -d "$work/ray"
rm "$work"/ray-*.whl
(
    cd "$work/ray/ray"
    rm -rf jars rllib tune train data llm air dashboard/client/build serve/llm
    strip --strip-unneeded _raylet.so core/src/ray/gcs/gcs_server core/src/ray/raylet/raylet
    chmod +x core/src/ray/gcs/gcs_server core/src/ray/raylet/raylet
)
pack "$out/p4/ray.tar.xz" 6 "$work/ray" ray ray-2.60.0.dist-info

# The 4-bit base of QLoRA: bitsandbytes with the kernels of the machine's CUDA alone.
python3 -m pip download -q "${target[@]}" -d "$work" bitsandbytes==0.50.2
unzip -q "$work"/bitsandbytes-*.whl -d "$work/bitsandbytes"
rm "$work"/bitsandbytes-*.whl
find "$work/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*_cpu.so' ! -name '*_cuda130.so' -delete
pack "$out/p3/bitsandbytes.tar.xz" 6 "$work/bitsandbytes" .

if [ "$only" != p3 ]; then
python3 -m pip download -q "${target[@]}" -d "$work" vllm==0.25.1
unzip -q "$work"/vllm-*.whl -d "$work/vllm"
rm "$work"/vllm-*.whl
core=vllm/_C_stable_libtorch.abi3.so moe=vllm/_moe_C_stable_libtorch.abi3.so
pack "$out/p1/vllm_core.tar.xz" 3 "$work/vllm" "$core"
pack "$out/p2/vllm_moe.tar.xz" 3 "$work/vllm" "$moe"
(
    cd "$work/vllm"
    rm -rf "$core" "$moe" vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/vllm-rs vllm/third_party/deep_gemm vllm/third_party/fmha_sm100
    find vllm \( -name '*.cu' -o -name '*.hpp' -o -name '*.h' \) -delete
)
pack "$out/p5/vllm_python.tar.xz" 6 "$work/vllm" vllm vllm-0.25.1.dist-info
fi

for part in "$out"/p?; do
    (cd "$part" && sha256sum ./*.tar.xz >"SHA256SUMS.$(basename "$part")")
    size=$(du -sb "$part" | cut -f1)
    echo "$part: $size bytes"
    [ "$size" -lt $((60 << 20)) ] || { echo "$part: above 60 MiB" >&2; exit 1; }
done
