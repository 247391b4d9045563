"""Kernels for GPUs, in Triton, each beside its twin in plain PyTorch."""
