"""What `benchmarks.guidance_figures` and `benchmarks.guidance_pictures` are made of."""
