"""Quantization to int8, int4 and fp8, and bfloat16 weights packed for the CPU.

rounding      round-to-nearest quantization of weights
linear        the modules that replace Linears
gpu           those for GPUs
schemes       quantization schemes and their application to a model
calibration   quantization calibrated on activations: rescaling, then rounding with error feedback
"""

from .calibration import calibrate as calibrate
from .schemes import Scheme as Scheme
from .schemes import quantize as quantize
from .schemes import random_model as random_model
