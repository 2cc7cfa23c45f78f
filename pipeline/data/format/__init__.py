"""The stored format of a dataset: records, indexes, the manifest, and which records are read."""
