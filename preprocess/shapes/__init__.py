"""The captioned-shapes dataset: scenes, pictures, captions and shards."""
