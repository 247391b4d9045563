"""`mistral-7b serve`: serve a model over HTTP with the OpenAI, Anthropic and Mistral APIs."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.util
import os
import pathlib
import secrets
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import tyro

from ..engine.config import EngineConfig
from ..files import size_in_bytes
from ..server.config import ServerConfig, traces_wanted
from ..server.keys import read_keys
from .inputs import ModelName, ModelOptions, Repeated, UsageError, busy, read_flags

if TYPE_CHECKING:
    from ..engine.async_llm import AsyncLLM
    from ..engine.inputs import InputProcessor
    from ..server.operations.tracing import Spans
    from ..server.ray_app.remote import RemoteLLM


@dataclasses.dataclass(frozen=True)
class Http(ServerConfig):
    """HTTP server."""

    api_keys: Annotated[Repeated, tyro.conf.arg(name="api-key")] = ()
    """API key for requests. Visible in the process list: prefer --api-key-file."""
    admin_keys: Annotated[Repeated, tyro.conf.arg(name="admin-key")] = ()
    """API key for recording, steering, and loading and unloading adapters, which are disabled without one."""
    cors_origins: Annotated[Repeated, tyro.conf.arg(name="cors-origin")] = ()
    """Allowed CORS origin, such as https://example.org; * allows all."""
    allowed_hosts: Annotated[Repeated, tyro.conf.arg(name="allowed-host")] = ()
    """Allowed Host header; None: any, or on loopback only local names."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """Engine; see docs/engine.md."""

    max_sequences: int = EngineConfig.max_sequences
    """Maximum number of concurrent sequences; more wait."""
    max_batch_tokens: int = EngineConfig.max_batch_tokens
    """Maximum number of tokens per step: larger steps speed up prefill and delay other streams."""
    max_waiting: int | None = 256
    """Maximum number of waiting requests; further ones get status 429."""
    kv_cache_bytes: int | None = EngineConfig.kv_cache_bytes
    """Memory for the KV cache; None: half of free memory (nine tenths on an accelerator)."""
    prefix_caching: bool = EngineConfig.prefix_caching
    """Reuse the cached prefix of earlier prompts."""
    prefix_cache: str | None = None
    """Folder that keeps prefixes on disk, across restarts and between servers that share it."""
    prefix_cache_size: str = "20GB"
    """Maximum size of that folder; the least recently used files are removed."""
    deterministic: bool = EngineConfig.deterministic
    """Bit-identical results in any batch; int8 and int4 with dtype bfloat16 on a CPU always are."""


@dataclasses.dataclass(frozen=True)
class Serve(ModelOptions):
    """Serve a model over HTTP; by default the bundled model."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    name: str = ""
    """Model name for clients; None: the last part of its path."""
    adapters: Annotated[Repeated, tyro.conf.arg(name="adapter", metavar="NAME=PATH")] = ()
    """A LoRA adapter (a folder, a file or a hub id) and its name for clients."""
    api_key_file: str = ""
    """A file with one key per line, and its limits; in addition to --api-key and MISTRAL_7B_API_KEY."""
    admin_key_file: str = ""
    """The same, in addition to --admin-key and MISTRAL_7B_ADMIN_KEY."""
    quiet: bool = False
    """Do not log requests."""
    ray: bool = False
    """Run the engines as replicas on Ray; see docs/ray.md."""
    replicas: Annotated[str, tyro.conf.arg(metavar="N|MIN:MAX")] = "1"
    """With --ray: number of engines, or bounds between which it follows their queues."""
    tensor_parallel: int = 1
    """Number of processes to divide each engine's model among; see docs/scale.md."""
    workers: int = 1
    """Not supported: an engine batches requests only within its own process."""
    http: Http = dataclasses.field(default_factory=Http)
    engine: Engine = dataclasses.field(default_factory=Engine)


def run(argv: list[str]) -> int:
    args = read_flags(Serve, "serve", argv)
    _check_scale(args)
    config, engine, traced = _config(args), _engine(args), traces_wanted(os.environ)
    adapters = dict(_adapter(text) for text in args.adapters)
    missing = [name for name in ("fastapi", "uvicorn", "llguidance") if importlib.util.find_spec(name) is None]
    args.check_paths(args.model)
    if missing:
        raise UsageError(f"serve needs {', '.join(missing)}", hint="pip install 'mistral-7b[serve]'")

    from ..engine.disk_files import check_folder
    from ..server.serve import bind, url_of

    if engine.prefix_cache is not None:
        check_folder(engine.prefix_cache)
    sock = bind(config)  # before loading the model, so that a port in use fails at once
    if not args.ray:
        llm, end = open_llm(_sharing_cores(args, 1), engine, adapters), None
        llm.inputs.warm_up()
    else:
        llm, end = _remote(args, engine, config, adapters)

    from ..server.operations.json_log import log_to_stderr
    from ..server.serve import Server

    log = log_to_stderr(access=not args.quiet)
    name = args.name or pathlib.Path(args.model).name
    if args.ray:
        from ..server.ray_app import app_of as build
    else:
        from ..server.app import build  # type: ignore[assignment]
    app = build(llm, config, name)  # type: ignore[arg-type]
    spans = app.state.serving.trace = _spans(name) if traced else None
    server = Server(app)
    log.write(f"mistral-7b: serving {args.model} at {url_of(sock)} (Ctrl-C stops it)")
    app.state.serving.log = log
    server.run(sockets=[sock])
    asyncio.run(llm.close())
    if end is not None:
        end()
    if spans is not None:
        spans.close()
    if server.broken is not None:
        log.write(f"mistral-7b: {server.broken}; the log has the traceback")
    log.close()
    return 0 if server.broken is None else 1


