"""`latentmill export` of an autoencoder's run: a folder of diffusers, or a file under CompVis' names."""
