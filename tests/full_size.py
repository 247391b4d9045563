"""The usage example of the README at its full size: Mistral 7B, 7.24 billion weights, on the CPU.

    python tests/full_size.py             needs some 15 GB of memory and a minute; pytest does not run it
    python tests/full_size.py --tiny      the same lines on a small model, to try this file itself

Prints what it took, and exits 1 if a bound is broken: 16.5 GB at the peak, 60 s to construct,
logits (1, 10, 32000) in float32.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

EXAMPLE = """
import torch
from mistral_7b import Mistral7B, ModelArgs

args = ModelArgs(dim=4096, n_layers=32, head_dim=128, hidden_dim=14336,
                 n_heads=32, n_kv_heads=8, norm_eps=1e-5, vocab_size=32000)
model = Mistral7B(args)
tokens = torch.randint(0, args.vocab_size, (1, 10))
logits, cache = model(tokens)                    # (1, 10, 32000) float32, and a cache
logits, cache = model(tokens[:, -1:], cache)     # goes on where the first call ended
"""
TINY = {"dim=4096": "dim=40", "n_layers=32": "n_layers=2", "head_dim=128": "head_dim=10", "=14336": "=56",
        "n_heads=32": "n_heads=6", "n_kv_heads=8": "n_kv_heads=3"}  # fmt: skip
PEAK_GB, CONSTRUCTION_S = 16.5, 60.0


def peak_gb() -> float:
    """Peak resident memory of this process in GB (10^9 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB here
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model in place of the full one")
    example = EXAMPLE
    for full, small in TINY.items() if parser.parse_args().tiny else ():
        assert full in example
        example = example.replace(full, small)

    seconds, names, shapes = {}, {}, []
    for step in example.strip().replace(",\n", ",").split("\n"):
        began = time.perf_counter()
        exec(step, names)  # this file's own lines, one at a time, so that each can be timed
        seconds[step.split("#")[0].strip()] = time.perf_counter() - began
        if step.startswith("logits"):
            shapes.append((tuple(names["logits"].shape), str(names["logits"].dtype)))

    model, torch = names["model"], names["torch"]
    took = {key: next(s for line, s in seconds.items() if line.startswith(start)) for key, start in (
        ("construct", "model ="), ("ten tokens", "logits, cache = model(tokens)"),
        ("one token", "logits, cache = model(tokens[:, -1:], cache)"),
    )}  # fmt: skip
    print(f"weights        {sum(p.numel() for p in model.parameters()):,} in {model.norm.weight.dtype}")
    print(f"threads        {torch.get_num_threads()} (torch {torch.__version__})")
    for name, s in took.items():
        print(f"{name:14} {s:.2f} s")
    print(f"peak resident  {peak_gb():.2f} GB")
    print(f"logits         {shapes[0]}, then {shapes[1]}")

    broken = []
    if shapes != [((1, 10, 32000), "torch.float32"), ((1, 1, 32000), "torch.float32")]:
        broken.append("the logits' shape or type")
    if peak_gb() > PEAK_GB:
        broken.append(f"peak memory above {PEAK_GB} GB")
    if took["construct"] > CONSTRUCTION_S:
        broken.append(f"construction above {CONSTRUCTION_S:.0f} s")
    if not bool(torch.isfinite(names["logits"]).all()):
        broken.append("logits that are not finite")
    print("broken         " + ", ".join(broken) if broken else "all bounds held")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
