"""`make gpu-check`: the tests, then exactness and speed on whatever accelerator is present; a table last.

Without an accelerator the same is measured on the CPU, and the table says so. The size is that of
Mistral 7B where the memory holds it (random weights: speed does not depend on their values), the bundled
model's otherwise. Results also go to --json FILE.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

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
    """The accelerator PyTorch finds, else the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine() if device.type == "cpu" else device.type


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


@torch.inference_mode()
def distances(device: torch.device) -> list[dict[str, Any]]:
    """Largest difference to the CPU's uncached forward, per cache and chunk, over 5 windows of prompt."""
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


@torch.inference_mode()
def speed(device: torch.device, args: ModelArgs, prompt: int, new: int) -> list[dict[str, Any]]:
    """Prefill and decode of one sequence in bfloat16 through the rolling cache: median tokens per second."""
    model = Mistral7B(args, device=device)
    weights = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "tok_emb" not in n)
    tokens = torch.randint(0, args.vocab_size, (1, prompt), device=device)

    def timed(work) -> float:
        times = []
        for _ in range(5):
            synchronize(device)
            began = time.perf_counter()
            work()
            synchronize(device)
            times.append(time.perf_counter() - began)
        return sorted(times[1:])[len(times) // 2 - 1]  # the first warms up

    def prefill() -> None:
        cache = model.rolling_cache(1, prompt + new)
        model.logits(model.hidden(tokens, cache)[:, -1])

    def prefill_and_decode() -> None:
        cache = model.rolling_cache(1, prompt + new)
        token = model.logits(model.hidden(tokens, cache)[:, -1:]).argmax(-1)
        for _ in range(new):
            token = model.logits(model.hidden(token, cache)).argmax(-1)

    first = timed(prefill)
    step = (timed(prefill_and_decode) - first) / new
    size = f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f}B bf16"
    return [
        {"what": f"prefill of {prompt}, {size} (tokens/s)", "value": prompt / first},
        {"what": f"decode after {prompt}, {size} (tokens/s)", "value": 1 / step},
        {"what": "decode: weights read (GB/s)", "value": weights / step / 1e9},
    ]


def memory_of(device: torch.device) -> int:
    """Bytes that the device can hold now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


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
    big = memory_of(device) > 20e9
    records += speed(device, ModelArgs() if big else SMALL, prompt=512, new=64)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    ).stdout.strip()
    header = {
        "device": name_of(device),
        "accelerator": device.type != "cpu",
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "command": "make gpu-check",
    }
    if options.json:
        options.json.write_text(json.dumps({**header, "records": records}, indent=1) + "\n")
    print("\n" + "  ".join(f"{k}: {v}" for k, v in header.items()))
    if not header["accelerator"]:
        print("No accelerator was found: these are figures of the CPU.")
    for r in records:
        verdict = {True: "ok", False: "FAILED", None: ""}[r.get("ok")]
        print(f"{r['what']:<48}{r['value']:>14.4g}  {verdict}")
    return int(any(r.get("ok") is False for r in records))


if __name__ == "__main__":
    sys.exit(main())
