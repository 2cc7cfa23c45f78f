"""Evaluations of a diffusion model's run, by where the weights come from: training, a commit, a snapshot or a card."""
