"""What `benchmarks.at_scale` is made of: a world of thousands of ranks, a bucket that counts, and a trace of faults."""
