"""The time of each operator of a decode step, beside its roofline: the least that this machine allows.

    roofline of an operator = max(operations / peak, bytes / bandwidth)        (Williams et al., 2009, "Roofline")

Two runs of the same steps. As the model computes: embedding, all layers, final norm, output projection; a
quantized model computes its layers in one kernel call, which cannot be timed inside. Module by module: the same
numbers with every projection timed on its own (`record` computes in this way). Bytes are those of weights,
keys and values; activations are omitted. A model that fits the CPU's cache can be faster than its roofline,
which is main memory's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...cache import RollingCache
from ...errors import InterpretError
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer
from ..contexts import record
from .page import Picture
from .prompts import Prompt, encode

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS, WARM_UP = 20, 3  # decode steps measured, and before that
# Modules of a block, by path, and what stands between two of them: (name of the module after it) -> operator.
BLOCK = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
         "ffn_norm", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2")  # fmt: skip
ATTENTION, GATE = "rotary embedding, attention", "gate: silu(w1 x) * w3 x"
BETWEEN = {"attention.wo": ATTENTION, "feed_forward.w2": GATE}
OTHER = "other: Python, residual sums, choice of the token"


@dataclass(frozen=True)
class Operator:
    """An operator's calls in a step, its seconds (median over steps, all calls), and its least seconds."""

    name: str
    calls: int
    seconds: float
    bytes: int
    operations: int
    least: float


@dataclass(frozen=True)
class StepTimes(Picture):
    """Times of a decode step after `context` tokens: `whole` as the model computes, `split` module by module."""

    view = "time"
    title = "Time of a decode step"
    figsize = (10.0, 7.0)

    whole: Sequence[Operator]
    split: Sequence[Operator]
    seconds: float  # of a step as the model computes
    split_seconds: float
    context: int
    bandwidth: float  # bytes per second
    peak: float  # operations per second
    fused: bool
    threads: int

    def data(self) -> dict[str, Any]:
        lumped = (
            "Its layers run in one kernel call, so their first bar lumps all operators of all layers."
            if self.fused
            else "Its layers run module by module, so both runs differ by the timing alone."
        )
        return {
            "about": f"A decode step after {self.context} tokens takes {1e3 * self.seconds:.2f} ms (median of "
            f"{STEPS}, {self.threads} thread{'s'[: self.threads != 1]}); module by module "
            f"{1e3 * self.split_seconds:.2f} ms. {lumped} "
            f"The line is the roofline: {self.bandwidth / 1e9:.1f} GB/s read, {self.peak / 1e12:.3f} Top/s.",
            "whole": [list(vars(o).values()) for o in self.whole],
            "split": [list(vars(o).values()) for o in self.split],
        }

    def draw(self, figure: Figure) -> None:
        """Bars of seconds with the roofline as a line across each."""
        heights = [len(self.whole), len(self.split)]
        names = ("as the model computes", "module by module")
        pairs = zip(figure.subplots(2, height_ratios=heights), (self.whole, self.split), names, strict=True)
        for ax, operators, name in pairs:
            y = range(len(operators))
            ax.barh(y, [1e3 * o.seconds for o in operators], color="#0b4a8f", height=0.6, label="measured")
            ax.scatter(
                [1e3 * o.least for o in operators],
                y,
                marker="|",
                s=180,
                color="#d55e00",
                lw=2.5,
                zorder=3,
                label="roofline",
            )
            ax.set_yticks(y, [o.name for o in operators], fontsize=8)
            ax.invert_yaxis()
            ax.set_title(name, fontsize=10)
        ax.set_xlabel(f"ms in a decode step after {self.context} tokens")
        ax.legend(loc="lower right", frameon=False)


@torch.inference_mode()
def step_times(
    model: Mistral7B, tokenizer: Tokenizer, prompt: Prompt, *, bandwidth: float, peak: float
) -> StepTimes:
    """Time decode steps after a prompt. `bandwidth` (bytes per second) and `peak` (operations per second) are the
    machine's, as `bench.roofline` measures them.

    InterpretError for an empty prompt, one that fills the context, and a model that is not on a CPU.
    """
    ids = encode(model, tokenizer, prompt)
    if (device := model.norm.weight.device.type) != "cpu":
        raise InterpretError(f"operators are timed on a CPU, and the model is on {device}", field="device")
    room = WARM_UP + STEPS
    if model.args.sliding_window is None and len(ids) + room > model.args.max_seq_len:
        raise InterpretError(f"no room for {room} tokens after the prompt", field="prompt", hint="shorten it")
    tokens = torch.tensor([ids])
    top = {
        "tok_embeddings": "embedding",
        "layers": "all layers",
        "norm": "final norm",
        "output": "output projection",
    }
    whole = {path: model.get_submodule(path) for path in top}
    seconds, found = _run(model, tokens, [whole])
    inner = [{path: layer.get_submodule(path) for path in BLOCK} for layer in model.layers]
    outer = {path: module for path, module in whole.items() if path != "layers"}
    with record(model, "norm"):
        split_seconds, parts = _run(model, tokens, [outer, *inner])
    sizes = _sizes(model, min(len(ids) + room, model.args.sliding_window or len(ids) + room))

    def operator(name: str, key: str, calls: int, took: float) -> Operator:
        size, operations = sizes[key]
        return Operator(name, calls, took, size, operations, max(operations / peak, size / bandwidth))

    n = model.args.n_layers
    order = [
        "tok_embeddings",
        *BLOCK[:4],
        ATTENTION,
        "attention.wo",
        *BLOCK[5:8],
        GATE,
        "feed_forward.w2",
        "norm",
        "output",
    ]
    split = [operator(top.get(key, key), key, n if key not in top else 1, parts[key]) for key in order]
    whole_step = [operator(name, key, 1, found[key]) for key, name in top.items()]
    return StepTimes(
        [*whole_step, _other(whole_step, seconds, 1)],
        [*split, _other(split, split_seconds, n)],
        seconds, split_seconds, len(ids), bandwidth, peak, _is_fused(model), torch.get_num_threads(),
    )  # fmt: skip


