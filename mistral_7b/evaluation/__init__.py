"""What a model is worth, and how far one is from another.

perplexity   nats a token and bits a byte of texts
fidelity     the distance of a quantised, adapted or merged model from what it came from
"""

from .fidelity import Distance as Distance
from .fidelity import distance as distance
from .perplexity import Perplexity as Perplexity
from .perplexity import perplexity as perplexity
