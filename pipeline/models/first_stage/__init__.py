"""The networks of a first stage that is trained here (Rombach et al. 2021, section 3.1): diffusers' autoencoders with
layers of our own, the codebook and the patch discriminator."""
