"""A Q4_K_M file of Mistral 7B's shape, with random blocks: memory, and speed beside llama.cpp on the same file.

    python experiments/gguf_7b.py FILE.gguf [--rounds 8] [--json FILE]

FILE is written if it is not there (4.4 GB). Both engines run in one process with the same number of threads, in
turn. Decode follows a context of a few tokens. Memory is that of a process of its own. Needs llama-cpp-python.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from commits import commit_of

from mistral_7b import Mistral7B, ModelArgs, Tokenizer, machine
from mistral_7b.checkpoint.gguf import reading, tokenizer_metadata, writing
from mistral_7b.checkpoint.names import expected
from mistral_7b.checkpoint.writing import Outgoing

SCALES = {
    "Q4_K": {0: 8e-5, 2: 6e-4},
    "Q6_K": {208: 1.5e-5},
}  # byte of a block -> float16; weights are near 0.02
HEAD = {"general.architecture": "llama", "general.file_type": 15, "general.quantization_version": 2}
BLOCKS = 1 << 14  # random blocks that are repeated: the speed does not depend on them
QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)  # must outlive the engine, which calls it
CONTEXT, PROMPT, DECODED = 512, 256, 5


def write(path: Path) -> None:
    """Write the file: the types of Q4_K_M, random codes, and scales of the usual size."""
    args = ModelArgs.v0_3()
    tensors = [Outgoing(name, torch.bfloat16, shape, lambda: torch.empty(0)) for name, shape in expected(args)]
    plan = [(t, writing._kind(t, "q4_k_m", args)) for t in tensors]
    keys = tokenizer_metadata.of_sentencepiece(Tokenizer.v3().path, args.vocab_size)
    rng = np.random.default_rng(0)
    with path.open("wb") as f:
        f.write(writing._header(HEAD | reading.metadata(args) | keys, plan))
        for tensor, kind in plan:
            f.write(bytes(-f.tell() % 32))
            size = writing._nbytes(tensor, kind)
            if kind.name == "F32":
                f.write(np.ones(size // 4, np.float32).tobytes())
                continue
            blocks = rng.integers(0, 256, (BLOCKS, kind.size), dtype=np.uint8)
            for at, scale in SCALES[kind.name].items():
                blocks[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
            raw = blocks.tobytes()
            for _ in range(size // len(raw)):
                f.write(raw)
            f.write(raw[: size % len(raw)])
        f.write(bytes(-f.tell() % 32))


def memory(path: Path) -> None:
    """Print the resident memory in GB after a prompt and some tokens, and the seconds of loading."""
    began = time.perf_counter()
    model = Mistral7B.from_pretrained(path)
    loaded, cache = time.perf_counter() - began, model.rolling_cache(1, CONTEXT)
    with torch.inference_mode():
        for tokens in (torch.randint(5, 32000, (1, PROMPT)), torch.tensor([[7]]), torch.tensor([[8]])):
            model.logits(model.hidden(tokens, cache)[:, -1:])
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"resident_gb": int(status["VmRSS"].split()[0]) * 1024 / 1e9, "load_seconds": loaded}))


def duel(path: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Return seconds of a token, and of a prompt, of both engines."""
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    torch.set_num_threads(threads)
    theirs = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_batch=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False
    )
    ours, prompt = Mistral7B.from_pretrained(path), torch.randint(5, 32000, (1, PROMPT))
    cache = ours.rolling_cache(1, CONTEXT)
    seconds: dict[str, list[float]] = {name: [] for name in ("decode", "decode_llama", "prefill", "prefill_llama")}

    def timed(name: str, work: Any) -> None:
        began = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - began)

    with torch.inference_mode():
        ours(torch.tensor([[1]]), cache)
        theirs.eval([1])
        for _ in range(rounds):
            for i in range(DECODED):
                timed("decode", lambda i=i: ours(torch.tensor([[5 + i]]), cache))
            for i in range(DECODED):
                timed("decode_llama", lambda i=i: theirs.eval([5 + i]))
        for _ in range(3):
            memory_of_prompt = ours.rolling_cache(1, CONTEXT)
            timed("prefill", lambda: ours.logits(ours.hidden(prompt, memory_of_prompt)[:, -1:]))  # noqa: B023
            theirs.reset()
            timed("prefill_llama", lambda: theirs.eval(prompt[0].tolist()))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "system": llama_cpp.llama_print_system_info().decode(),
        "tokens_a_second": {name: (1 if "decode" in name else PROMPT) / s for name, s in medians.items()},
        "decode_ratio": medians["decode_llama"] / medians["decode"],
        "prefill_ratio": medians["prefill_llama"] / medians["prefill"],
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.memory:
        memory(options.file)
        return
    if not options.file.exists():
        write(options.file)
    command = [sys.executable, __file__, str(options.file), "--memory"]
    record: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "commit": commit_of(Path(__file__).resolve().parents[1]),
        "cpu": machine.cpu_name(), "cores": machine.cores(), "load": os.getloadavg()[0],
        "torch": torch.__version__, "llama_cpp_python": llama_cpp.__version__,
        "file_gb": options.file.stat().st_size / 1e9,
        **json.loads(subprocess.run(command, check=True, capture_output=True).stdout),
        **duel(options.file, machine.cores(), options.rounds),
    }  # fmt: skip
    print(json.dumps({name: value for name, value in record.items() if name != "seconds"}, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
