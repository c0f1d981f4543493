"""Which of several teachers are asked about a row: by its tags.

In: the tags of the teachers and of a row; out: names of teachers. Policy over names: it reads no row and asks nobody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from student_trainer.data.rows.formats import Row


@dataclass(frozen=True)
class Routing:
    """The teachers of a run with their tags.

    Attributes:
        tags_of: by the name of each teacher, in the order of the config.
        exclusive: each row is taught by exactly one: whose tag it has, else by the teacher without tags.
    """

    tags_of: tuple[tuple[str, tuple[str, ...]], ...]
    exclusive: bool = False

    def asked(self, tags: Sequence[str]) -> tuple[str, ...]:
        """The teachers that are asked about a row with these tags, in the order of the config; under `exclusive` there should be one."""
        claiming = tuple(name for name, own in self.tags_of if set(own) & set(tags))
        untagged = tuple(name for name, own in self.tags_of if not own)
        if self.exclusive:
            return claiming or untagged
        return tuple(name for name, own in self.tags_of if name in claiming or name in untagged)

    def check(self, row: Row, tags: Sequence[str]) -> None:
        """
        Raises:
            DataError: under `exclusive`, none or several teachers claim the row.
        """
        if not self.exclusive:
            return
        asked = self.asked(tags)
        has = f"its tags are {', '.join(tags)}" if tags else "it has no tags"
        if len(asked) > 1:
            raise row.error(
                f"{' and '.join(asked)} claim the row ({has}), and combine=route gives it to one teacher: leave it one of their tags"
            )
        if not asked:
            known = ", ".join(tag for _, own in self.tags_of for tag in own)
            raise row.error(
                f"no teacher claims the row ({has}; known: {known}): combine=route gives it to one teacher; one without tags would take it"
            )


def tags_of_row(row: Row, field: str | None, beside: Sequence[str]) -> tuple[str, ...]:
    """The tags of a row: those of its source (`beside`), then those in its field, each once.

    Raises:
        DataError: the field holds something else than a text or a list of texts.
    """
    found = dict.fromkeys(beside)
    value = row.fields.get(field) if field is not None else None
    if value is None or value == "":
        return tuple(found)
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, Sequence) or not all(isinstance(tag, str) and tag for tag in listed):
        raise row.error("tags are a text or a list of texts, none of them empty (data.tag_field)", str(field), value)
    return tuple(dict.fromkeys([*found, *listed]))


def counted(routing: Routing, rows: Sequence[Sequence[str]]) -> Mapping[str, int]:
    """How many of some rows, given by their tags, each teacher is asked about."""
    counts = dict.fromkeys((name for name, _ in routing.tags_of), 0)
    for tags in rows:
        for name in routing.asked(tags):
            counts[name] += 1
    return counts


def unclaimed(routing: Routing, rows: Sequence[Sequence[str]]) -> Mapping[str, int]:
    """Tags that no teacher has, each with how many of some rows, given by their tags, have it; the commonest first."""
    known = {tag for _, own in routing.tags_of for tag in own}
    return dict(Counter(tag for tags in rows for tag in tags if tag not in known).most_common())
