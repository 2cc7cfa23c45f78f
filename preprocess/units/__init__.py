"""Which input shard is which unit of a dataset, and what encode may write and delete there."""
