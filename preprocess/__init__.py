"""Turns image-text shards into a cached latent dataset: reading, encoding, writing and verifying."""
