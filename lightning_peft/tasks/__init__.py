"""The tasks: one task, one file, each with its loss, predictions and metrics."""
