"""The sides of `benchmarks.autoencoder`: training steps of ours, and of diffusers' training scripts."""
