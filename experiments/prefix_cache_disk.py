"""What a prompt costs after a restart, with and without its pages on disk.

    python experiments/prefix_cache_disk.py [--layers 32] [--tokens 8000] [--scheme int4] [--json FILE]

Each line is a process of its own with the same random weights of Mistral 7B v0.3's shape, but for `--layers`, and
the same prompt:

    computed    with an empty folder: the prompt is computed, and its pages are written
    restored    a new process on that folder, whose files are in the system's page cache
    cold        the same, after the files were dropped from the page cache
    without     no folder: what writing costs

first      seconds from asking to the first token
open       seconds to open the engine: with a folder, all weights are read once for their digest
written    seconds that writing went on after the last token

The tokens and log-probabilities of all must be the same to the bit. Computed seconds and bytes both grow
with the layers, so that fewer of them show the ratio.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commits import commit_of

HERE = Path(__file__).resolve().parents[1]


def serve(options: argparse.Namespace, folder: str | None) -> dict[str, Any]:
    """One process: open, ask, close."""
    import random

    from mistral_7b import LLM, EngineConfig, SamplingParams
    from mistral_7b.model import ModelArgs
    from mistral_7b.quantization.schemes import random_model

    args = ModelArgs(n_layers=options.layers, rope_theta=1e6, sliding_window=None, vocab_size=32768)
    model = random_model(args, options.scheme)
    token = 2 * args.n_layers * args.n_kv_heads * args.head_dim * 2
    config = EngineConfig(prefix_cache=folder, kv_cache_bytes=token * (options.tokens + 1024), max_sequences=4)
    began = time.perf_counter()
    llm = LLM(model, config)
    opened = time.perf_counter() - began
    ids = random.Random(0).choices(range(3, args.vocab_size), k=options.tokens)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=5)
    llm.generate(ids[:40], params, cache_salt="warm up")
    times: list[float] = []
    began = time.perf_counter()
    (output,) = llm.generate(ids, params, on_output=lambda *_: times.append(time.perf_counter()))
    ended = time.perf_counter()
    llm.engine.scheduler.close()
    counts = llm.engine.counts
    return {
        "first": times[0] - began, "open": opened, "written": time.perf_counter() - ended,
        "cached_tokens": output.num_cached_tokens, "read_bytes": counts.disk_read_bytes,
        "written_bytes": counts.disk_written_bytes, "dropped_pages": counts.disk_dropped,
        "said": repr([(c.token_ids, c.logprobs) for c in output.outputs]),
    }  # fmt: skip


def drop(folder: str) -> None:
    """Drop the files of a folder from the system's page cache."""
    os.sync()
    for path in Path(folder).rglob("*.kv"):
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def run(what: str, folder: str | None) -> dict[str, Any]:
    """One process's figures, a line of them on the terminal."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", folder or ""]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(HERE)}, check=True, stdout=subprocess.PIPE)
    figures: dict[str, Any] = {"what": what, **json.loads(done.stdout)}
    print(
        f"{what:<10} first {figures['first']:9.3f} s   open {figures['open']:7.3f} s   written "
        f"{figures['written']:7.3f} s   {figures['cached_tokens']} tokens cached   "
        f"{max(figures['read_bytes'], figures['written_bytes']) / 1e9:.3f} GB",
        flush=True,
    )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--scheme", choices=("int4", "int8"), default="int4")
    parser.add_argument("--folder", help="where the files are, for the time of the measurement")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve is not None:
        print(json.dumps(serve(options, options.serve or None)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        records = [run("computed", folder), run("restored", folder)]
        drop(folder)
        records += [run("cold", folder), run("without", None)]
    said = {record.pop("said") for record in records}
    assert len(said) == 1, "not the same bits"
    for record in records[1:3]:
        record["fraction"] = record["first"] / records[0]["first"]
        print(f"{record['what']}: {record['fraction']:.2%} of the computed seconds")
    if options.json:
        import torch

        from mistral_7b import machine

        about = {
            "date": datetime.date.today().isoformat(), "cpu": machine.cpu_name(), "torch": torch.__version__,
            "threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
            "commit": commit_of(HERE), "layers": options.layers, "tokens": options.tokens,
            "scheme": options.scheme, "same_bits": True,
        }  # fmt: skip
        options.json.write_text(json.dumps({**about, "records": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
