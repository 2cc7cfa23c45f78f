"""Measures how fast this machine computes layers, trains networks and predicts, for `latentmill calibrate`."""
