"""Strict readers of bytes that others may have written or damaged, and what makes their text fit to be shown."""
