"""Sampling: from logits to a token. This package itself imports no torch.

params     SamplingParams and StructuredOutputs: what a request asks for, checked
sampler    many rows at once: biases, bans, penalties and masks, then a choice
choice     temperature, min-p, top-k, top-p as whole numbers, and the draw
logprobs   log-probabilities of raw logits
"""
