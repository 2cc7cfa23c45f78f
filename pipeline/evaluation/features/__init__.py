"""Networks that turn pictures into features, each with its own resize and weights."""
