"""What a published revision must fit: config, tokenizer and shapes of the model that a teacher's config names.

In: model folders; out: a small folder of the model's files without its weights, made by `up`, and refusals of what does not fit it. Weights
are never loaded: safetensors headers say names, shapes and dtypes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from teacher_server.backends.model_folder import find
from teacher_server.backends.weight_files import TensorOutline, outline_of
from teacher_server.config.server import TeacherConfig
from teacher_server.errors import ServerConfigError
from teacher_server.publishing.revisions import BASE, Revisions, model_key
from teacher_wire.core.errors import MismatchError, RequestError
from teacher_wire.labels.files import sync

_SHAPES = "lyceum-shapes.json"
_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_SMALL = (".json", ".txt", ".model", ".jinja")
_DTYPES = ("F64", "F32", "F16", "BF16")
# Keys of config.json that say nothing about what weights compute, or are the server's to choose.
_FREE = frozenset(
    [
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "use_cache",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "attn_implementation",
        "_attn_implementation",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "initializer_range",
        "id2label",
        "label2id",
    ]
)
_BOTH = ("model_type", "architectures")  # that must be told


@dataclass(frozen=True)
class Blueprint:
    """What is known of the model of a config without its weights.

    Attributes:
        model: its `model_key`.
        config: of config.json.
        shapes: of its weights, by name.
        folder: of its small files.
    """

    model: str
    config: Mapping[str, object]
    shapes: Mapping[str, tuple[int, ...]]
    folder: Path

    @classmethod
    def read(cls, revisions: Revisions) -> Blueprint | None:
        """The one that `up` has made; None if there is none."""
        folder = revisions.folder / BASE
        try:
            told = json.loads((folder / _SHAPES).read_text())
            config = json.loads((folder / _CONFIG).read_text())
            shapes = {name: tuple(shape) for name, shape in told["shapes"].items()}
            return cls(told["model"], config, shapes, folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def check_config(self, config_json: bytes) -> None:
        """Refuses a config of another architecture.

        Raises:
            RequestError: it is none, or has code to run.
            MismatchError: naming the key, its value here and there.
        """
        try:
            given = json.loads(config_json)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise RequestError("no JSON object", field="config_json", value=f"{len(config_json)} bytes")
        if "auto_map" in given:
            raise RequestError("names code to run, which is never taken", field="config_json.auto_map")
        absent = [key for key in _BOTH if key in self.config and key not in given]
        if absent:
            raise MismatchError("says no architecture", field=f"config_json.{absent[0]}", limit=self.config[absent[0]])
        for key in sorted(given.keys() & self.config.keys() - _FREE):
            if given[key] != self.config[key]:
                raise MismatchError(
                    "another architecture than the teacher's",
                    field=f"config_json.{key}", value=str(given[key])[:100], limit=str(self.config[key])[:100],
                )  # fmt: skip

    def check_weights(self, files: Mapping[str, Mapping[str, TensorOutline]]) -> dict[str, str]:
        """Refuses weights of other names, shapes or kinds of numbers.

        Args:
            files: outlines of their tensors, by file.

        Returns:
            The file of each tensor.

        Raises:
            MismatchError, RequestError: naming the tensor.
        """
        where: dict[str, str] = {}
        for file, tensors in files.items():
            for name, outline in tensors.items():
                if name in where:
                    raise RequestError("a tensor twice", field=f"files.{file}", value=name[:100])
                where[name] = file
                if outline.dtype not in _DTYPES:
                    raise MismatchError(
                        "weights are floating-point numbers",
                        field=name[:100],
                        value=outline.dtype,
                        limit="|".join(_DTYPES),
                    )
                known = self.shapes.get(name)
                if known is None and not self._tied(name):
                    raise MismatchError("a weight that the teacher does not have", field="weights", value=name[:100])
                if known is not None and known != outline.shape:
                    raise MismatchError("another shape", field=name, value=list(outline.shape), limit=list(known))
        absent = sorted(
            name for name in self.shapes if name not in where and not self._tied(name) and not _derived(name)
        )
        if absent:
            raise MismatchError(f"{len(absent)} weights are missing", field="weights", value=absent[0])
        return where

    def _tied(self, name: str) -> bool:
        """Whether a weight is the embedding under another name, which files may have or leave out."""
        return bool(self.config.get("tie_word_embeddings")) and name.endswith("lm_head.weight")

    def complete(self, folder: Path, where: Mapping[str, str], size_bytes: int) -> None:
        """Adds the model's own small files, and an index, to a folder of weights.

        Raises:
            OSError: the disk does not take it.
        """
        for path in self.folder.iterdir():
            if path.name not in (_SHAPES, _INDEX):
                shutil.copyfile(path, folder / path.name)
        if set(where.values()) != {"model.safetensors"}:
            index = {"metadata": {"total_size": size_bytes}, "weight_map": dict(sorted(where.items()))}
            (folder / _INDEX).write_text(json.dumps(index, indent=1))


def make(config: TeacherConfig) -> None:
    """Writes the blueprint of a teacher's own model, if it is not there already.

    Raises:
        ServerConfigError: the model is none of one folder of safetensors, or the disk does not take it.
    """
    assert config.publish is not None
    revisions = Revisions.of(config.publish, config.name)
    known, key = Blueprint.read(revisions), model_key(config)
    files = find(str(getattr(config.backend, "model", "")), getattr(config.backend, "revision", None))
    shapes = {
        name: outline.shape
        for file in sorted(files.folder.glob("*.safetensors"))
        for name, outline in outline_of(file).items()
    }
    told = json.loads((files.folder / _CONFIG).read_text())
    if known is not None and (known.model, known.config, dict(known.shapes)) == (key, told, shapes):
        return
    fresh = revisions.folder / f".{BASE}"
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for source in (files.folder, files.tokenizer):  # an adapter may have a tokenizer of its own
            for path in sorted(source.iterdir()):
                if path.is_file() and path.suffix in _SMALL and path.name != _INDEX and "adapter" not in path.name:
                    shutil.copyfile(path, fresh / path.name)
        shutil.copyfile(files.folder / _CONFIG, fresh / _CONFIG)
        (fresh / _SHAPES).write_text(json.dumps({"model": key, "shapes": shapes}))
        for path in [*fresh.iterdir(), fresh]:
            sync(path)
        shutil.rmtree(revisions.folder / BASE, ignore_errors=True)
        fresh.replace(revisions.folder / BASE)
    except OSError as error:
        raise ServerConfigError(
            f"teachers.{config.name}.publish.folder {config.publish.folder}: {error.strerror}"
        ) from error


def _derived(name: str) -> bool:
    """Buffers that older files hold and newer ones make themselves."""
    return name.endswith((".inv_freq", ".masked_bias", ".attn.bias"))
