"""Tars of latents that others wrote."""