def _other(operators: Sequence[Operator], seconds: float, calls: int) -> Operator:
    """What a step of so many seconds takes beside these operators, so that all bars sum to the step."""
    return Operator(OTHER, calls, max(0.0, seconds - sum(o.seconds for o in operators)), 0, 0, 0.0)


def _run(
    model: Mistral7B, tokens: Tensor, groups: Sequence[dict[str, nn.Module]]
) -> tuple[float, dict[str, float]]:
    """Median seconds of a decode step after tokens (1, T), and those of each module in it and between modules."""
    cache = model.rolling_cache(max_seq_len=tokens.shape[1] + WARM_UP + STEPS)
    logits = model.logits(model.hidden(tokens, cache)[:, -1:])
    steps: list[float] = []
    times: dict[str, list[float]] = defaultdict(list)
    for n in range(WARM_UP + STEPS):
        with _timed(groups) as spent:
            began = time.perf_counter()
            logits = _step(model, logits, cache)
            took = time.perf_counter() - began
        if n >= WARM_UP:
            steps.append(took)
            for name, seconds in spent.items():
                times[name].append(seconds)
    return median(steps), {name: median(values) for name, values in times.items()}


def _step(model: Mistral7B, logits: Tensor, cache: RollingCache) -> Tensor:
    return model.logits(model.hidden(logits.argmax(-1), cache))


@contextmanager
def _timed(groups: Sequence[dict[str, nn.Module]]) -> Iterator[dict[str, float]]:
    """Sum the seconds of each module by name, and of what lies before those in BETWEEN, while the block runs."""
    spent: dict[str, float] = defaultdict(float)
    marks = [0.0, 0.0]  # when the running module began, and when the last one ended
    handles = []

    def watch(name: str, module: nn.Module) -> None:
        def before(*_: object) -> None:
            marks[0] = time.perf_counter()
            if name in BETWEEN:
                spent[BETWEEN[name]] += marks[0] - marks[1]

        def after(*_: object) -> None:
            marks[1] = time.perf_counter()
            spent[name] += marks[1] - marks[0]

        handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

    try:
        for group in groups:
            for name, module in group.items():
                watch(name, module)
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _sizes(model: Mistral7B, keys: int) -> dict[str, tuple[int, int]]:
    """Bytes read and operations of each operator in all its calls of a step over this many visible keys."""
    args, n = model.args, model.args.n_layers
    row = model.tok_embeddings.embedding_dim * model.norm.weight.itemsize
    pairs = {path: _size(model.layers[0].get_submodule(path)) for path in BLOCK}
    out = {path: (n * size, n * operations) for path, (size, operations) in pairs.items()}
    stored = 2 * args.n_kv_heads * args.head_dim * model.norm.weight.itemsize  # a key and a value
    out[ATTENTION] = n * keys * stored, n * 4 * args.n_heads * args.head_dim * keys
    out |= {GATE: (0, 0), "norm": _size(model.norm), "output": _size(model.output)}
    layers = [out[key] for key in (*BLOCK, ATTENTION)]
    out["layers"] = sum(size for size, _ in layers), sum(operations for _, operations in layers)
    return {**out, "tok_embeddings": (row, 0)}


def _size(module: nn.Module) -> tuple[int, int]:
    """Bytes of a module's tensors, and operations for one row: 2 for each weight of a Linear."""
    size = sum(t.nbytes for t in (*module.parameters(), *module.buffers()))
    n_out, n_in = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
    return size, 2 * n_out * n_in


def _is_fused(model: Mistral7B) -> bool:
    """Whether a decode step runs no module of a block by itself."""
    watched = {"attention.wo": model.get_submodule("layers.0.attention.wo")}
    with _timed([watched]) as spent:
        model.hidden(torch.zeros(1, 1, dtype=torch.long), model.rolling_cache(max_seq_len=1))
    return not spent
