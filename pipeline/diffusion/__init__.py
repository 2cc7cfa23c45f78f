"""Noise schedule, training objective and samplers: the diffusion, without any network."""
