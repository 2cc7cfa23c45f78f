"""Sample number to record, in arithmetic: blocks, shuffle, buckets, mixture."""
