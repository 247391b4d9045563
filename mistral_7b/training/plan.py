"""Memory and traffic of a model over several processes, by arithmetic: nothing is loaded or measured.

W processes. In a ring, each one sends of n bytes: (W - 1)/W n in an all-gather or a reduce-scatter, twice that in
an all-reduce. Weights, activations and gradients are bfloat16; masters and AdamW float32.
"""

from __future__ import annotations

import dataclasses

from ..model import Mistral7B, ModelArgs
from ..quantization.schemes import Scheme, empty_model
from .estimate import LOGIT_COPIES, block_activations, trained_numbers
from .finetune_args import FinetuneArgs
from .loss import LOGITS

WIDTH = 2  # bytes of bfloat16
TRAINED = 4 + 8 + 4  # bytes of a trained number: master, AdamW, gradient in the update


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to use the processes: bytes of memory of each, and the bytes that each sends per `unit`."""

    task: str  # "serve", "train an adapter", "train all weights"
    name: str
    memory: int
    sent: int
    unit: str


def numbers(shape: ModelArgs) -> tuple[int, int, int]:
    """Return how many weights a block has, the projection onto the vocabulary, and the rest."""
    model = Mistral7B(dataclasses.replace(shape, n_layers=1, tie_embeddings=False), device="meta")
    block = sum(p.numel() for p in model.layers.parameters())
    return block, model.output.weight.numel(), model.tok_embeddings.weight.numel() + shape.dim


def serving(shape: ModelArgs, scheme: str | None, processes: int, tokens: int) -> Way:
    """Serving `tokens` of context on every process, or on all together if the model is divided among several."""
    k, a = processes, shape
    model = Mistral7B(shape, device="meta") if scheme is None else empty_model(shape, Scheme(scheme))
    size = sum(t.nbytes for t in model.state_dict().values())
    whole = sum(t.nbytes for t in model.tok_embeddings.state_dict().values())  # and norms, which are few
    kv = 2 * a.n_layers * a.n_kv_heads * a.head_dim * WIDTH * tokens
    gathered = a.n_layers * (a.n_heads * a.head_dim + a.hidden_dim + 2 * a.dim) + a.vocab_size
    reduced = a.n_layers * 2 * a.dim * 2 + a.vocab_size  # an all-reduce counts twice
    sent = WIDTH * (reduced if scheme is None else gathered) * (k - 1) // k
    name = f"{scheme or 'bf16'}, " + (f"tensor parallel {k}" if k > 1 else "replicas")
    return Way("serve", name, whole + (size - whole + kv) // k, sent, "token")


def shards(args: FinetuneArgs, shape: ModelArgs, processes: int) -> Way:
    """FSDP: all weights trained, in shards."""
    block, output, rest = numbers(shape)
    layers, w, parts = shape.n_layers, processes, args.accumulate // processes
    everything = layers * block + output + rest
    held = everything * (WIDTH + TRAINED) // w + WIDTH * (2 * (2 * block) + 2 * (output + rest))
    chunks = -(-_tokens(args) // max(1, LOGITS // shape.vocab_size))
    blocks = 3 * layers * block  # gathered forward and backward, gradients scattered
    sent = parts * (blocks + chunks * output + rest) + output + rest
    memory = held + _activations(args, shape)
    return Way("train all weights", f"FSDP over {w}", memory, WIDTH * sent * (w - 1) // w, "update")


def replicas(args: FinetuneArgs, shape: ModelArgs, processes: int) -> Way:
    """LoRA or QLoRA: the base on every process, the adapter's gradients all-reduced."""
    trained, w = trained_numbers(args, shape), processes
    base = serving(shape, args.base_quantization, 1, 0).memory
    memory = base + TRAINED * trained + _activations(args, shape)
    return Way("train an adapter", f"{args.method} replicas", memory, 2 * 4 * trained * (w - 1) // w, "update")


def _tokens(args: FinetuneArgs) -> int:
    return args.seq_len * args.rows // args.accumulate


def _activations(args: FinetuneArgs, shape: ModelArgs) -> int:
    """Bytes that the blocks keep on a part, and a chunk of logits."""
    return shape.n_layers * block_activations(args, shape, _tokens(args)) + int(LOGIT_COPIES * 4 * LOGITS)


def ways(shape: ModelArgs, processes: int, seq_len: int, context: int, rank: int) -> list[Way]:
    """Return all ways; an update has one row of `seq_len` tokens on each process."""

    def args(method: str) -> FinetuneArgs:
        return FinetuneArgs(
            method=method, seq_len=seq_len, rows=processes, accumulate=processes, rank=rank, recompute=0  # type: ignore[arg-type]
        )  # fmt: skip

    degrees = [k for k in range(1, shape.n_kv_heads + 1) if processes % k == 0 and shape.n_kv_heads % k == 0]
    found = [serving(shape, scheme, k, context) for scheme in (None, "int8", "int4") for k in degrees]
    found += [replicas(args(method), shape, processes) for method in ("lora", "qlora")]
    return [*found, shards(args("full"), shape, processes)]


def advice(found: list[Way], memory: int) -> list[str]:
    """Return for each task what to take: of the ways that fit `memory` bytes, the one that sends the least."""
    said = []
    for task in dict.fromkeys(way.task for way in found):
        fitting = [way for way in found if way.task == task and way.memory <= memory]
        chosen = min(fitting, key=lambda way: way.sent, default=None)
        said.append(f"{task}: {chosen.name if chosen else 'nothing fits; more processes, or shorter rows'}")
    return said
