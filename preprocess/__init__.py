"""From image-text shards to a cached latent dataset: reading, encoding, writing and proving it."""
