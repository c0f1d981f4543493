"""The two config files of a new pair, with comments: `teacher.yaml` for `teacher-server up`, `student.yaml` for `student-trainer`.

In: where teacher and student are, the rows, the machine; out: text. Paths are absolute, so that the commands work from any folder. Both
files are read by the commands' own parsers before they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from student_trainer.config.run import parse_config
from student_trainer.config.yaml_scalars import read_yaml

STUDENT_NAME, TEACHER_NAME = "student.yaml", "teacher.yaml"
ROWS_PLACEHOLDER = "data/train.jsonl"
_MOST_TOKENS = 2048


@dataclass(frozen=True)
class Pair:
    """What the starter configs are about.

    Attributes:
        teacher: hub id, or absolute folder.
        student: absolute folder.
        rows: file or hub id of rows; None: the user has named none yet.
        max_tokens: the longest sequence that both have positions for; None: they know no limit.
        starts_at_random: whether the student's weights are random.
        on_gpu: whether this machine has one.
    """

    teacher: str
    student: Path
    rows: str | None
    max_tokens: int | None
    starts_at_random: bool
    on_gpu: bool


def teacher_yaml(pair: Pair) -> str:
    """The config of the teacher's server."""
    device = "device: cuda" if pair.on_gpu else "device: cpu"
    dtype = "bfloat16" if pair.on_gpu else "float32"
    gpus = "    num_gpus: 1\n" if pair.on_gpu else ""
    memory = 4096 if pair.on_gpu else 256
    return (
        f"# The teacher of {_quoted(str(pair.student))}: teacher-server up {_shell(pair.student / TEACHER_NAME)}\n"
        "# Reached from this machine only. For students elsewhere set edge.host, and edge.tls with edge.tokens_file (docs/operate/operating.md).\n"
        "edge: {host: 127.0.0.1, port: 50051}\n"
        f"ray: {{object_store_mb: {memory}}}\n"
        "teachers:\n"
        "  - name: teacher\n"
        f"    num_cpus: {2 if pair.on_gpu else 0.5}\n"
        f"{gpus}"
        "    backend:\n"
        "      kind: transformers # or vllm, which writes faster: docs/results/speed.md\n"
        f"      model: {_quoted(pair.teacher)}\n"
        f"      dtype: {dtype}\n"
        f"      {device}\n"
    )


def student_yaml(pair: Pair) -> str:
    """The config of the student's training.

    Raises:
        ConfigError: it is none that `student-trainer train` accepts (a fault of ours).
    """
    rows = pair.rows or ROWS_PLACEHOLDER
    placeholder = (
        ""
        if pair.rows
        else " # put your rows here: messages, instruction/output, prompt/completion ... (docs/data/rows.md)"
    )
    limit = min(pair.max_tokens or _MOST_TOKENS, _MOST_TOKENS)
    dtype = "bfloat16" if pair.on_gpu else "float32"
    why_rate = (
        "its weights start at random"
        if pair.starts_at_random
        else "layers were taken out, and what is left has to close the gap"
    )
    text = (
        f"# {_quoted(str(pair.student))} learns from {_quoted(pair.teacher)}. Look at it first: student-trainer plan {_shell(pair.student / STUDENT_NAME)}\n"
        f"run: {{output_dir: {_quoted(f'runs/{pair.student.name}')}}} # in the folder where the command is started\n"
        "model:\n"
        f"  path: {_quoted(str(pair.student))}\n"
        f"  dtype: {dtype} # of the passes and the result; what is trained is float32 in memory\n"
        f"  lora: null # every weight is trained: {why_rate}\n"
        f"  gradient_checkpointing: {str(pair.on_gpu).lower()} # recomputes activations: less memory, slower steps\n"
        "data:\n"
        f"  train: [{_quoted(rows)}]{placeholder} # path#N takes N rows\n"
        "  # eval: [data/heldout.jsonl] # rows to measure with; then set train.eval_steps too\n"
        f"  max_tokens: {limit}\n"
        "  overlong: drop # counted and told; refuse stops at the first longer row\n"
        'teacher: {address: "127.0.0.1:50051"} # of teacher.yaml; or, started and stopped with the run on this machine:\n'
        f"# teacher: {{embedded: {_quoted(str(pair.student / TEACHER_NAME))}}}\n"
        "labels: {transport: hidden} # exact at every temperature (docs/concepts/labels.md)\n"
        "loss: {output: {divergence: forward_kl}, sft_weight: 0.5} # sft_weight 0 where the rows' answers are poor (docs/results/results.md)\n"
        "train:\n"
        "  epochs: 3\n"
        f"  batch_size: {2 if pair.on_gpu else 4}\n"
        f"  accumulation: {8 if pair.on_gpu else 1}\n"
        f"  learning_rate: {'3.0e-4' if pair.starts_at_random else '1.0e-4'}\n"
        "  warmup_steps: 20\n"
        f"  bf16: {str(pair.on_gpu).lower()}\n"
        "  log_steps: 10\n"
        "  save_steps: 200 # go on after a break: student-trainer train ... --resume\n"
    )
    parse_config(read_yaml(text), STUDENT_NAME)
    return text


def _quoted(text: str) -> str:
    """A YAML scalar on one line, quoted where it must be."""
    dumped: str = yaml.safe_dump(text, width=10**9, allow_unicode=True, default_flow_style=True).strip()
    scalar = dumped.removesuffix("...").strip()
    return (
        scalar if scalar[0] in "'\"" or not set(scalar) & set("[]{},#") else f"'{scalar.replace(chr(39), chr(39) * 2)}'"
    )


def _shell(path: Path) -> str:
    import shlex

    return shlex.quote(str(path))
