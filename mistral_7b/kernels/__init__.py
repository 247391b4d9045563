"""What PyTorch has no fast operator for, each beside its twin in plain PyTorch.

compiler              cpu.cpp compiled on first use, kept and loaded; `describe` says what runs
layout                the tiles in which quantised weights are stored
linear                products with int8 and int4 weights
elementwise, attend   what lies between the products
weight_only, fused    the same for a GPU; triton_linear, triton_fused hold their kernels
"""

from .compiler import describe as describe
