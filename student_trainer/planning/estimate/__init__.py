"""Peak memory of a student's step, computed from shapes: no weight is read and nothing is allocated.

In: a model's config and the settings of a run; out: bytes by part (`parts.Estimate`). Knows no teacher, no data and no console.
"""
