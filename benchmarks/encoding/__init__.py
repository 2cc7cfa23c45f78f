"""Sides, parts and inputs of benchmarks.encode."""
