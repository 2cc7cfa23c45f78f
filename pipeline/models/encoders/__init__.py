"""The autoencoder, the text tower and its tokenizer: between pictures, words and what is cached."""
