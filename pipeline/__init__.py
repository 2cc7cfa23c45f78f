"""latentmill: cached latent datasets and latent diffusion training (Rombach et al. 2021, arXiv 2112.10752)."""

__version__ = "0.1.0"
