"""Contradictions between fields, by group and by verb."""
