"""Sides of benchmarks.trainer, and how a run of ours takes steps for any benchmark."""
