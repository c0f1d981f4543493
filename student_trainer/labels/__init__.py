"""Labels of a run: on disk or from the wire, checked, ahead of the trainer, on its device."""
