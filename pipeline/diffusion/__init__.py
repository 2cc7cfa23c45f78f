"""Noise schedules, the training objective and samplers, independent of any network."""
