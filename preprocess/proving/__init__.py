"""Checks that a cache is what its manifest says."""
