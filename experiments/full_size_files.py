"""Measure memory and time of loading and converting a full-size checkpoint with random weights.

    python experiments/full_size_files.py FOLDER [--json FILE]     needs 45 GB of disk in FOLDER, 16 GB of memory

Each step runs in its own process. The peak is that of resident memory, including mapped files. Bounds: 1.1
times the checkpoint for loading, 3 GB for converting.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from commits import commit_of

STEPS = {
    "save": "Mistral7B(ModelArgs()).save_pretrained({folder!r} + '/hf')",
    "load huggingface": "m = Mistral7B.from_pretrained({folder!r} + '/hf'); m(ONE)",
    "convert to mistral": "convert({folder!r} + '/hf', {folder!r} + '/mistral', to='mistral')",
    "load mistral": "m = Mistral7B.from_pretrained({folder!r} + '/mistral'); m(ONE)",
}
PROGRAM = """
import resource, torch
ONE = torch.ones(1, 1, dtype=torch.long)
from mistral_7b import Mistral7B, ModelArgs
from mistral_7b.checkpoint import convert
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
{work}
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder / "full_size_files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    records, broken = [], []
    try:
        for what, work in STEPS.items():
            program = PROGRAM.format(work=work.format(folder=str(folder)))
            began = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - began
            before, peak = (int(n) * 1024 / 1e9 for n in done.stdout.split())
            size = sum(f.stat().st_size for f in (folder / "hf").glob("*.safetensors")) / 1e9
            records.append({"what": what, "seconds": round(seconds, 1), "peak_gb": round(peak, 2),
                            "import_gb": round(before, 2), "checkpoint_gb": round(size, 2)})  # fmt: skip
            print(records[-1], flush=True)
            if what.startswith("load") and peak > 1.1 * size:
                broken.append(what)
            if what.startswith("convert") and peak > 3:
                broken.append(what)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    header = {"date": datetime.date.today().isoformat(), "commit": commit_of(),
              "cpus": os.cpu_count(), "torch": torch.__version__,
              "command": "python experiments/full_size_files.py FOLDER"}  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps({**header, "records": records}, indent=1) + "\n")
    print("exceeded bounds: " + ", ".join(broken) if broken else "all within bounds")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
