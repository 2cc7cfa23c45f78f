"""Colours of pictures as they are meant: embedded profiles are applied."""
