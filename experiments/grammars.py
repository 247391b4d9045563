"""Measure the cost of grammars per request and per token. Prints a table; --json writes records.

    python experiments/grammars.py --json FILE
    python experiments/grammars.py --against FOLDER      alternately with another checkout, in one run

compile    seconds to prepare a request with a new schema, minus those without: 0.1 s apart, and back to back
token      seconds of a step with a grammar, minus those of one without, per sequence (bundled model)
beside     seconds per token of a stream alone, and next to 16 completions whose grammar becomes ever slower, until
           these end; the time until then, and the longest step (this checkout only)
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from commits import commit_of

ROOT = Path(__file__).resolve().parent.parent
SCHEMAS, PAUSE, TOKENS, ROUNDS = 40, 0.1, 96, 3


def person(i: int) -> dict[str, Any]:
    """Return an ordinary schema, different for each i."""
    return {
        "type": "object", "required": ["name", "age", f"field{i}", "tags"], "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
            f"field{i}": {"enum": ["red", "green", "blue"]},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
        },
    }  # fmt: skip


TEXTS: dict[str, dict[str, Any]] = {
    "schema": {"json": {"type": "array", "items": {"type": "string", "minLength": 4}, "minItems": 200}},
    "regex": {"regex": "([a-z]{2,9} ){400}"},
}


def measure() -> dict[str, float]:
    """Return median seconds by measurement, with the imported package."""
    from mistral_7b import LLM, EngineConfig, SamplingParams
    from mistral_7b.engine.inputs import RequestOptions

    llm = LLM("demo", EngineConfig(max_sequences=16), quantization="int8")

    def ready(params: SamplingParams, pause: float = 0.0) -> float:
        time.sleep(pause)
        began = time.perf_counter()
        llm.inputs.text("import os", params, RequestOptions())
        return time.perf_counter() - began

    def step(n: int, **structured: Any) -> float:
        params = SamplingParams(max_tokens=TOKENS, seed=1, ignore_eos=True, **structured)
        requests = [llm.inputs.text("import os", params, RequestOptions()) for _ in range(n)]
        for request in requests:
            llm.engine.add(request)
        times = []
        while not llm.engine.idle:
            began = time.perf_counter()
            llm.engine.step()
            times.append(time.perf_counter() - began)
        assert all(len(r.completions[0].token_ids) == TOKENS for r in requests)
        return statistics.median(times[8:])

    ready(SamplingParams(structured_outputs={"json": person(-1)}))  # one-time initialization
    plain = statistics.median(ready(SamplingParams()) for _ in range(SCHEMAS))
    out = {}
    for at, (name, pause) in enumerate({"now and then": PAUSE, "in a row": 0.0}.items()):
        unseen = [SamplingParams(structured_outputs={"json": person(i + at * SCHEMAS)}) for i in range(SCHEMAS)]
        out[f"compile, {name}"] = statistics.median(ready(params, pause) for params in unseen) - plain
    for n in (1, 16):
        step(n)
        rounds = [(step(n), *(step(n, structured_outputs=text) for text in TEXTS.values())) for _ in range(ROUNDS)]
        free, *bound = (statistics.median(column) for column in zip(*rounds, strict=True))
        out[f"step of {n}"] = free
        out.update({f"token, {name}, {n} together": (b - free) / n for name, b in zip(TEXTS, bound, strict=True)})
    return out


AMBIGUOUS = 'start: s\ns: s s | "a" | ""'


def beside() -> dict[str, float]:
    """Measure the effect of an expensive grammar on a concurrent stream."""
    from mistral_7b import LLM, SamplingParams
    from mistral_7b.engine.inputs import RequestOptions

    llm = LLM("demo", quantization="int8")
    assert llm.tokenizer is not None
    a = next(t for t in range(llm.tokenizer.vocab_size) if llm.tokenizer.surface(t) == "a")
    hostile = SamplingParams(
        n=16, max_tokens=900, min_tokens=400, logit_bias={a: 100}, structured_outputs={"grammar": AMBIGUOUS}
    )

    def stream(*others: SamplingParams) -> tuple[float, float, float]:
        """Return tokens per second while the others run (or over 400), the longest step, and the seconds."""
        free = llm.inputs.text(
            "import os", SamplingParams(max_tokens=2000, ignore_eos=True, seed=1), RequestOptions()
        )
        bad = [llm.inputs.text("a", params, RequestOptions()) for params in others]
        for request in (free, *bad):
            llm.engine.add(request)
        longest, began = 0.0, time.perf_counter()
        while len(free.completions[0].token_ids) < 400 or any(not r.finished for r in bad):
            step = time.perf_counter()
            llm.engine.step()
            longest = max(longest, time.perf_counter() - step)
        seconds, tokens = time.perf_counter() - began, len(free.completions[0].token_ids)
        assert all("CPU time" in str(r.error) for r in bad), "a grammar ended by itself"
        llm.engine.abort(free.id)
        return tokens / seconds, longest, seconds

    stream()
    alone, _, _ = stream()
    rate, longest, seconds = stream(hostile)
    return {"stream alone, a token": 1 / alone, "stream beside it, a token": 1 / rate,
            "longest step beside it": longest, "until it is ended": seconds}  # fmt: skip


def measured(folder: Path, what: str = "--one") -> dict[str, float]:
    """Run the measurements with the package of a checkout, in a separate process."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, __file__, what],
        env=environment,
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout to compare with")
    parser.add_argument("--runs", type=int, default=3, help="alternating runs per checkout")
    parser.add_argument("--json", type=Path, help="write the records to this file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--beside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one or options.beside:
        print(json.dumps(measure() if options.one else beside()))
        return
    folders = [ROOT] + ([options.against.resolve()] if options.against else [])
    runs: list[list[dict[str, float]]] = [[] for _ in folders]
    for _ in range(options.runs):
        for folder, of in zip(folders, runs, strict=True):
            of.append(measured(folder))
    columns = [{name: statistics.median(run[name] for run in of) for name in of[0]} for of in runs]
    columns[0].update(measured(ROOT, "--beside"))
    for name in columns[0]:
        print(f"{name:32}" + "".join(f"{c[name] * 1e3:12.3f} ms" if name in c else "" for c in columns))
    if options.json:
        from mistral_7b import machine

        # Without the folders of this machine.
        argv = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv]
        record = {
            "command": " ".join(argv), "date": datetime.date.today().isoformat(), "cpu": machine.cpu_name(),
            "torch": torch.__version__, "python": platform.python_version(),
            "commits": [commit_of(folder) for folder in folders], "seconds": columns, "runs": runs,
        }  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
