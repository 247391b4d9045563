"""/v1/adapters: list LoRA adapters; load and unload them with an admin key.

An adapter is loaded from a direct subfolder of the configured folder, given by name, never by path. Symbolic links
that lead outside are not followed, and pickles are not loaded.
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import re
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, StringConstraints
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ...errors import AdapterError, CheckpointError
from ...lora.files import Adapter, read_adapter
from ..http.errors import HttpError
from ..http.json_bodies import JsonRoute, json_answer
from ..openai.answers import documented
from ..openai.protocol import Body
from ..state import State, is_admin

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
WEIGHTS = ("adapter_model.safetensors", "lora.safetensors")
BESIDE = ("adapter_config.json", "params.json")


class LoadRequest(Body):
    """POST /v1/adapters. `folder`: name of the subfolder to load; default: `name`."""

    name: Name
    folder: Name | None = None


class LoadedAdapter(BaseModel):
    """An adapter that requests can use as their `model`. `bytes`: its size in memory."""

    id: str
    object: Literal["adapter"] = "adapter"
    bytes: int


class AdapterList(BaseModel):
    """Response of GET /v1/adapters. `available`: folders to load from; null without an admin key."""

    object: Literal["list"] = "list"
    data: list[LoadedAdapter]
    available: list[str] | None = None


class UnloadedAdapter(BaseModel):
    id: str
    object: Literal["adapter"] = "adapter"
    deleted: Literal[True] = True


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["adapters"], route_class=JsonRoute)
    engine, load_lock = state.llm.engine, asyncio.Lock()

    def loaded(name: str) -> LoadedAdapter:
        return LoadedAdapter(id=name, bytes=engine.adapters.nbytes(name))

    @routes.get("/v1/adapters", responses=documented(answer=AdapterList))
    async def adapters(http_request: HttpRequest) -> Response:
        """The loaded adapters, in the order of loading."""
        data = await state.llm.call(lambda: [loaded(name) for name in engine.adapters.names])
        available = await asyncio.to_thread(_folders, state) if is_admin(http_request) else None
        return json_answer(AdapterList(data=data, available=available))

    @routes.post("/v1/adapters", responses=documented(400, 403, 404, 409, 422, answer=LoadedAdapter))
    async def load(http_request: HttpRequest, body: LoadRequest) -> Response:
        """Load an adapter. Running requests are not affected."""
        _require_admin(http_request)
        name = body.name

        def install(adapter: Adapter) -> LoadedAdapter:
            if name in state.models:
                raise HttpError(
                    409, f"{name!r} is already loaded", field="name", hint="unload it first, or use another name"
                )
            engine.adapters.load(name, adapter)
            return loaded(name)

        async with load_lock:  # bounds memory: at most one adapter is being read
            adapter = await asyncio.to_thread(_read, state, body.folder or name)
            try:
                return json_answer(await state.llm.call(lambda: install(adapter)))
            except AdapterError as e:
                raise HttpError.of(e, status=422, field="name") from e

    @routes.delete("/v1/adapters/{name}", responses=documented(403, 404, 409, answer=UnloadedAdapter))
    async def unload(http_request: HttpRequest, name: str) -> Response:
        """Unload an adapter. 409 while requests use it."""
        _require_admin(http_request)

        def remove() -> None:
            if name not in engine.adapters.names:
                raise HttpError(404, f"no adapter {name!r:.100} is loaded", field="name", code="model_not_found")
            engine.unload_adapter(name)

        try:
            await state.llm.call(remove)
        except AdapterError as e:
            raise HttpError.of(e, status=409, field="name") from e
        return json_answer(UnloadedAdapter(id=name))

    return routes


def _require_admin(http_request: HttpRequest) -> None:
    if not is_admin(http_request):
        raise HttpError(403, "loading and unloading adapters requires an admin key", code="admin_key_needed")


def _root(state: State) -> pathlib.Path:
    if state.config.adapter_folder is None:
        raise HttpError(
            403, "this server has no adapter folder", code="no_folder", hint="start it with --adapter-folder"
        )
    return pathlib.Path(state.config.adapter_folder).expanduser().resolve()


def _folders(state: State) -> list[str]:
    """Sorted names of the subfolders that contain an adapter."""
    if state.config.adapter_folder is None:
        return []
    root = _root(state)
    try:
        found = [
            path.name for path in root.iterdir() if re.fullmatch(NAME, path.name) and _weights(root, path.name)
        ]
    except OSError:
        return []
    return sorted(found)


def _weights(root: pathlib.Path, folder: str) -> pathlib.Path | None:
    """The weights file in a folder; None if it is missing, or if a file to open lies outside `root`."""
    for name in WEIGHTS:
        file = root / folder / name
        if file.is_file():
            opened = [file, *(file.with_name(beside) for beside in BESIDE)]
            return file if all(path.resolve().is_relative_to(root) for path in opened) else None
    return None


def _read(state: State, folder: str) -> Adapter:
    """Read the adapter in a folder. HttpError if it is missing (404) or invalid (422)."""
    root, args = _root(state), state.llm.engine.model.args
    file = _weights(root, folder)
    if file is None:
        wanted = " or ".join(WEIGHTS)
        raise HttpError(
            404, f"there is no adapter {folder!r}: no folder of this name has {wanted}", field="folder"
        )
    try:
        return read_adapter(file, args)
    except CheckpointError as e:  # do not disclose the absolute path of the folder
        place = e.place and os.path.relpath(e.place, root)
        raise HttpError.of(e, status=422, field="folder", place=place) from e
