"""Texts to drafts, by style.

In: a text and how the run reads; out: a `Draft`, or a `TraceError` with one of the reasons of `student_trainer.data.trace_schema`.
"""

from __future__ import annotations

from student_trainer.data.trace_schema import TraceError
from student_trainer.traces.styles.draft import Draft, Reading
from student_trainer.traces.styles.free_text import read_free
from student_trainer.traces.styles.json_text import read_json_draft


def read_draft(text: str, reading: Reading) -> Draft:
    """What `text` claims.

    Raises:
        TraceError: it has not the form of its style.
    """
    draft = read_free(text, reading) if reading.style == "free" else read_json_draft(text)
    for step in draft.trace.steps:
        if not step.text.strip():
            raise TraceError("schema", f"step {step.id} is blank")
    return draft
