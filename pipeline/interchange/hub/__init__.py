"""The Hugging Face hub: what an exported model says of itself there, and how it gets there."""
