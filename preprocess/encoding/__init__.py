"""Encodes shards into a cache: plan, claims, the stages of encoding, published files and the manifest."""
