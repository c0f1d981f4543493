"""What a refused configuration says: the key as it was written, every complaint about it, the value."""

from __future__ import annotations

import pytest

from student_trainer.config.run import load_config
from student_trainer.errors import ConfigError

GOOD = "run: {output_dir: runs/x}\nmodel: {path: some/model}\ndata: {train: [rows.jsonl]}\nteacher: {address: 'a:1'}\n"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.graphs=maybe", "model.graphs: Input should be a valid boolean, .*, or Input should be 'auto' \\(got 'maybe'\\)$"),
        ("model.compiled=maybe", "model.compiled: .*, or Input should be 'auto' \\(got 'maybe'\\)$"),
        ("model.lora={target_modules: null}", "model.lora.target_modules: .*valid string, or .*valid tuple \\(got None\\)$"),
        ("loss.output={temperature: high}", "loss.output.temperature: .*\\(got 'high'\\)$"),
        ("loss.output={temperature: {start: 2, en: 1}}", "loss.output.temperature.en: unknown key; did you mean end.$"),
        ("data.train=[{path: a.jsonl, fromat: x}]", "data.train.0.fromat: unknown key; did you mean format.$"),
        ("data.train=[{format: x}]", "data.train.0.path: missing$"),
        ("data.train=[5]", "data.train: a source is a path .*, not int \\(got \\[5\\]\\)$"),
        ("modle.path=x", "modle: unknown key; did you mean model.$"),
        ("train.save_steps=7", "config: train.save_steps=7 must be a multiple"),
    ],
)  # fmt: skip
def test_the_key_as_written_and_the_value(tmp_path, override, said):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    load_config(file, ["train.save_steps=0"])
    with pytest.raises(ConfigError, match=f"^{file}: (.*; )?{said}"):
        load_config(file, [override])
