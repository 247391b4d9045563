"""Run one job in its own process: python -m mistral_7b.bench.process JOB-AS-JSON

The last line on stdout is the result as JSON; for ceilings, each line holds a part of it. On failure the last line
on stderr is the error's data as JSON, and the exit code is 1.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys

from ..errors import Mistral7BError, first_line
from ..kernels import threads
from .jobs import LLAMA, OURS, STEPS, TRANSFORMERS, Job
from .timing import measure

ENGINES = {OURS: "peers.ours", LLAMA: "peers.llama_cpp", TRANSFORMERS: "peers.hf_transformers"}


def main(argv: list[str]) -> int:
    try:
        if argv[0] == "ceilings":
            ceilings(*json.loads(argv[1]))
            return 0
        if argv[0] == "serving":
            from .serving import ours, traffic

            print(json.dumps(dataclasses.asdict(ours.serve(traffic.ServingJob.from_json(argv[1])))))
            return 0
        if argv[0] == "quality":
            from .quality import llama_cpp

            print(json.dumps(llama_cpp.evaluate(**json.loads(argv[1]))))
            return 0
        job = Job.from_json(argv[0])
        engine = importlib.import_module(f".{ENGINES[job.engine]}", __package__).Engine(job)
        found = measure(engine, job)
        if job.engine == OURS and job.what == "decode":
            rate = engine.generated(STEPS[job.quick].seconds)
            found = dataclasses.replace(found, generate_tokens_per_s=rate)
    except (Mistral7BError, ImportError, MemoryError) as error:
        data = error.data if isinstance(error, Mistral7BError) else {"message": first_line(error)}
        print(json.dumps(data), file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(found)))
    return 0


def ceilings(n: int | None, quick: bool, until: float) -> None:
    """Print the number of threads, then each ceiling as soon as it is measured."""
    import torch

    from . import roofline

    threads.use(n)
    print(json.dumps({"threads": torch.get_num_threads()}), flush=True)
    for name, value in roofline.measure(quick, until):
        print(json.dumps({name: value}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
