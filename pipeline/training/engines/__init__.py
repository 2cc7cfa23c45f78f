"""Who takes the optimizer's step: DeepSpeed ZeRO or plain PyTorch."""
