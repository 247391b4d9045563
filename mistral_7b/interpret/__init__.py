"""Look inside a model: record its activations, replace them, steer it.

    with model.record("residual", "attention", layers=[3]) as tape:
        logits, cache = model(tokens)
    tape["residual", 3]     # (B, T, D)

    contexts           record, patch and steer, for the calls of a model
    transformer_lens   run_with_cache and run_with_hooks, with TransformerLens's names
    hidden_states      hidden states of many documents, streamed to a safetensors file

The points are listed in activations/points.py.
"""

from ..activations.tape import Tape as Tape
from ..engine.watching import Steering as Steering
from .contexts import patch as patch
from .contexts import record as record
from .contexts import steer as steer
from .hidden_states import save_hidden_states as save_hidden_states
