"""Verbs as jobs of Slurm: what each is told, checked before it is sent."""
