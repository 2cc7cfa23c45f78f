"""The cache: its records, its manifest, the order in which they are seen, and the stream that reads them."""
