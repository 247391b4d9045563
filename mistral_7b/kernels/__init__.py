"""What PyTorch has no fast operator for, each with a plain PyTorch twin."""
