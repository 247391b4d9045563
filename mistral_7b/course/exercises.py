"""The exercises, and the definitions of the package that each consists of. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import CourseError


@dataclass(frozen=True)
class Part:
    """A class or function of the package, in an exercise.

    Attributes:
        module: where it is, such as "engine.pages"
        name: its name there
        write: what the learner writes: methods of a class, or the name of the function itself
        keep: methods that are given
        solution: methods that only the package's solution needs
        given: methods whose bodies are replaced by simpler ones, in the solution too
        base: the base class, if it is not the package's
    """

    module: str
    name: str
    write: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    solution: tuple[str, ...] = ()
    given: Mapping[str, str] = field(default_factory=dict)
    base: str = ""


@dataclass(frozen=True)
class Exercise:
    """An exercise: its number, the name of its files, its title, its parts.

    `offers` are names of earlier exercises that the skeleton imports besides those that the solution uses.
    """

    number: int
    slug: str
    title: str
    parts: Sequence[Part]
    offers: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The name of its files: ex01_rmsnorm."""
        return f"ex{self.number:02}_{self.slug}"

    @property
    def names(self) -> tuple[str, ...]:
        """What it defines."""
        return tuple(part.name for part in self.parts)


MODEL_INIT = """
super().__init__()
self.args = args = args or ModelArgs()
self.source = None
factory = {"dtype": dtype, "device": device}
self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim, **factory)
self.layers = Layers(TransformerBlock(args, **factory) for _ in range(args.n_layers))
self.norm = RMSNorm(args.dim, args.norm_eps, **factory)
self.output = nn.Linear(args.dim, args.vocab_size, bias=False, **factory)
if args.tie_embeddings:
    self.output.weight = self.tok_embeddings.weight
"""

RING_INIT = """
self.window, self.static, self.slack = window, static, slack
self.slots = (max_seq_len if window is None else min(window, max_seq_len)) + slack
self.positions = torch.full((batch, self.slots), EMPTY, device=device)  # of the key in each slot
self.length = torch.zeros(batch, dtype=torch.long, device=device)  # tokens so far
self.end = self.length.clone()
shape = (batch, self.slots, n_kv_heads, head_dim)
self.layers = [
    _RollingMemory(self, (torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)), dtype)
    for _ in range(n_layers)
]
"""

EXERCISES = (
    Exercise(1, "rmsnorm", "RMSNorm", [Part("model", "RMSNorm", write=("forward",), keep=("__init__",))]),
    Exercise(
        2, "rotary", "Rotary embedding",
        [Part("model", "rope_phases", write=("rope_phases",)), Part("model", "rotate", write=("rotate",))],
    ),
    Exercise(3, "window", "The sliding window", [Part("attention", "visible", write=("visible",))]),
    Exercise(4, "attention", "Grouped-query attention", [Part("attention", "attention", write=("attention",))]),
    Exercise(5, "swiglu", "SwiGLU", [Part("model", "FeedForward", write=("forward",), keep=("__init__",))]),
    Exercise(
        6, "block", "The block",
        [
            Part("model", "Attention", write=("forward",), keep=("__init__",)),
            Part("model", "TransformerBlock", write=("forward",), keep=("__init__",)),
        ],
    ),
    Exercise(
        7, "model", "The model, with real weights",
        [
            Part("model", "Layers", write=("forward",)),
            Part(
                "model", "Mistral7B", keep=("__init__",), write=("hidden", "logits", "forward"),
                given={"__init__": MODEL_INIT},
            ),
            Part("checkpoint.names", "interleaved", write=("interleaved",)),
            Part("course.demo", "open_demo"),
        ],
    ),
    Exercise(
        8, "sampling", "Sampling, reproducible by a seed",
        [
            Part("sampling.choice", "integer_weights", write=("integer_weights",)),
            Part("sampling.choice", "_cutoff", write=("_cutoff",)),
            Part("sampling.choice", "choose", write=("choose",)),
            Part("sampling.choice", "select_tokens"),
        ],
    ),
    Exercise(
        9, "growing", "A cache that grows",
        [
            Part(
                "cache.growing", "GrowingCache", keep=("__init__", "writable"), write=("extend",),
                solution=("_check", "_place"),
            ),
            Part("cache.growing", "_GrowingMemory", keep=("__init__",), write=("attend",)),
        ],
        offers=("visible", "attention"),
    ),
    Exercise(
        10, "rolling", "A ring of W slots",
        [
            Part(
                "cache.rolling", "RollingCache", keep=("__init__", "writable"), write=("extend",),
                solution=("place", "dtype", "_check_fit", "_decode", "_prefill"), given={"__init__": RING_INIT},
                base="Described",
            ),
            Part("cache.rolling", "_RollingMemory", keep=("__init__",), write=("attend",)),
        ],
        offers=("visible", "attention"),
    ),
    Exercise(
        11, "loop", "Prefill in chunks, then decode",
        [
            Part("course.loop", "encode_pieces", write=("encode_pieces",)),
            Part("course.loop", "prefill", write=("prefill",)),
            Part("course.loop", "loop", write=("loop",)),
        ],
    ),
    Exercise(
        12, "int8", "int8 weights and an integer product",
        [
            Part("kernels.linear", "quantize_rows", write=("quantize_rows",)),
            Part("course.int8", "Int8Linear", keep=("__init__",), write=("forward",)),
            Part("course.int8", "quantize_linears"),
        ],
    ),
    Exercise(
        13, "pages", "Pages, and prefixes by hash",
        [
            Part("engine.pages", "next_key", write=("next_key",)),
            Part(
                "engine.pages", "PagePool", write=("take", "share", "release", "register"),
                keep=("__init__", "available", "held", "find", "is_idle", "copy", "check"),
            ),
        ],
    ),
    Exercise(
        14, "scheduler", "Continuous batching",
        [
            Part(
                "engine.scheduler", "Scheduler", write=("_build_plan", "_chunk_size", "_find_pages"),
                solution=("_plan_prefills",), base="scheduler.Scheduler",
            ),
            Part("course.decoder", "decode_all"),
        ],
    ),
)  # fmt: skip


def exercise(number: int) -> Exercise:
    """The exercise of this number. CourseError if there is none."""
    if not 1 <= number <= len(EXERCISES):
        raise CourseError(
            f"there is no exercise {number}", field="number", hint=f"they are numbered 1 to {len(EXERCISES)}"
        )
    return EXERCISES[number - 1]


def home_of(name: str, before: int) -> Exercise | None:
    """The exercise up to `before` that defines a name; None if there is none."""
    return next((e for e in EXERCISES[:before] if name in e.names), None)
