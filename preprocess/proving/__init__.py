"""Whether a cache is what its manifest says."""
