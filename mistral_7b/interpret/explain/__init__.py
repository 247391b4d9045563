"""Pictures of a model's inside: self-contained pages, PNGs, and views in a notebook.

    from mistral_7b.interpret import explain

    explain.logit_lens(model, tokenizer, "The Eiffel Tower is in").save("lens.html")

heads          attention_maps       which tokens each head reads
probabilities  token_probabilities  each token's probability and its alternatives
lens           logit_lens           what each layer would predict
attribution    attributions         how much each token contributes to the next
trace          cache_trace          KV pages and a ring, step by step
operators      step_times           the time of a decode step beside its roofline
page           Picture              what they share; web/ has their styles and scripts
"""

from .attribution import Attributions as Attributions
from .attribution import attributions as attributions
from .heads import AttentionMaps as AttentionMaps
from .heads import attention_maps as attention_maps
from .lens import LogitLens as LogitLens
from .lens import logit_lens as logit_lens
from .operators import StepTimes as StepTimes
from .operators import step_times as step_times
from .page import Picture as Picture
from .probabilities import Probabilities as Probabilities
from .probabilities import token_probabilities as token_probabilities
from .trace import CacheTrace as CacheTrace
from .trace import cache_trace as cache_trace
