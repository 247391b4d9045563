"""`make gpu-check`: run the tests, then measure exactness and speed on the accelerator, and print a table.

Without an accelerator the measurements run on the CPU, without those that need CUDA, and the table says so. The
size is that of Mistral 7B if it fits in memory, otherwise that of the bundled model. Weights are random,
because speed does not depend on their values. --json FILE also writes the results. gpu_measures.py and
gpu_pages.py contain the measurements.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from commits import commit_of
from gpu_measures import kernels, same_tokens, speeds
from gpu_pages import over_pages

from mistral_7b import Mistral7B, ModelArgs
from mistral_7b.cache import Stateless

TINY = ModelArgs(
    dim=64, n_layers=2, head_dim=16, hidden_dim=96, n_heads=6, n_kv_heads=2, vocab_size=101, sliding_window=8
)
SMALL = ModelArgs(
    dim=320, n_layers=6, head_dim=64, hidden_dim=896, n_heads=4, n_kv_heads=2, vocab_size=4096, sliding_window=256
)
DISTANCE = 1e-4  # largest difference of float32 logits of size 1 to 5, device against CPU


def accelerator() -> torch.device:
    """Return PyTorch's accelerator, or the CPU without one."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


@torch.inference_mode()
def distances(device: torch.device) -> list[dict[str, Any]]:
    """Return the largest difference from the CPU's uncached forward, per cache and chunk, over 5 windows."""
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    here = Mistral7B(TINY, dtype=torch.float32, device="cpu")
    for p in here.parameters():
        p.normal_(0, 0.3 if p.dim() == 2 else 1.0)
    there = Mistral7B(TINY, dtype=torch.float32, device=device)
    there.load_state_dict(here.state_dict())
    tokens = torch.randint(0, TINY.vocab_size, (2, 40))
    wanted, _ = here(tokens, Stateless(TINY.sliding_window))
    records = []
    for cache_name in ("GrowingCache", "RollingCache"):
        for chunk in (1, 7, 8, 9, 40):
            cache = there.rolling_cache(2) if cache_name == "RollingCache" else None
            parts = []
            for start in range(0, 40, chunk):
                logits, cache = there(tokens[:, start : start + chunk].to(device), cache)
                parts.append(logits.cpu())
            far = float((torch.cat(parts, 1) - wanted).abs().max() / wanted.abs().max())
            records.append({"what": f"exact: {cache_name}, chunks of {chunk}", "value": far, "ok": far < DISTANCE})
    return records


def memory_of(device: torch.device) -> int:
    """Return the free memory of the device in bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def line_of(record: dict[str, Any]) -> str:
    """Format one line of the table."""
    if "skipped" in record:
        return f"{record['what']:<62}  not run: {record['skipped']}"
    verdict = {True: "ok", False: "FAILED", None: ""}[record.get("ok")]
    share = f"{record['of_ceiling']:.0%} of the ceiling" if "of_ceiling" in record else ""
    return f"{record['what']:<62}{record['value']:>14.4g} {record.get('unit', ''):<8}{share}{verdict}"


def triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the records to this file")
    parser.add_argument("--no-tests", action="store_true", help="measure only")
    options = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    device = accelerator()
    records: list[dict[str, Any]] = []
    if not options.no_tests:
        passed = subprocess.run([sys.executable, "-m", "pytest"], cwd=root, check=False).returncode == 0
        records.append({"what": "test suite", "value": float(passed), "ok": passed})
    records += distances(device)
    args = ModelArgs() if memory_of(device) > 20e9 else SMALL
    records += kernels(device, args)
    records += over_pages(device, args)
    records += same_tokens(device, TINY)
    records += speeds(device, args, prompt=512 if device.type == "cuda" else 64)
    commit = commit_of(root)
    header = {
        "device": name_of(device),
        "accelerator": device.type != "cpu",
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton_version(),
        "command": "make gpu-check",
    }
    if options.json:
        options.json.write_text(json.dumps({**header, "records": records}, indent=1) + "\n")
    print("\n" + "  ".join(f"{k}: {v}" for k, v in header.items()))
    if not header["accelerator"]:
        print("No accelerator was found: these results are from the CPU.")
    for r in records:
        print(line_of(r))
    return int(any(r.get("ok") is False for r in records))


if __name__ == "__main__":
    sys.exit(main())
