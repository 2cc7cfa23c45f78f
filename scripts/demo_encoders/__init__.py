"""Trains the demo encoders that ship with the package; the command is scripts/train_demo_encoders.py."""
