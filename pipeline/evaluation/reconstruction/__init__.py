"""The evaluation of first stages: how near reconstructions are to the pictures, and what latents cost."""
