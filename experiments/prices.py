"""Measure the cost of single features at 7B size with random weights. Prints one line per record.

    python experiments/prices.py --json FILE          some minutes, 12 GB

overhead        time per token of `generate`, including sampling and text, in total and outside the kernels
int8 keys       decode at a long context with a KV cache in bfloat16 and in int8
deterministic   batch-invariant bfloat16 compared with plain bfloat16 (8 layers)
speculation     a forward of 1 to 11 rows: the cost of verifying draft tokens
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mistral_7b import machine
from mistral_7b.generate import stream
from mistral_7b.kernels import backend
from mistral_7b.kernels.cpu import compiler
from mistral_7b.model import Mistral7B, ModelArgs
from mistral_7b.quantization import Scheme, random_model
from mistral_7b.sampling.params import SamplingParams


class Timed:
    """Wraps the kernel library and sums the seconds spent in it."""

    def __init__(self, library: Any) -> None:
        self.library, self.seconds = library, 0.0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self.library, name)

        def timed(*args: Any) -> Any:
            began = time.perf_counter()
            out = function(*args)
            self.seconds += time.perf_counter() - began
            return out

        setattr(self, name, timed)
        return timed


def median(work: Callable[[], object], times: int) -> float:
    """Return the median seconds of `times` runs, after one warmup run."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])[times // 2]


def overhead(model: Mistral7B, tokens: int = 48) -> dict[str, float]:
    """Return the median seconds per token of `generate` at temperature 0.7, in total and outside the kernels."""
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=tokens, ignore_eos=True, seed=0)
    library = compiler.library
    timed = Timed(library())
    compiler.library = lambda: timed  # type: ignore[assignment]
    try:
        every, outside = [], []
        pieces = iter(stream(model, list(range(1, 129)), params))
        next(pieces)
        for _ in range(tokens - 2):
            began, inside = time.perf_counter(), timed.seconds
            next(pieces)
            every.append(time.perf_counter() - began)
            outside.append(every[-1] - (timed.seconds - inside))
    finally:
        compiler.library = library
    middle = len(every) // 2
    return {"seconds": sorted(every)[middle], "outside": sorted(outside)[middle]}


@torch.inference_mode()
def decode(model: Mistral7B, context: int, kv_dtype: torch.dtype | None, rows: int = 1) -> float:
    """Return the seconds of a forward of `rows` new tokens after `context` tokens."""
    slack = 64 * rows
    ring = model.rolling_cache(1, context + slack, slack=slack, kv_dtype=kv_dtype)
    for part in torch.randint(0, model.args.vocab_size, (1, context)).split(512, dim=1):
        model.hidden(part, ring)
    new = torch.randint(0, model.args.vocab_size, (1, rows))

    def step() -> None:
        model.logits(model.hidden(new, ring))
        ring.rollback(rows)

    return median(step, 15)


@torch.inference_mode()
def prefill(model: Mistral7B, length: int) -> float:
    tokens = torch.randint(0, model.args.vocab_size, (1, length))
    return median(lambda: model.hidden(tokens, model.rolling_cache(1, length)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="number of layers of the int4 model")
    parser.add_argument("--context", type=int, default=4000)
    options = parser.parse_args()
    records: list[dict[str, Any]] = []

    def tell(what: str, **figures: float) -> None:
        records.append({"what": what, **figures})
        print(f"{what:<44}" + "  ".join(f"{name} {value:.5g}" for name, value in figures.items()), flush=True)

    model = random_model(ModelArgs(n_layers=options.layers), "int4")
    cost = overhead(model)
    tell("overhead of generate, int4", **cost, share=cost["outside"] / cost["seconds"])
    base = decode(model, 512, None)
    for rows in (1, 2, 3, 4, 5, 8, 11):
        seconds = decode(model, 512, None, rows)
        tell(f"forward of {rows} rows, int4, context 512", seconds=seconds, relative=seconds / base)
    for name, kv_dtype in (("bfloat16", None), ("int8", torch.int8)):
        tell(f"decode, context {options.context}, {name} keys", seconds=decode(model, options.context, kv_dtype))
    del model
    layers = min(8, options.layers)
    for name, scheme in (("plain", Scheme("bf16")), ("deterministic", Scheme("bf16", deterministic=True))):
        model = random_model(ModelArgs(n_layers=layers), scheme)
        tell(f"bf16 {name}, {layers} layers: decode", seconds=decode(model, 128, None))
        tell(f"bf16 {name}, {layers} layers: prefill of 512", seconds=prefill(model, 512))
        del model
    if options.json:
        head = {
            "date": datetime.date.today().isoformat(), "commit": machine.commit(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "cpu": machine.cpu_name(),
            "kernels": backend.running(), "layers": options.layers, "command": "python experiments/prices.py",
        }  # fmt: skip
        options.json.write_text(json.dumps({**head, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
