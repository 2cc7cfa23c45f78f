"""Untrusted shards of images and captions, read strictly."""
