"""The cache of a dataset: its records and manifest, their order in training, and the stream that reads them."""
