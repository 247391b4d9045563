"""Fewer bytes a weight: int8, int4 and fp8; and bfloat16 packed for the CPU.

rounding      weights to integers
linear        what takes a Linear's place
gpu           the same for a GPU
schemes       the names, and a model in them
calibration   the same, guided by what flows through the model: rescaling, then rounding with feedback
"""

from .calibration import calibrate as calibrate
from .schemes import Scheme as Scheme
from .schemes import quantize as quantize
from .schemes import random_model as random_model
