"""The judge of captioned shapes: it shares no code with the models."""
