"""How the shipped demo encoders are made; scripts/train_demo_encoders.py is the command."""