def open_llm(args: Serve, engine: EngineConfig, adapters: dict[str, str]) -> AsyncLLM:
    """Load the model with an engine, here or in a replica, and in the processes that follow it."""
    from ..engine.async_llm import AsyncLLM
    from ..engine.followers import lead

    inputs = lead(args.tensor_parallel, functools.partial(_open_engine, args, engine, adapters))
    with busy("preparing"):
        return AsyncLLM(inputs)


def _open_engine(args: Serve, engine: EngineConfig, adapters: dict[str, str]) -> InputProcessor:
    from ..engine.llm import open_engine

    model, tokenizer = args.open(args.model)
    return open_engine(model, engine, tokenizer, adapters)


def _sharing_cores(args: Serve, engines: int) -> Serve:
    """Return `args` with the threads of each process, if several are to share this machine's cores."""
    from .. import machine

    processes = engines * args.tensor_parallel
    if args.threads is not None or (processes == 1 and not args.ray):
        return args
    return dataclasses.replace(args, threads=max(1, machine.cores() // processes))


def _check_scale(args: Serve) -> None:
    """UsageError for more processes than there can be."""
    if args.workers != 1:
        raise UsageError(
            "--workers: each process would load the model again, and batch and cache only its own requests",
            field="--workers",
            hint="one process serves all clients; several engines: --ray --replicas N, or deploy/nginx.conf",
        )
    if args.tensor_parallel < 1:
        raise UsageError("--tensor-parallel must be at least 1", field="--tensor-parallel")
    if args.replicas != "1" and not args.ray:
        raise UsageError("--replicas needs --ray", field="--replicas")
    if args.ray and importlib.util.find_spec("ray") is None:
        raise UsageError("--ray needs ray", field="--ray", hint="pip install 'mistral-7b[scale]'")
    if args.ray and args.http.adapter_folder is not None:
        raise UsageError("--adapter-folder: the replicas' adapters are fixed", field="--adapter-folder",
                         hint="name them by --adapter")  # fmt: skip


def _remote(
    args: Serve, engine: EngineConfig, config: ServerConfig, adapters: dict[str, str]
) -> tuple[RemoteLLM, Callable[[], None]]:
    """Start the replicas."""
    if "RAY_ADDRESS" not in os.environ:  # Ray listens on all addresses; without a token, anyone could run code
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from ..server.ray_app import read_replicas, start

    args = _sharing_cores(args, read_replicas(args.replicas)[1])
    with busy("starting replicas"):
        opened = functools.partial(open_llm, args, engine, adapters)
        words = functools.partial(args.open_tokenizer, source=args.model)
        return start(
            opened, engine, config, args.replicas, args.threads or 1, args.tensor_parallel, args.device, adapters,
            words,
        )  # fmt: skip


def _config(args: Serve) -> ServerConfig:
    """Return the server's configuration with the keys from flags, files and environment."""
    api = read_keys(args.http.api_keys, args.api_key_file, "MISTRAL_7B_API_KEY")
    admin = read_keys(args.http.admin_keys, args.admin_key_file, "MISTRAL_7B_ADMIN_KEY")
    given = {f.name: getattr(args.http, f.name) for f in dataclasses.fields(ServerConfig)}
    config = ServerConfig(**{**given, "api_keys": api, "admin_keys": admin})
    if not api and not config.loopback:
        print(
            f"mistral-7b: {config.host} is reachable from other machines without an --api-key: access is open",
            file=sys.stderr,
        )
    return config


def _engine(args: Serve) -> EngineConfig:
    """Return the engine's configuration. UsageError for a size that is none."""
    flags = dict(vars(args.engine))
    if not (size := size_in_bytes(flags.pop("prefix_cache_size"))):
        raise UsageError(
            f'--prefix-cache-size {args.engine.prefix_cache_size} is no size, like "20GB" or "500MB"',
            field="--prefix-cache-size",
        )
    return EngineConfig(**flags, prefix_cache_bytes=size, kv_dtype="int8" if args.kv == "int8" else None)


def _spans(model_name: str) -> Spans | None:
    """Return the tracer of requests, or None (with a message) without OpenTelemetry.

    The environment variables may be set for all programs of a machine, so their presence must not prevent a start.
    """
    try:
        from ..server.operations.tracing import Spans
    except ModuleNotFoundError:
        print("mistral-7b: no traces are sent: pip install 'mistral-7b[otel]'", file=sys.stderr)
        return None
    return Spans(model_name)


def _adapter(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--adapter {text} is not NAME=PATH", field="--adapter")
    return name, path
