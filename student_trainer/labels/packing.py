"""Examples as the wire wants them: packed tokens, and the rows that describe supervised tokens.

In: tokenised examples; out: a LabelRequest. The shift itself lives in losses/align.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from student_trainer.data.dataset import Example
from student_trainer.data.teacher_view import TeacherView
from student_trainer.labels.source import LabelRequest
from student_trainer.losses.align import wanted_rows
from teacher_wire.core.batch import TokenBatch


def pack(examples: Sequence[Example]) -> LabelRequest:
    """What to ask a teacher about these examples, in this order: of each what the teacher is to see of it."""
    return LabelRequest(_packed([example.asked for example in examples]), tuple(example.key for example in examples))


def pack_views(views: Sequence[TeacherView], names: Sequence[str]) -> LabelRequest:
    """What to ask a teacher about sequences that it reads so."""
    return LabelRequest(_packed(views), tuple(names))


def pack_own(examples: Sequence[Example]) -> TokenBatch:
    """These examples as the student reads them; their wanted rows are those of `pack`, one for one."""
    return _packed(examples)


def _packed(examples: Sequence[Example | TeacherView]) -> TokenBatch:
    cu_B1 = np.zeros(len(examples) + 1, np.int32)
    cu_B1[1:] = np.cumsum([example.token_ids.size for example in examples])
    ids_T = np.concatenate([example.token_ids for example in examples]).astype(np.int32)
    mask_T = np.concatenate([example.loss_mask for example in examples])
    return TokenBatch(ids_T, cu_B1, wanted_rows(mask_T, cu_B1))
