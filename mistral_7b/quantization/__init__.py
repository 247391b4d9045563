"""Quantization to GGUF's block formats and fp8, and bfloat16 weights packed for the CPU.

rounding      rounding of weights to block formats
linear        the modules that replace Linears
gpu           those for GPUs
fused         a quantized model's blocks computed with fused kernels
schemes       quantization schemes and their application to a model
calibration   quantization calibrated on activations, by rounding with error feedback
feedback      rounding with error feedback (GPTQ)
distance      the distance of a quantized model from the original
"""

from .calibration import calibrate as calibrate
from .schemes import Scheme as Scheme
from .schemes import quantize as quantize
from .schemes import random_model as random_model
