"""What tests build: caches, runs and encoders that are small and real."""
