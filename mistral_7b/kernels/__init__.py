"""Kernels for operations that PyTorch has no fast operator for, each with a reference in plain PyTorch (its twin).

backend       selects the backend of each operation and gives the reason; nothing else selects one
linear        matrix products with int8 and int4 weights
low_rank      LoRA updates of matrix products
elementwise   RMSNorm, SwiGLU's gate, RoPE
attend        attention over new and cached keys
layout        the tiled layout of quantized weights
cpu/          C++ kernels (entry.cpp gives the reading order), their compiler and bindings; huge pages
gpu/          Triton kernels and their launchers; CUDA graphs
threads       the number of CPU threads
"""
