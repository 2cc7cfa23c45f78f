"""Verbs as jobs of Slurm: their scripts and options, checked before they are submitted."""
