"""Kernels for CPUs: C++ sources, their compilation and their bindings."""
