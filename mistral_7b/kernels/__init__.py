"""What PyTorch has no fast operator for, each beside its twin in plain PyTorch.

backend       which backend computes what, and why: the one place that decides it
linear        products with int8 and int4 weights
low_rank      what LoRA adapters add to products
elementwise   what lies between the products: RMSNorm, SwiGLU's gate, RoPE
attend        attention over new keys and remembered ones
layout        the tiles in which quantized weights are stored
cpu/          the C++ (entry.cpp says in which order to read it), its compiler, its bindings; huge pages
gpu/          Triton's kernels, each with what launches it; graphs
threads       how many the parallel loops may take
"""
