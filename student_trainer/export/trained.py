"""What is exported: a run's result, an adapter, or a whole model; and how it is loaded to be asked.

In: a folder; out: `Trained`. An adapter keeps its base as `model.path` finds it (docs/train/models.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.config.data import DataConfig
from student_trainer.config.files import parse_as, read_tree
from student_trainer.config.model import LoraSettings, ModelConfig, QuantizeSettings
from student_trainer.errors import ConfigError, ModelError, RunError
from student_trainer.files import read_object

FINAL_NAME, RUN_CONFIG = "final", "config.yaml"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Trained:
    """A trained student on disk.

    Attributes:
        name: as the user wrote it.
        folder: with its weights, or its adapter's.
        is_adapter: whether these are to be merged.
        data: the section `data` of its run, whose rows it can be asked about; None where there is no run.
        dtype: of its weights; for an adapter, of the base that it was trained on.
        quantize: how its run kept the base in 4 bit; None for a plain base. An adapter without its run does not say.
    """

    name: str
    folder: Path
    is_adapter: bool
    data: DataConfig | None
    dtype: str
    quantize: QuantizeSettings | None = None

    @property
    def settings(self) -> ModelConfig:
        """How an adapter is loaded on its base: as it was trained, without what makes training faster."""
        lora = LoraSettings(fused=False)
        return ModelConfig(
            path=str(self.folder),
            dtype=self.dtype,  # type: ignore[arg-type]
            lora=lora,
            quantize=self.quantize,
            compiled=False,
            graphs=False,
        )


def find_trained(path: Path) -> Trained:
    """Looks what a folder is.

    Raises:
        RunError: no folder, or a run without a result.
        ModelError: neither a run nor a model, a quantised model, or a config that cannot be read.
    """
    if not path.is_dir():
        raise RunError(f"{path}: no such folder; name a run, an adapter or a model")
    folder, tree = path, dict[str, Any]()
    if (path / RUN_CONFIG).is_file() and (path / "run.json").is_file():
        folder = path / FINAL_NAME
        tree = read_tree(path / RUN_CONFIG)
        if not (path / "result.json").is_file():
            raise RunError(
                f"{path}: this run has no result yet: end it with student-trainer train {path / RUN_CONFIG} --resume, or name one of its checkpoints"
            )
    if (folder / "adapter_config.json").is_file():
        return Trained(str(path), folder, True, _data(tree, path), _dtype_of_base(tree, folder), _quantize(tree, path))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder}: is neither a run (run.json), an adapter (adapter_config.json) nor a model (config.json)"
        )
    config = _object(folder / "config.json")
    if config.get("quantization_config"):
        raise ModelError(
            f"{folder}: its weights are quantised already; name the model or the run that they were made from"
        )
    return Trained(str(path), folder, False, _data(tree, path), _dtype(config, folder))


def _data(tree: Mapping[str, Any], path: Path) -> DataConfig | None:
    """The run's own rows; other sections are not read, so a run of an older version can be exported."""
    return parse_as(DataConfig, dict(tree["data"]), str(path / RUN_CONFIG)) if "data" in tree else None


def _quantize(tree: Mapping[str, Any], path: Path) -> QuantizeSettings | None:
    section = tree.get("model")
    found = section.get("quantize") if isinstance(section, Mapping) else None
    if not found:
        return None
    return parse_as(QuantizeSettings, {"kind": found} if isinstance(found, str) else found, str(path / RUN_CONFIG))


def _dtype_of_base(tree: Mapping[str, Any], folder: Path) -> str:
    section = tree.get("model")
    if isinstance(section, Mapping) and section.get("dtype") in DTYPES:
        return str(section["dtype"])
    base = _object(folder / "adapter_config.json").get("base_model_name_or_path") or ""
    for place in (Path(base).expanduser(), folder / base):
        if (place / "config.json").is_file():
            return _dtype(_object(place / "config.json"), place)
    return "bfloat16"


def _dtype(config: Mapping[str, Any], folder: Path) -> str:
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    if name not in DTYPES:
        raise ModelError(f"{folder}: its weights are {name}; {', '.join(DTYPES)} can be exported")
    return name


def _object(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error


def check_dtype(name: str | None) -> None:
    """Refuses a dtype that weights are not exported in.

    Raises:
        ConfigError: naming those that are.
    """
    if name is not None and name not in DTYPES:
        raise ConfigError(f"--dtype {name}: choose {', '.join(DTYPES)}")
