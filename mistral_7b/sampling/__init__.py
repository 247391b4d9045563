"""Sampling: from logits to tokens. The package itself imports no torch.

params     SamplingParams and StructuredOutputs, with validation
defaults   a model's own defaults, of its generation_config.json
sampler    a batch of rows: biases, bans, penalties and grammar masks, then the choice
choice     temperature, min-p, top-k and top-p on integer weights, and the draw
logprobs   log-probabilities of raw logits
"""
