"""Conditions: what a model is given beside text, made by one code for encode and for sampling. NumPy and Pillow."""
