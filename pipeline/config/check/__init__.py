"""Checks of whole configurations, by group and by verb."""
