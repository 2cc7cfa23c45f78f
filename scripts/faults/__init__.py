"""Hostile inputs, damaged files and kills, tried on the product by scripts/try_faults.py."""
