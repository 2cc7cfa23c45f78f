"""The networks: the UNet, the first stage and the text tower, and the tasks that condition the UNet."""
