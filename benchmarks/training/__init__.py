"""Sides of benchmarks.trainer."""
