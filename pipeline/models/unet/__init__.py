"""The cross-attention UNet."""
