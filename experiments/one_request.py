"""Compare a single request through `generate` in this checkout and another one.

    git worktree add /tmp/before main
    python experiments/one_request.py --against /tmp/before [--shape demo] [--kinds float32 int4] [--json FILE]

decode     median seconds per token, including sampling and text, after a prompt of `--prompt` tokens
first      seconds to the first token of a new prompt
process    seconds from starting `mistral-7b generate demo` to its end after one token

Both checkouts run the same rounds alternately, each in one long-lived process. The best round counts, because
other programs only add time. A ratio is the other checkout's seconds divided by this one's: above 1 is an
improvement.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from commits import commit_of

HERE = Path(__file__).resolve().parents[1]
KINDS = ("float32", "bfloat16", "int8", "int4")
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"dim": 256, "n_layers": 4, "head_dim": 64, "hidden_dim": 768, "n_heads": 4, "n_kv_heads": 2},
    "mid": {"dim": 1024, "n_layers": 8, "head_dim": 64, "hidden_dim": 3584, "n_heads": 16, "n_kv_heads": 4},
    "large": {"dim": 2048, "n_layers": 8, "head_dim": 128, "hidden_dim": 7168, "n_heads": 16, "n_kv_heads": 4},
}


def circumstances(folders: list[Path]) -> dict[str, Any]:
    """Return date, hardware and the commits compared."""
    import torch

    from mistral_7b import machine

    return {
        "date": datetime.date.today().isoformat(), "cpu": machine.cpu_name(), "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "commits": [commit_of(folder) for folder in folders],
    }  # fmt: skip


def serve(shape: str, kind: str, prompt: int, tokens: int) -> None:
    """Run one round for each line of stdin, and print its results as a line of JSON."""
    import torch

    from mistral_7b.generate import stream
    from mistral_7b.model import Mistral7B, ModelArgs
    from mistral_7b.quantization.schemes import random_model
    from mistral_7b.sampling.params import SamplingParams

    torch.manual_seed(0)
    whole = kind in ("int8", "int4")
    dtype = torch.bfloat16 if whole else getattr(torch, kind)
    if shape == "demo":
        model = Mistral7B.from_pretrained("demo", dtype=dtype, quantization=kind if whole else None)
    else:
        model = random_model(ModelArgs(**SHAPES[shape]), kind if whole else None, dtype)
    params = SamplingParams(temperature=0.7, max_tokens=tokens, ignore_eos=True, seed=0)
    draw = random.Random(0)
    for _ in sys.stdin:
        ids = draw.choices(range(3, model.args.vocab_size), k=prompt)
        times, began = [], time.perf_counter()
        for _ in stream(model, ids, params):
            now = time.perf_counter()
            times.append(now - began)
            began = now
        later = sorted(times[1:])
        print(json.dumps({"first": times[0], "decode": later[len(later) // 2]}), flush=True)


class Checkout:
    """A process that runs rounds with the package of one checkout."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=environment(folder), text=True,
        )  # fmt: skip

    def round(self) -> dict[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        figures: dict[str, float] = json.loads(self.process.stdout.readline())
        return figures

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder)}


def cold(folder: Path) -> dict[str, float]:
    """Time a new process that generates one token with the bundled model."""
    command = [
        sys.executable,
        "-m",
        "mistral_7b",
        "generate",
        "demo",
        "--prompt",
        "import os",
        "--max-tokens",
        "1",
    ]
    began = time.perf_counter()
    subprocess.run(command, env=environment(folder), cwd=folder, check=True, capture_output=True)
    return {"process": time.perf_counter() - began}


def compare(name: str, rounds: list[tuple[dict[str, float], dict[str, float]]]) -> dict[str, Any]:
    """Print the best rounds of both checkouts, one line per figure, and return the record."""
    record: dict[str, Any] = {"what": name}
    for figure in rounds[0][0]:
        before, now = (min(pair[i][figure] for pair in rounds) for i in (0, 1))
        record[figure] = {"before": before, "now": now, "ratio": before / now}
        print(f"{name:<18}{figure:<9}{before:10.5f} {now:10.5f} s   ratio {before / now:.3f}", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="the other checkout")
    parser.add_argument("--shape", choices=(*SHAPES, "demo"), default="mid")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--prompt", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cold", type=int, default=0, help="number of cold processes per checkout")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        shape, kind, prompt, tokens = options.serve
        serve(shape, kind, int(prompt), int(tokens))
        return
    if options.against is None:
        parser.error("--against is required")
    folders, records = (options.against.resolve(), HERE), []
    for kind in options.kinds:
        both = [Checkout(f, options.shape, kind, str(options.prompt), str(options.tokens)) for f in folders]
        for checkout in both:  # warmup: compiles kernels, touches weights
            checkout.round()
        pairs = [(both[0].round(), both[1].round()) for _ in range(options.rounds)]
        records.append(compare(f"{options.shape} {kind}", pairs))
        for checkout in both:
            checkout.close()
    if options.cold:
        records.append(compare("cold demo", [(cold(folders[0]), cold(folders[1])) for _ in range(options.cold)]))
    if options.json:
        options.json.write_text(json.dumps(circumstances(folders) | {"records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
