"""What a finished run tells of itself, also where its files have suffered."""

import json

from student_trainer.training.run_folder import LOG_NAME, RESULT_NAME, result_of


def test_entries_of_the_log_that_cannot_be_read_are_counted(tmp_path):
    (tmp_path / RESULT_NAME).write_text(json.dumps({"steps": 3, "metrics": {"loss": None}}))
    lines = [b'{"step": 1, "loss": 2.0}', b"\xff\xfe{", b"[1, 2]", b'{"step": 3, "loss": 1.0}', b"", b"\0\0\0"]
    (tmp_path / LOG_NAME).write_bytes(b"\n".join(lines))
    said = []
    result = result_of(tmp_path, said.append)
    assert [entry["step"] for entry in result.curve] == [1, 3] and result.steps == 3
    assert said == [f"{LOG_NAME}: 2 entries cannot be read and are left out"]
    (tmp_path / LOG_NAME).write_bytes(lines[0] + b"\n" + lines[3] + b"\n")
    said.clear()
    assert len(result_of(tmp_path, said.append).curve) == 2 and not said
