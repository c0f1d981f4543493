"""Models measured by what they can do: tasks of lm-evaluation-harness, their answers, their speed; of a student here and of a served teacher alike."""
