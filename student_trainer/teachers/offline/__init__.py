"""Teachers that are not asked: who they are is kept beside their labels, and answered from there."""
