"""Compare the estimate of `finetune --estimate` with the peak memory of the run, and measure the loop's overhead.

    python experiments/finetune_costs.py --json-file FILE

A model of random weights (by default 175 million: width 1024, 8 layers, Mistral's vocabulary of 32000) is trained
on the topics of Python's help, each case in processes of its own: one that estimates and one that trains.

overhead         share of CPU time outside forward and backward passes, clipping and optimizer, saving left out
saving           CPU seconds of saving one state; a run of few updates saves one, at its end
update           CPU seconds of an update
saving_share     saving / (saving + N updates): of a run that saves every N updates, the default
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import tyro
from commits import commit_of

from mistral_7b import FinetuneArgs, machine

CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "qlora, all blocks recomputed": {"method": "qlora", "recompute": 99},
    "full": {"method": "full", "seq_len": 256},
}


def shape_of(dim: int, layers: int) -> dict[str, Any]:
    """The proportions of Mistral 7B, without a window."""
    return {
        "dim": dim, "n_layers": layers, "head_dim": 128, "hidden_dim": 7 * dim // 2, "n_heads": dim // 128,
        "n_kv_heads": 2, "sliding_window": None,
    }  # fmt: skip


def write_inputs(folder: Path, shape: dict[str, Any]) -> None:
    """Write the model with Mistral's tokenizer, and the text."""
    import torch

    from mistral_7b import Mistral7B, ModelArgs, Tokenizer
    from mistral_7b.text.default_text import default_text

    torch.manual_seed(0)
    model = Mistral7B(ModelArgs(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder / "base")
    (folder / "base" / "tokenizer.model").write_bytes(Tokenizer.v1().path.read_bytes())
    (folder / "text.txt").write_text(default_text()[1], encoding="utf-8")


def estimated(args: FinetuneArgs) -> dict[str, Any]:
    """The peak that the command would print."""
    from mistral_7b.cli.finetune import estimated as of_command

    found = of_command(args)
    return {"peak": found.peak, "parts": found.parts}


def trained(args: FinetuneArgs) -> dict[str, Any]:
    """The peak of a run, and the CPU time of its loop."""
    from mistral_7b.training import finetuning
    from mistral_7b.training.loop import Loop
    from mistral_7b.training.supervised import Supervised
    from mistral_7b.training.weights import Weights

    spent, calls = defaultdict[str, float](float), Counter[str]()

    def timed(kind: type, name: str) -> None:
        work = getattr(kind, name)

        def run(*given: Any, **named: Any) -> Any:
            began = time.process_time()
            try:
                return work(*given, **named)
            finally:
                spent[name] += time.process_time() - began
                calls[name] += 1

        setattr(kind, name, run)

    timed(Loop, "_advance")  # an update with its data and log
    timed(Loop, "save")
    inside = ((Supervised, "backward"), (Weights, "collect"), (Weights, "update"))
    for kind, name in inside:
        timed(kind, name)
    finetuning.finetune(args=args)
    saving, update = spent["save"] / calls["save"], spent["_advance"] / calls["_advance"]
    return {
        "peak": machine.peak_memory(),
        "overhead": 1 - sum(spent[name] for _, name in inside) / spent["_advance"],
        "saving": saving, "update": update, "saving_share": saving / (saving + args.save_every * update),
    }  # fmt: skip


def main(
    json_file: Path | None = None,
    seq_len: int = 512,
    steps: int = 3,
    dim: int = 1024,
    layers: int = 8,
    child: str = "",
) -> None:
    """Measure all cases.

    Args:
        json_file: Write the record to this file.
        seq_len: Tokens of a row; full training takes half as many.
        steps: Updates of a run.
        dim: Width of the model, a multiple of 256.
        layers: Its blocks.
        child: What a process of its own does, as JSON.
    """
    if child:
        what, given = json.loads(child)
        args = FinetuneArgs(**{**given, "data": tuple(given["data"])})
        print(json.dumps((estimated if what == "estimate" else trained)(args)))
        return
    results, shape = {}, shape_of(dim, layers)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, shape)
        for case, changes in CASES.items():
            args = FinetuneArgs(
                model=str(folder / "base"), data=(str(folder / "text.txt"),), out=str(folder / case), steps=steps,
                warmup=1, rows=1, accumulate=1, samples=0,
                **{"seq_len": seq_len, **changes},
            )  # fmt: skip
            results[case] = compared(args)
            print(case, json.dumps(results[case]), file=sys.stderr)
    record = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(),
        "command": "python " + " ".join(sys.argv), "cpu": machine.cpu_name(), "cores": machine.cores(),
        "shape": shape, "results": results,
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def compared(args: FinetuneArgs) -> dict[str, Any]:
    """Run both processes of a case."""
    found = []
    for what in ("estimate", "train"):
        child = json.dumps([what, dataclasses.asdict(args)])
        command = [sys.executable, __file__, "--child", child]
        done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    before, after = found
    return {
        "estimated_peak": before["peak"], "peak": after["peak"],
        "difference": before["peak"] / after["peak"] - 1,
        **{name: value for name, value in after.items() if name != "peak"}, "parts": before["parts"],
    }  # fmt: skip


if __name__ == "__main__":
    tyro.cli(main)
