"""What turns a checkpoint into pictures."""
