"""The cost of a network and of a training step, by arithmetic: FLOPs, memory, and whether it fits. Only flops imports
torch."""
