"""What a run cannot do with a teacher of another tokenizer, before anything is asked of it.

In: the config and which sections want it; out: a `Finding` for each, by the name of the setting, with the way out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from student_trainer.config.run import TrainConfig
from student_trainer.config.teachers import LabelConfig, TeacherConfig
from student_trainer.findings import Finding


def check_bridged(
    config: TrainConfig, settings: TeacherConfig, name: str, labels: LabelConfig, layers: Iterable[str]
) -> Iterator[Finding]:
    """Whether a run can learn from a teacher of another tokenizer.

    Args:
        config: the run.
        settings: of the teacher.
        name: what the run calls it.
        labels: how its labels travel.
        layers: names of the sections that would learn from its layers.
    """
    who = f"teacher {name!r} has another tokenizer than the student"
    bad = False
    for is_wanted, setting, why, fix in (
        (settings.context is not None, "teacher.context", "its prompt is its own already", "set it to null"),
        (
            labels.transport == "given",
            "labels.transport",
            "given holds no distribution",
            "hidden, full or top_k",
        ),
        (labels.extra_ids > 0, "labels.extra_ids", "the student's ids mean nothing to it", "set it to 0"),
        (
            config.on_policy is not None and config.on_policy.share != 0,
            "on_policy",
            "it cannot be asked about what the student writes",
            "leave on_policy out, or learn from teachers of the student's tokenizer",
        ),
        (
            config.on_policy is not None and config.on_policy.publish is not None,
            "on_policy.publish",
            "a revision of the student would have the student's tokenizer",
            "set it to null",
        ),
        (
            config.combine == "prob_mix",
            "combine",
            "prob_mix mixes distributions over one vocabulary",
            "combine=loss_sum",
        ),
        *(
            (
                True,
                f"loss.{section}",
                "its layers are of other tokens",
                f"set it to null, or loss.{section}.teacher to another",
            )
            for section in layers
        ),
    ):
        if is_wanted:
            bad = True
            yield Finding.bad(setting, f"{setting}: {who}, and {why}", fix)
    if not bad:
        yield Finding.good("cross_tokenizer", f"{who}, and is learned from by the bytes of the answers")
