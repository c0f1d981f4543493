"""The page of example configs: each file of deploy/examples as it is, with what its first comment says of it."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "deploy" / "examples"
TITLES = {
    "student-3090": "A student on a 24 GB card",
    "qwen2.5-7b": "A 7B teacher on a GPU box",
    "qwen2.5-7b-vllm": "The same teacher by vLLM",
    "one-card": "One card: the run",
    "one-card-teacher": "One card: the teacher",
    "two-box-server": "Two machines with TLS and tokens: the server",
    "two-box-student": "Two machines with TLS and tokens: the student",
    "teacher-shared": "One teacher for several groups",
    "student-two-teachers": "Two teachers",
    "student-on-policy-cpu": "On-policy",
    "teacher-self": "Self-distillation: the server",
    "student-self": "Self-distillation: the student",
    "traces-cpu": "Reasoning traces",
    "article": "The article's command",
    "teacher-cpu": "A small teacher without a GPU",
    "student-cpu": "A small student without a GPU",
    "student-embedded": "Teacher and student by one command",
}
_LANGUAGES = {".yaml": "yaml", ".py": "python", ".sh": "bash"}


def example_page() -> str:
    """The page as Markdown."""
    parts = [_HEAD]
    named = [EXAMPLES / f"{name}.yaml" for name in TITLES]
    for path in [*named, *sorted(set(EXAMPLES.rglob("*.*")) - set(named))]:
        if path.suffix not in _LANGUAGES:
            continue
        name = path.relative_to(EXAMPLES).as_posix()
        title = TITLES.get(path.stem, name) if path.suffix == ".yaml" else name
        text = "\n".join(
            line for line in path.read_text().rstrip().splitlines() if not line.startswith("# yaml-language-server")
        )
        parts.append(
            f'## {title}\n\n<a id="{path.stem}"></a>`deploy/examples/{name}`\n\n```{_LANGUAGES[path.suffix]}\n{text}\n```\n'
        )
    return "\n".join(parts)


_HEAD = """# Example configs

<!-- Made by `make reference` from deploy/examples. -->

Every config here parses in CI, and those for a CPU are run. They are in `deploy/examples` of the repository, and in an installation without it where
`student-trainer config examples` says.
"""
