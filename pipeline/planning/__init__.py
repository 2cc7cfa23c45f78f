"""What a network and a step cost, in arithmetic: FLOPs, memory, whether it fits. No torch but in flops."""
