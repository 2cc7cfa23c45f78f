"""How fast training, encoding and sampling go: from this machine's calibration, from committed measurements, or from a
GPU's peak and a stated efficiency. Imports no torch."""
