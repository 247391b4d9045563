"""Training: on plain text from scratch, and fine-tuning on examples, preferences and rewards.

args, finetune_args   the arguments of both commands (import no torch)
loop                  the loop of all methods; weights, states: what it holds, saves; progress, metrics: its output
trainer               pretraining; data, curve, vocabulary: its text files, its picture, a tokenizer for it
finetuning            fine-tuning; trained: an adapter or all weights; measures, report: what came of it
examples              files of data -> items; forms, encoding, messages; held_out: those only evaluated; preview
supervised, packing   whole documents in packed rows; loss: cross-entropy in chunks
preferences           DPO and KTO, from log_probs: log-probabilities of tokens and gradients through them
grpo                  GRPO; rewards: Python functions; exact: a trainer with the bits of the engine that samples
distributed, plan     several processes: shards, divided layers, replicas; what they need, by arithmetic
estimate, recomputing memory and time beforehand; activations that are computed again
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .args import TrainArgs
from .finetune_args import FinetuneArgs

if TYPE_CHECKING:
    from .finetuning import finetune as finetune
    from .trainer import train as train

_MODULES = {"finetune": "finetuning", "train": "trainer"}
__all__ = ["FinetuneArgs", "TrainArgs", "finetune", "train"]


def __getattr__(name: str) -> Any:  # lazy, so that --help does not import torch
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
