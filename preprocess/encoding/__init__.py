"""Shards to a cache: who does what, in which order, and what is published when."""
