"""Columns for a cache that is there: source shards matched to units, values to records, and what is written of them."""
