"""Reads untrusted shards of images and captions strictly."""
