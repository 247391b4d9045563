"""Look inside a model: record its activations, replace them, steer it.

    with model.record("residual", "attention", layers=[3]) as tape:
        logits, cache = model(tokens)
    tape["residual", 3]     # (B, T, D)

    contexts           record, patch and steer, for the calls of a model
    tape               what was recorded

The points are listed in activations/points.py.
"""

from .contexts import patch as patch
from .contexts import record as record
from .contexts import steer as steer
from .tape import Tape as Tape
