"""Triton kernels for GPUs, each with a twin in plain PyTorch."""
