"""Sides and parts of benchmarks.unet and benchmarks.gpu."""
