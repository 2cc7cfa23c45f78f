"""What is learned: the UNet, the first stage, the text tower, and how a task conditions them."""
