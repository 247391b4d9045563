"""The error of K types as `convert --type` writes them, beside llama.cpp's quantizer without an importance matrix.

    python experiments/gguf_rmse.py [--json FILE]

Root mean square error relative to that of the values. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
from pathlib import Path
from typing import Any

import llama_cpp
import torch
from commits import commit_of
from torch import Tensor

from mistral_7b import Mistral7B
from mistral_7b.checkpoint.gguf import blocks, quantizing
from mistral_7b.checkpoint.gguf.file import KINDS, Kind

WIDTH, KINDS_MEASURED = 4096, ("Q4_K", "Q6_K")


def values() -> dict[str, Tensor]:
    """Rows of WIDTH values: two distributions, and the bundled model's matrices."""
    torch.manual_seed(0)
    matrices = [
        w.reshape(-1) for w in Mistral7B.from_pretrained("demo", dtype=torch.float32).parameters() if w.dim() == 2
    ]
    flat = torch.cat(matrices).detach()
    return {
        "normal": torch.randn(256, WIDTH) * 0.02,
        "Student's t, 4 degrees of freedom": torch.distributions.StudentT(4.0).sample((256, WIDTH)) * 0.02,
        "the bundled model's": flat[: len(flat) // WIDTH * WIDTH].view(-1, WIDTH)[:1024],
    }


def llama(kind: Kind, x: Tensor) -> Tensor:
    """Blocks of llama.cpp's quantizer."""
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libggml-base.so*"))
    chunk = ctypes.CDLL(str(library)).ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    out = torch.empty(len(x), WIDTH // kind.block * kind.size, dtype=torch.uint8)
    chunk(kind.code, x.data_ptr(), out.data_ptr(), 0, len(x), WIDTH, None)
    return out


def error(kind: Kind, raw: Tensor, x: Tensor) -> float:
    return float((blocks.dequantize(kind, raw) - x).norm() / x.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, x in values().items():
        x = x.contiguous()
        for kind in (KINDS[k] for k in KINDS_MEASURED):
            ours = torch.cat([quantizing.quantize(kind, part) for part in x.split(64)])
            row = {"values": name, "kind": kind.name, "ours": error(kind, ours, x),
                   "llama.cpp": error(kind, llama(kind, x), x)}  # fmt: skip
            print(f"{name:<36}{kind.name:<6}{row['ours']:.4f}   llama.cpp {row['llama.cpp']:.4f}")
            rows.append(row)
    if options.json:
        commit = commit_of(Path(__file__).resolve().parents[1])
        head = {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "llama_cpp_python": llama_cpp.__version__,
        }
        options.json.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
