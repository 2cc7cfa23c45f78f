"""Slurm: batch scripts as text, and Slurm's commands."""
