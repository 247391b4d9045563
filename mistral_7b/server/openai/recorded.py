"""Recording and steering over HTTP: who may, how much, and the answer's field `recorded`.

{"format": "safetensors", "data": "<base64>"}     tensors by name: "residual.3", "embedding"
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from fastapi import Request as HttpRequest
from safetensors.torch import save

from ...engine.request import Request
from ...engine.watching import Steering
from ..http.errors import HttpError
from ..state import State, is_admin
from .answers import Recorded
from .watching import Watching

MOST_BYTES = 64 << 20  # of all tensors of a response: base64 and JSON need some times as much


def watching_options(body: Watching) -> dict[str, Any]:
    """The fields of RequestOptions."""
    steer = [
        Steering(s.layer, s.vector, s.scale, None if s.stop is None and not s.start else slice(s.start, s.stop))
        for s in body.steer or ()
    ]
    return {"record": body.record, "steer": steer}


def check_watching(body: Watching, http_request: HttpRequest, stream: bool, prompts: int = 1) -> None:
    """HttpError without an admin key (403), and for a recording that is streamed or has several prompts (400)."""
    if body.watches is not None and not is_admin(http_request):
        raise HttpError(
            403, "recording and steering require an admin key", field=body.watches, code="admin_key_needed"
        )
    if body.record is not None and (stream or prompts > 1):
        what = "is not streamed" if stream else f"has one prompt, not {prompts}"
        raise HttpError(400, f"a request that records {what}", field="record")


def check_recording(state: State, request: Request) -> None:
    """HttpError (422) for a recording that may become too large."""
    if request.watching is None or request.watching.recording is None:
        return
    model = state.llm.engine.model
    tokens = len(request.ids) + request.completions[0].max_tokens
    size = request.watching.recording.nbytes(tokens, model.args, model.norm.weight.dtype)
    if size > MOST_BYTES:
        what = f"up to {size} bytes would be recorded of {tokens} tokens; the limit is {MOST_BYTES}"
        hint = "record fewer layers, or set max_tokens"
        raise HttpError(422, what, field="record", code="too_large", hint=hint)


async def with_recorded(state: State, answer: dict[str, Any], requests: Sequence[Request]) -> dict[str, Any]:
    """The answer, with what its request recorded."""
    tape = requests[0].recorded()
    if tape is None:
        return answer

    def encoded() -> str:
        names = {point if n is None else f"{point}.{n}": tape[point, n].contiguous() for point, n in tape}
        return base64.b64encode(save(names)).decode()

    recorded: Recorded = {"format": "safetensors", "data": await state.workers.run(encoded)}
    return {**answer, "recorded": recorded}
