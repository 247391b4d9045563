"""Measure a quantized folder: seconds to load and to the first token, peak memory, decode after 4096 tokens.

    mistral-7b quantize MODEL FOLDER && python experiments/quantized_load.py FOLDER [--copy] [--json FILE]

--copy loads it with mmap=False, on huge pages. Linux only: memory is the process's peak, including the mapped
file.
"""

from __future__ import annotations

import time

BEGAN = time.perf_counter()

import argparse  # noqa: E402
import datetime  # noqa: E402
import json  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from mistral_7b import Mistral7B, machine  # noqa: E402

CONTEXT, DECODED = 4096, 12


@torch.inference_mode()
def measure(folder: str, mmap: bool) -> dict[str, float]:
    model = Mistral7B.from_pretrained(folder, mmap=mmap)
    opened = time.perf_counter() - BEGAN
    ring = model.rolling_cache(1, CONTEXT)
    tokens = torch.randint(0, model.args.vocab_size, (1, CONTEXT - DECODED))
    model.logits(model.hidden(tokens[:, :8], ring)[:, -1])
    first = time.perf_counter() - BEGAN
    for part in tokens[:, 8:].split(512, dim=1):
        model.hidden(part, ring)
    steps = []
    for _ in range(DECODED):
        began = time.perf_counter()
        model.logits(model.hidden(tokens[:, :1], ring))
        steps.append(time.perf_counter() - began)
    return {
        "seconds_to_open": opened, "seconds_to_first_token": first, "peak_bytes": machine.peak_memory(),
        "context": CONTEXT, "seconds_a_step_there": sorted(steps)[DECODED // 2],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--copy", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record = {
        "what": "copied to huge pages" if options.copy else "mapped", **measure(options.folder, not options.copy),
        "cpu": machine.cpu_name(), "date": datetime.date.today().isoformat(), "commit": machine.commit(),
        "torch": torch.__version__, "command": "python experiments/quantized_load.py FOLDER",
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
