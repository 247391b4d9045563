"""Evaluate a model, and compare it with its original.

perplexity   perplexity and bits per byte of texts
fidelity     the distance of a quantized, adapted or merged model from its original
"""

from .fidelity import Distance as Distance
from .fidelity import distance as distance
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity
