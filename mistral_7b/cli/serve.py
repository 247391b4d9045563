"""`mistral-7b serve`: a model over HTTP, for OpenAI's, Anthropic's and Mistral's clients."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import os
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated

import tyro

from ..engine.config import EngineConfig
from ..server.config import ServerConfig, read_keys, traces_wanted
from .inputs import ModelName, ModelOptions, UsageError, busy, read_flags

if TYPE_CHECKING:
    from ..server.tracing import Spans

Repeated = tyro.conf.UseAppendAction[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Http(ServerConfig):
    """The door."""

    api_keys: Annotated[Repeated, tyro.conf.arg(name="api-key")] = ()
    """Whoever has this key may ask; may be given again. The list of processes shows it: a file is better."""
    admin_keys: Annotated[Repeated, tyro.conf.arg(name="admin-key")] = ()
    """Whoever has this key may also load and unload adapters; without one nobody may. May be given again."""
    cors_origins: Annotated[Repeated, tyro.conf.arg(name="cors-origin")] = ()
    """Pages of this origin may ask, such as https://example.org; * is all. May be given again."""
    allowed_hosts: Annotated[Repeated, tyro.conf.arg(name="allowed-host")] = ()
    """A name by which the server may be called; none: any, or only this machine's own on loopback."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """What goes on at once; more of it in docs/engine.md."""

    max_sequences: int = EngineConfig.max_sequences
    """Completions computed together; more wait."""
    max_batch_tokens: int = EngineConfig.max_batch_tokens
    """Tokens of one step: more make prompts cheaper, and streams that run beside them less even."""
    max_waiting: int | None = 256
    """Requests that may wait; one more is answered 429."""
    kv_cache_bytes: int | None = EngineConfig.kv_cache_bytes
    """Memory for keys and values; none: half of what is free (nine tenths on an accelerator)."""
    prefix_caching: bool = EngineConfig.prefix_caching
    """Begin a prompt where an earlier one that began alike has left off."""
    deterministic: bool = EngineConfig.deterministic
    """The same tokens to the bit whatever runs beside; int8 and int4 on a CPU are so by themselves."""


@dataclasses.dataclass(frozen=True)
class Serve(ModelOptions):
    """Serve a model over HTTP: the bundled one, if none is named."""

    model: ModelName = "demo"
    """A folder, a file, a hub id or "demo"."""
    name: str = ""
    """What clients call the model; none: the last part of its path."""
    adapters: Annotated[Repeated, tyro.conf.arg(name="adapter", metavar="NAME=PATH")] = ()
    """A LoRA adapter, and what clients call it. May be given again."""
    api_key_file: str = ""
    """A file with a key on each line, besides those of --api-key and of MISTRAL_7B_API_KEY."""
    admin_key_file: str = ""
    """The same for --admin-key and MISTRAL_7B_ADMIN_KEY."""
    quiet: bool = False
    """No line for each request in the log."""
    http: Http = dataclasses.field(default_factory=Http)
    engine: Engine = dataclasses.field(default_factory=Engine)


def run(argv: list[str]) -> int:
    args = read_flags(Serve, "serve", argv)
    config, traced = _config(args), traces_wanted(os.environ)
    adapters = dict(_adapter(text) for text in args.adapters)
    missing = [name for name in ("fastapi", "uvicorn", "llguidance") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}", hint="pip install 'mistral-7b[serve]'")

    from ..server.serve import bind, url_of

    sock = bind(config)  # before the model is loaded: a port that is taken is said at once
    model, tokenizer = args.open(args.model)
    engine = EngineConfig(**vars(args.engine), kv_dtype="int8" if args.kv == "int8" else None)

    from ..engine.async_llm import AsyncLLM
    from ..server.app import build
    from ..server.log import log_to_stderr
    from ..server.serve import Server

    with busy("preparing"):
        llm = AsyncLLM(model, engine, tokenizer=tokenizer, adapters=adapters)
    log_to_stderr(access=not args.quiet)
    name = args.name or pathlib.Path(args.model).name
    llm.reader.warm_up()
    app = build(llm, config, name)
    spans = app.state.serving.trace = _spans(name) if traced else None
    server = Server(app)
    print(f"mistral-7b: serving {args.model} at {url_of(sock)} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    server.run(sockets=[sock])
    asyncio.run(llm.close())
    if spans is not None:
        spans.close()
    if server.broken is not None:
        print(f"mistral-7b: {server.broken}; the log has the traceback", file=sys.stderr)
        return 1
    return 0


def _config(args: Serve) -> ServerConfig:
    """The server's configuration, with keys from wherever they are."""
    api = read_keys(args.http.api_keys, args.api_key_file, "MISTRAL_7B_API_KEY")
    admin = read_keys(args.http.admin_keys, args.admin_key_file, "MISTRAL_7B_ADMIN_KEY")
    config = dataclasses.replace(args.http, api_keys=api, admin_keys=admin)
    if not api and not config.loopback:
        print(
            f"mistral-7b: {config.host} can be reached by others, and there is no --api-key: anybody may ask",
            file=sys.stderr,
        )
    return config


def _spans(model_name: str) -> Spans | None:
    """What makes spans of requests; None, and a line about it, where OpenTelemetry is not installed.

    The variables that ask for traces may be meant for all programs of a machine: they keep none from starting.
    """
    try:
        from ..server.tracing import Spans
    except ModuleNotFoundError:
        print("mistral-7b: no traces are sent: pip install 'mistral-7b[otel]'", file=sys.stderr)
        return None
    return Spans(model_name)


def _adapter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--adapter {text} is not NAME=PATH", field="--adapter")
    return name, path
