"""Evaluations of a run, by where the weights come from: training, a commit, a snapshot or a card."""
