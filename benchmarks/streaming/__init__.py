"""Sides and data of benchmarks.stream."""
