"""Distances between sets of pictures, and how sure they are."""
