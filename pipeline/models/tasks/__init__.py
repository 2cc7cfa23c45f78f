"""What conditions the network: a file per task."""
