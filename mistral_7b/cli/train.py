"""`mistral-7b train`: every field of TrainArgs is a flag and a key of the config file."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

from ..training.args import TrainArgs
from .inputs import UsageError, read_flags, read_text
from .stopping import terminated_as_interrupted


@dataclasses.dataclass(frozen=True)
class Train:
    """Train a model on text files, from random weights or a saved model."""

    config: pathlib.Path | None = None
    """JSON file with the flags below as keys (with underscores); command-line flags override it."""
    training: TrainArgs = dataclasses.field(default_factory=TrainArgs)
    """Training options."""


def run(argv: list[str]) -> int:
    # The file's options become flags before those given: one parser checks both, and the last value wins.
    args = read_flags(Train, "train", [*_config_flags(argv), *argv])
    from .. import training

    with terminated_as_interrupted() as stopped:
        try:
            last = training.train(args.training)
        except KeyboardInterrupt:
            if not stopped:
                raise
            return 128 + stopped[0]
    measured = last.get("held_out_bits_per_byte")
    if measured is not None:
        print(f"held out: {measured:.4f} bits per byte")
    print(f"the model is in {args.training.out}/model; log.jsonl and curve.png are beside it")
    return 0


def _config_flags(argv: list[str]) -> list[str]:
    path = None
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            path = argv[i + 1]
        elif word.startswith("--config="):
            path = word.removeprefix("--config=")
    if path is None or "-h" in argv or "--help" in argv:
        return []
    try:
        config = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UsageError(f"is not JSON: {error}", place=path) from error
    if not isinstance(config, dict):
        raise UsageError(f"holds a {type(config).__name__}, not a JSON object of training options", place=path)
    known = sorted(f.name for f in dataclasses.fields(TrainArgs))
    for name in config:
        if name not in known:
            raise UsageError(
                f"unknown training option {name!r}; known are {', '.join(known)}", field=name, place=path
            )
    return [flag for name, value in config.items() for flag in _flags(path, name, value)]


def _flags(path: str, name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    match value:
        case bool():
            return [flag if value else f"--no-{flag[2:]}"]
        case list():
            return [flag, *(str(item) for item in value)]
        case dict():
            raise UsageError(f"{name} must be a single value or a list, not an object", field=name, place=path)
        case _:
            return [f"{flag}={value}"]
