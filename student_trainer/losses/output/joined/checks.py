"""What of several teachers' labels does not fit together or with the loss, told before anything is computed."""

from __future__ import annotations

from student_trainer.errors import ConfigError, DataError
from student_trainer.losses.head import Head
from student_trainer.losses.output.parts import TeacherPart
from student_trainer.losses.output.spec import OutputLossSpec
from student_trainer.losses.rows import FullRows, GivenRows, HiddenRows, TopKRows, check_vocabulary
from student_trainer.losses.truncated import check_temperature


def check_part(part: TeacherPart, head: Head, spec: OutputLossSpec, combine: str) -> None:
    """What can be told from shapes and settings.

    Raises:
        ConfigError, DataError: as `joined_loss`.
    """
    if combine == "prob_mix" and (part.bridge is not None or not isinstance(part.rows, HiddenRows | FullRows)):
        raise ConfigError(
            f"combine=prob_mix mixes whole distributions over the student's ids, which teacher {part.name!r} does not give: "
            "choose labels.transport hidden or full and a teacher with the student's tokenizer, or combine=loss_sum"
        )
    if combine in ("prob_mix", "confidence") and spec.policy_gradient is not None:
        raise ConfigError(
            f"combine={combine} needs distributions, which divergence pg_rkl does not read: choose combine=loss_sum"
        )
    if isinstance(part.rows, GivenRows) and (spec.policy_gradient is None or part.bridge is not None):
        raise ConfigError(
            f"teacher {part.name!r}: given labels hold no distribution and serve divergence pg_rkl alone: choose another labels.transport"
        )
    transport = "top_k" if isinstance(part.rows, TopKRows) else "hidden or full"
    check_temperature(transport, spec.temperature, spec.tempered_head)
    if part.bridge is None:
        check_vocabulary(part.rows, head)
        return
    if spec.policy_gradient is not None or spec.tempered_head:
        raise ConfigError(
            f"teacher {part.name!r} has another tokenizer, which divergence pg_rkl and tempered_head do not know: choose another divergence, "
            "and labels.transport hidden for temperatures"
        )
    classes = part.bridge.classes
    ids = {"student": (classes.of_student.vocab_rows, head.vocab_rows)}
    ids["teacher"] = classes.of_teacher.vocab_rows, part.rows.vocab_rows or classes.of_teacher.vocab_rows
    for side, (classed, there) in ids.items():
        if classed != there:
            raise DataError(
                f"teacher {part.name!r}: classes of {classed} ids of the {side}, whose rows are over {there}"
            )
