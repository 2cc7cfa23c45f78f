"""Slurm: batch scripts as text, and its commands."""
