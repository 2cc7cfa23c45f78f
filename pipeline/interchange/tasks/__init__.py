"""What other software can hold of each task: a file per task, with EXPORT, which the table of tasks names."""
