"""An engine over several processes: each takes the same steps, on its part of the model.

    LLM under torchrun    each process has all requests, and plans and samples for itself
    a server's engine     rank 0 has the requests, the others follow its steps: followers.py

Under torchrun what a process decides by time is refused, because ranks that decide differently wait for each other
until the time limit: speculation, grammars. What concerns a whole model or whole pages is refused in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..distributed import ranks
from ..errors import ConfigError, EngineError, Mistral7BError
from ..model import Mistral7B
from .config import EngineConfig

FIELD = "tensor_parallel"
HINTS = {
    "adapters": "merge it into the model (`mistral-7b merge`)",
    "deterministic": "int8 and int4 on a CPU are deterministic without the option",
}


def divide(model: Mistral7B, processes: int, config: EngineConfig, adapters: Mapping[str, Any] | None) -> None:
    """Divide a model among `processes`, those of this run, in place; with 1 it is not divided.

    ConfigError for another number, EngineError for what cannot be used with it.
    """
    if not (type(processes) is int and processes >= 1):
        raise ConfigError(f"{FIELD} must be a whole number, at least 1, not {processes!r}", field=FIELD)
    if processes > 1:
        if processes != ranks.size():
            raise ConfigError(
                f"{FIELD}={processes} needs as many processes, and this run has {ranks.size()}",
                field=FIELD,
                hint=f"start it with torchrun --nproc-per-node {processes}",
            )
        from ..distributed.tensor_parallel import parallelize

        parallelize(model)
    used = {
        "adapters": adapters,
        "deterministic": config.deterministic,
        "prefix_cache": config.prefix_cache,
    }
    for field, value in used.items():
        if value:
            check_alone(field)


def check_same(field: str) -> None:
    """Raise EngineError for what ranks decide differently, if each of several decides for itself."""
    if not ranks.leads():
        check_alone(field)


def check_alone(field: str, error: type[Mistral7BError] = EngineError) -> None:
    """Raise an error for what one process alone can do, if this is one of several."""
    if ranks.size() > 1:
        raise error(
            f"{field} cannot be used with a model that is divided among processes",
            field=field,
            hint=HINTS.get(field),
        )
