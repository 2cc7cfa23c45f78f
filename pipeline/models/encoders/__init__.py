"""The encoders that make cached latents and text states: the autoencoder, the text tower and its tokenizer."""
