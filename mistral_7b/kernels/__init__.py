"""What PyTorch has no fast operator for, each beside its twin in plain PyTorch.

cpu/                  the C++ behind them, entry.cpp first: it says in which order to read
compiler              compiles it on first use, keeps and loads it; `describe` says what runs
threads               how many the parallel loops may take
layout                the tiles in which quantised weights are stored
linear                products with int8 and int4 weights
elementwise, attend   what lies between the products
weight_only, fused    the same for a GPU; triton_linear, triton_fused hold their kernels
paged                 attention over pages for a GPU, with triton_paged
graph                 work for a GPU recorded once and replayed
"""

from .cpu.compiler import describe as describe
