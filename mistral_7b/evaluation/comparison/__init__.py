"""Compare two models: their distance, whether rounding explains it, and the cause if it does not.

run          compare(): the verdict, and the proof of a cause by undoing it
sides        what is compared: models in any format, adapters, as weights in float32
texts        the tokens of both sides
tensors      the difference of the weights, and how much of it rounding explains
hypotheses   what a broken converter does to a tensor, and what undoes it
causes       suspects from tensors, adapters, settings and tokens
streaming    several models over the same tokens, one block of one model in memory at a time
engine       B's files in another engine, by its logits and hidden states
modules      the engine's error in each module, on its own input, in float64
figures      llama.cpp's figures: KLD, Δp, perplexity
result       what was found, as data and as text
plot         the error's growth over the layers
"""

from __future__ import annotations
