"""Columns that were made later than their cache: how they are stored, bound to the cache, and read as one record."""
