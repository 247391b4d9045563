"""Serving on Ray: one server, and an engine in each replica. In reading order:

wire       what passes between them
remote     RemoteLLM: the server's side; requests continue on another replica when theirs dies
replica    an engine as a deployment
router     which replica gets a request
(here)     `build` for `serve run` and KubeRay, `start` for `mistral-7b serve --ray`
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from ...engine.async_llm import AsyncLLM
from ...engine.config import EngineConfig
from ...engine.followers import lead
from ...engine.inputs import InputProcessor
from ...engine.llm import open_engine
from ...engine.prompts import load_tokenizer
from ...errors import ConfigError, EngineError, Mistral7BError, first_line
from ...kernels import threads
from ...model import Mistral7B
from ...text.tokenizer import Tokenizer
from ..app import build as build_app
from ..config import ServerConfig
from ..keys import read_keys
from .remote import RemoteLLM
from .replica import Replica
from .router import PrefixRouter
from .wire import told_metrics

LOOPBACK = "127.0.0.2"  # Ray replaces 127.0.0.1 by an address that other machines reach
HEALTH_PERIOD = 2.0  # seconds
STATS_PERIOD = 1.0
LOOK_BACK = 12.0  # seconds over which the queue is averaged; must exceed the ten between reports
UPSCALE_DELAY = 10.0
OURS = re.compile(r"mistral_7b\.errors\.\w+: ")
UNLIMITED = 1 << 20  # calls to a replica at a time: the engine's own queue is what refuses requests


class Options(BaseModel, extra="forbid"):
    """The arguments of `build`. `engine` and `server`: fields of EngineConfig and ServerConfig."""

    model: str = "demo"
    name: str = "mistral-7b"
    quantization: str | None = None
    dtype: str | None = None
    device: str | None = None
    threads: int | None = None
    replicas: str | int = 1
    tensor_parallel: int = 1
    adapters: dict[str, str] = {}
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}


def build(given: Mapping[str, Any]) -> serve.Application:
    """The application for `serve run` and `RayService`: HTTP by Ray's proxies, with the routes of `serve`.

    `given`: fields of Options, whose values may be texts. ConfigError for other fields or values.
    """
    try:
        args = Options.model_validate(given)
    except ValidationError as e:
        first = e.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{field}: {first['msg']}", field=field, hint="see docs/ray.md") from None
    engine = EngineConfig(**{"max_waiting": 256, **args.engine})
    keys = {f"{kind}_keys": read_keys((), "", f"MISTRAL_7B_{kind.upper()}_KEY") for kind in ("api", "admin")}
    config = ServerConfig(**{"host": "0.0.0.0", **keys, **args.server})
    engines = engines_of(
        partial(_open, args, engine), engine, config, str(args.replicas), args.threads, args.tensor_parallel,
        args.device,
    )  # fmt: skip
    front: Any = serve.deployment(serve.ingress()(Front), name="server", max_ongoing_requests=UNLIMITED)
    return front.bind(engines, config, args.name, args.adapters)


def _open(args: Options, engine: EngineConfig) -> AsyncLLM:
    return AsyncLLM(lead(args.tensor_parallel, partial(_open_engine, args, engine)))


def _open_engine(args: Options, engine: EngineConfig) -> InputProcessor:
    threads.use(args.threads)
    return open_engine(
        args.model, engine, None, args.adapters, tensor_parallel=args.tensor_parallel, dtype=args.dtype,
        device=args.device, quantization=args.quantization,
    )  # fmt: skip


def _tokenizer(model: Mistral7B) -> Tokenizer | None:
    return load_tokenizer(model)[0]


def engines_of(
    open_llm: Callable[[], AsyncLLM], engine: EngineConfig, config: ServerConfig, replicas: str, cpus: int | None,
    processes: int, device: str | None, **router: Any,
) -> serve.Application:  # fmt: skip
    """The engines' deployment: `replicas` as in read_replicas, each of `processes` with `cpus` (1) or a GPU."""
    low, high = read_replicas(replicas)
    scaling: Any = low
    if high > low:
        policy = AutoscalingPolicy(policy_function=by_queue)
        scaling = AutoscalingConfig(
            min_replicas=low, max_replicas=high, target_ongoing_requests=max(1, engine.max_sequences * 3 // 4),
            look_back_period_s=LOOK_BACK, upscale_delay_s=UPSCALE_DELAY, policy=policy,
        )  # fmt: skip
    number = {"num_replicas": low} if high == low else {"autoscaling_config": scaling}
    deployment: Any = serve.deployment(
        Replica, name="engine", **number, max_ongoing_requests=UNLIMITED, health_check_period_s=HEALTH_PERIOD,
        graceful_shutdown_timeout_s=config.drain_timeout, max_constructor_retry_count=2,
        ray_actor_options={
            "num_cpus": processes * (cpus or 1), "num_gpus": processes * (device or "").startswith("cuda"),
        },
        request_router_config=RequestRouterConfig(**{
            "request_router_class": PrefixRouter, "request_routing_stats_period_s": STATS_PERIOD, **router,
        }),
    )  # fmt: skip
    return deployment.bind(open_llm)


def read_replicas(text: str) -> tuple[int, int]:
    """The least and the greatest number of replicas, of "2" or "1:4". ConfigError for any other text."""
    low, colon, high = text.partition(":")
    if low.isdecimal() and (high.isdecimal() if colon else True):
        bounds = int(low), int(high if colon else low)
        if 1 <= bounds[0] <= bounds[1]:
            return bounds
    raise ConfigError(f"replicas must be a number like 2, or bounds like 1:4, not {text!r}", field="replicas")


def by_queue(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """How many replicas the engines' own queues need: three quarters of a full batch for each."""
    told: Mapping[Any, float] = (context.aggregated_metrics or {}).get("requests", {})
    return sum(told.values()) / context.config.target_ongoing_requests, {}  # type: ignore[union-attr]


class Front:
    """The server as a deployment: the FastAPI application of `serve`, whose engines are elsewhere."""

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, engines: DeploymentHandle, config: ServerConfig, name: str, adapters: dict[str, str]
    ) -> None:
        description = await engines.describe.remote()
        self.fastapi = app_of(RemoteLLM(engines, description, _tokenizer, adapters), config, name)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self.fastapi


def app_of(llm: RemoteLLM, config: ServerConfig, name: str) -> FastAPI:
    """The application over engines elsewhere; /metrics shows those of all replicas."""
    if config.adapter_folder is not None:
        raise ConfigError(
            "adapters cannot be loaded while replicas run", field="adapter_folder", hint="use --adapter"
        )
    app = build_app(llm, config, name)
    app.state.serving.replicas = told_metrics
    return app


def start(
    open_llm: Callable[[], AsyncLLM], engine: EngineConfig, config: ServerConfig, replicas: str, cpus: int,
    processes: int, device: str, adapters: dict[str, str],
    open_tokenizer: Callable[[Mistral7B], Tokenizer | None] | None = None, **router: Any,
) -> tuple[RemoteLLM, Callable[[], None]]:  # fmt: skip
    """Start the engines, for a server in this process; returns a function that ends them, too.

    In the Ray cluster that RAY_ADDRESS names; otherwise in one that is started, on loopback, and ended with it.
    EngineError if the replicas do not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    quiet: Any = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    own, application = "RAY_ADDRESS" not in os.environ, ""

    def end() -> None:
        if own:
            _end_cluster()
            return
        if application:
            _leave(application)
        ray.shutdown()

    try:
        if own:
            cpu = read_replicas(replicas)[1] * processes * cpus + 1
            ray.init("local", num_cpus=cpu, include_dashboard=False, _node_ip_address=LOOPBACK, **quiet)
        else:
            ray.init(**quiet)
        if threading.current_thread() is threading.main_thread():  # Ray's own ends us at once
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        application = f"mistral-7b-{ray.get_runtime_context().get_job_id()}"
        serve.start(proxy_location="Disabled")
        bound = engines_of(open_llm, engine, config, replicas, cpus, processes, device, **router)
        handle = serve.run(bound, name=application, route_prefix=None)
        description = handle.describe.remote().result()
        return RemoteLLM(handle, description, open_tokenizer or _tokenizer, adapters), end
    except Mistral7BError:
        end()
        raise
    except Exception as e:  # Ray raises a bare one if a node does not start in time
        why = (application and _why(application)) or first_line(e)
        end()
        raise EngineError(f"the replicas did not start: {why}", hint="Ray's logs have more") from e
    except BaseException:
        end()
        raise


def _why(application: str) -> str:
    """What a replica raised that failed: the last line of its traceback; "" if nothing is known."""
    try:
        told = serve.status().applications[application].deployments["engine"].message
    except (KeyError, RuntimeError):
        return ""
    return OURS.sub("", told.strip().splitlines()[-1]) if "Error: " in told else ""


def _leave(application: str) -> None:
    """Remove an application; and Serve, if that was its last and it has no proxies: later ones would get none."""
    serve.delete(application)
    left = serve.status()
    if not left.applications and not left.proxies:
        serve.shutdown()


def _end_cluster() -> None:
    """End the cluster that this process started, with all its processes: some of them outlive Ray's shutdown."""
    import psutil  # type: ignore[import-untyped]  # Ray has it

    started = psutil.Process().children(recursive=True)
    ray.shutdown()
    for process in psutil.wait_procs(started, timeout=2.0)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
