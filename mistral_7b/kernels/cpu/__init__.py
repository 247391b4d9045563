"""Kernels for CPUs: the C++, its compiler and its bindings."""
