"""The parts of `benchmarks.compression_study`."""
