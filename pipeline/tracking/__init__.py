"""Where metrics go: a JSONL file first, the terminal, wandb."""
