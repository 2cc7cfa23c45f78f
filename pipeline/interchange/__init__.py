"""Other people's formats: diffusers, CompVis."""
