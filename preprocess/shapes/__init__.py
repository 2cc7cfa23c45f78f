"""Captioned shapes: scenes, pictures, wording, shards."""
