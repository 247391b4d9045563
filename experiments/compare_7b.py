"""Peak memory and time of `compare` at the width of Mistral 7B, by the number of layers.

    python experiments/compare_7b.py --layers 2 4 8 --json-file experiments/results/DATE-compare-7b.json
    python experiments/compare_7b.py --layers 32 --tokens 64      22 GB of disk

Writes random weights in bfloat16 and the same as Q8_0, and compares them in a process of its own. All layers have
the same weights, so that no more than one is ever held while they are written.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from commits import commit_of
from safetensors.torch import load_file, save_file

from mistral_7b import Mistral7B, ModelArgs
from mistral_7b.checkpoint import convert
from mistral_7b.evaluation import compare


def write(folder: Path, n_layers: int) -> None:
    """Write a checkpoint in Hugging Face's layout, one file a layer."""
    one = folder.with_name("one")
    Mistral7B(dataclasses.replace(ModelArgs(), n_layers=1), device="cpu").save_pretrained(one)
    tensors = load_file(one / "model.safetensors")
    folder.mkdir()
    config = json.loads((one / "config.json").read_text()) | {"num_hidden_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(config))
    layer = {name for name in tensors if ".layers.0." in name}
    files = {"rest.safetensors": {name: tensors[name] for name in tensors.keys() - layer}}
    for n in range(n_layers):
        files[f"{n}.safetensors"] = {name.replace(".0.", f".{n}.", 1): tensors[name] for name in sorted(layer)}
    for name, part in files.items():
        save_file(part, folder / name)
    places = {tensor: name for name, part in files.items() for tensor in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.rmtree(one)


def measured(folder: str, tokens: int) -> dict[str, Any]:
    start, ids = time.perf_counter(), torch.randint(0, 32000, (1, tokens))
    tell = lambda step: print(f"{time.perf_counter() - start:6.0f} s  {step}", file=sys.stderr)  # noqa: E731
    result = compare(f"{folder}/a", f"{folder}/b.gguf", ids, tell=tell)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.perf_counter() - start, 1)
    return {"verdict": result.verdict, "kld": result.kld, "seconds": seconds, "peak_rss_bytes": peak}


def main(
    layers: tuple[int, ...] = (2, 4, 8), tokens: int = 512, json_file: Path | None = None, folder: str = ""
) -> None:
    """Compare models of so many layers.

    Args:
        layers: Numbers of layers.
        tokens: Tokens of the one row.
        json_file: Write the records to this file.
        folder: The files to compare, in the process that is measured.
    """
    if folder:
        print(json.dumps(measured(folder, tokens)))
        return
    records = []
    for n in layers:
        with tempfile.TemporaryDirectory() as place:
            write(Path(place) / "a", n)
            convert(Path(place) / "a", Path(place) / "b.gguf", "gguf", type="q8_0")
            command = [sys.executable, __file__, "--folder", place, "--tokens", str(tokens)]
            done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=True)
        records.append({"layers": n, "tokens": tokens, **json.loads(done.stdout.splitlines()[-1])})
        print(records[-1], flush=True)
    if json_file is not None:
        cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
        about = {
            "date": datetime.date.today().isoformat(), "commit": commit_of(),
            "command": "python " + " ".join(sys.argv), "cpu": cpu.split(":")[1].strip(),
        }  # fmt: skip
        json_file.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
