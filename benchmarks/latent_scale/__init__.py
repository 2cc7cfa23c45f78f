"""The parts of `benchmarks.signal_to_noise`."""
