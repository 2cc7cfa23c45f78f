"""Judges: what measures the pictures of a task, and shows what was given, one file per task."""
