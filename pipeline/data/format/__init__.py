"""A dataset as it is stored: record, index, manifest, and which records are kept."""
