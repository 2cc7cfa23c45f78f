"""Adopts tars of latents that other programs wrote."""
