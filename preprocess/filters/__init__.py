"""Filters that compare: pictures with each other, and pictures with their captions."""
