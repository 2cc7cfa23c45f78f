"""Tasks: how a model is conditioned. A dataclass for each, and the table that finds everything that a task is."""
