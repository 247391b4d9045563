"""Measure the server's overhead over the bare engine, and its restart after kill -9. Writes JSON.

    python experiments/serving_overhead.py --streams 32 --answers 4 --rounds 7 --json FILE
    python experiments/serving_overhead.py --shape 7b --tokens 16 48 --answers 1 --rounds 3 --json FILE     8 GB

overhead    concurrent streams of several responses each, alternately sent to the engine's thread and over
            HTTP, in one process with the same settings. The clients run in a separate process on the same
            cores. The model is the bundled one, or random int4 weights in Mistral 7B's shape
kill -9     during a response: what the client receives, and seconds until a new server is ready
page        time to the first byte of `/`
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from serving_clients import Client, Server, place, post

Tokens = tuple[int, int]  # minimum and maximum tokens of a response


def questions(streams: int, answers: int, tokens: Tokens, seed: int) -> list[list[dict[str, Any]]]:
    """Return each stream's requests: prompts of 16 ids, responses of different lengths to avoid lockstep."""
    dice = random.Random(seed)

    def question() -> dict[str, Any]:
        prompt = [1, *(dice.randrange(10, 4000) for _ in range(15))]
        return {"prompt": prompt, "max_tokens": dice.randint(*tokens), "ignore_eos": True, "temperature": 0,
                "stream": True}  # fmt: skip

    return [[question() for _ in range(answers)] for _ in range(streams)]


async def clients(port: int) -> None:
    """Run the clients' process: for each line "STREAMS ANSWERS LEAST MOST SEED" on stdin, print the seconds."""
    connections: list[Client] = []

    async def stream(client: Client, asked: Sequence[bytes]) -> None:
        for data in asked:
            answer = await client.ask(data)
            assert answer.status == 200
            assert answer.whole
            assert not answer.failed

    while line := await asyncio.to_thread(sys.stdin.readline):
        streams, answers, least, most, seed = map(int, line.split())
        while len(connections) < streams:
            connections.append(await Client.connect(port))
        asked = [
            [post("/v1/completions", body) for body in own]
            for own in questions(streams, answers, (least, most), seed)
        ]
        began = time.perf_counter()
        await asyncio.gather(*(stream(c, own) for c, own in zip(connections, asked, strict=True)))
        print(time.perf_counter() - began, flush=True)


def bare(llm: Any, asked: Sequence[Sequence[dict[str, Any]]]) -> float:
    """Return the seconds of the same requests, sent in the engine's thread."""
    from mistral_7b.engine.inputs import RequestOptions
    from mistral_7b.sampling.params import SamplingParams

    left, done = len(asked), threading.Event()

    def ask_next(own: Iterator[dict[str, Any]]) -> None:
        nonlocal left
        if (body := next(own, None)) is None:
            left -= 1
            if not left:
                done.set()
            return
        params = SamplingParams(max_tokens=body["max_tokens"], ignore_eos=True, temperature=0.0)

        def sink(request: Any, pieces: Any) -> None:
            if request.finished:
                llm._commands.put(partial(ask_next, own))

        llm.engine.add(llm.inputs.text(body["prompt"], params, RequestOptions(), sink))

    began = time.perf_counter()
    for own in asked:
        llm._commands.put(partial(ask_next, iter(own)))
    done.wait()
    return time.perf_counter() - began


def overhead(shape: str, streams: int, answers: int, lengths: Tokens, rounds: int) -> dict[str, Any]:
    """Measure both alternately, after one warmup round each."""
    from engine import build as model_of

    from mistral_7b.bench.serving.ours import words_for
    from mistral_7b.engine.async_llm import AsyncLLM
    from mistral_7b.engine.config import EngineConfig
    from mistral_7b.server.app import build
    from mistral_7b.server.config import ServerConfig
    from mistral_7b.server.serve import Server as Http
    from mistral_7b.server.serve import bind

    config = ServerConfig(port=0)
    sock = bind(config)
    model = model_of(shape, None)
    llm = AsyncLLM(model, EngineConfig(prefix_caching=False), tokenizer=words_for(model))
    server = Http(build(llm, config, shape))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    command = [sys.executable, __file__, "--clients-of", str(sock.getsockname()[1])]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        pairs = []
        for seed in range(rounds + 1):
            asked = questions(streams, answers, lengths, seed)
            tokens = sum(body["max_tokens"] for own in asked for body in own)
            direct = tokens / bare(llm, asked)
            print(streams, answers, *lengths, seed, file=other.stdin, flush=True)
            pairs.append((direct, tokens / float(other.stdout.readline())))
        other.stdin.close()
    server.stop()
    thread.join()
    asyncio.run(llm.close())
    ratios = sorted(served / direct for direct, served in pairs[1:])
    return {
        "model": shape, "streams": streams, "answers_each": answers, "tokens_an_answer": lengths,
        "tokens_a_second": [{"bare": direct, "served": served} for direct, served in pairs[1:]],
        "bare_tokens_a_second": statistics.median(direct for direct, _ in pairs[1:]),
        "served_tokens_a_second": statistics.median(served for _, served in pairs[1:]),
        "ratio_median": statistics.median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1],
    }  # fmt: skip


def killed() -> dict[str, Any]:
    """Kill a server during a response, and start another."""

    async def watch(server: Server) -> dict[str, Any]:
        client = await Client.connect(server.port)
        answer = client.ask(post("/v1/completions", {**questions(1, 1, (1, 1), 0)[0][0], "max_tokens": 4000}))
        while client.answer.events < 3:
            await asyncio.sleep(0.01)
        server.end()
        began = time.perf_counter()
        seen = await asyncio.wait_for(answer, 10)
        return {"client_heard_after": time.perf_counter() - began, "status": seen.status, "whole": seen.whole,
                "events": seen.events}  # fmt: skip

    with Server("--quiet") as server:
        seen = asyncio.run(watch(server))
    ready, cpu = [], []
    for _ in range(3):
        with Server("--quiet") as server:
            ready.append(server.seconds)
            cpu.append(server.metrics()["process_cpu_seconds_total"])
    return {**seen, "seconds_until_ready": ready, "cpu_seconds_until_ready": cpu}


def page() -> dict[str, Any] | None:
    """Return the seconds to the first byte of the page; None if there is no page."""
    with Server("--quiet") as server, contextlib.suppress(urllib.error.HTTPError):
        taken = []
        for _ in range(50):
            began = time.perf_counter()
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=10) as answer:
                answer.read(1)
            taken.append(time.perf_counter() - began)
        return {"median": statistics.median(taken), "most": max(taken)}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=("demo", "7b"), default="demo")
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=(64, 192), help="minimum and maximum tokens of a response"
    )
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--answers", type=int, default=4, help="responses per stream, one after the other")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--clients-of", type=int, metavar="PORT", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.clients_of:
        asyncio.run(clients(args.clients_of))
        return
    measured = overhead(args.shape, args.streams, args.answers, args.tokens, args.rounds)
    record = {**place(), "overhead": measured}
    if args.shape == "demo":
        record |= {"killed": killed(), "page": page()}
    record["load_after"] = place()["load"]
    text = json.dumps(record, indent=1)
    print(text)
    if args.json is not None:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
