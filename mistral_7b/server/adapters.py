"""/v1/adapters: which LoRA adapters are loaded; load and unload one, with an admin key.

An adapter is loaded from a folder right inside the configured one, named by that folder's name, never by a path:
what leads elsewhere, by a link even, is not opened, and neither is a pickle.
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

from ..checkpoint.adapter import Adapter, read_adapter
from ..errors import AdapterError, CheckpointError
from .answers import documented
from .problems import Refusal
from .protocol import Body
from .routes import JsonRoute, json_answer
from .state import State, is_admin

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, StringConstraints(pattern=NAME)]
WEIGHTS = ("adapter_model.safetensors", "lora.safetensors")
BESIDE = ("adapter_config.json", "params.json")


class LoadRequest(Body):
    """Load the adapter in `folder`, by default the one of its `name`."""

    name: Name
    folder: Name | None = None


class LoadedAdapter(BaseModel):
    """An adapter that requests can name as their `model`. `bytes`: the memory that it takes."""

    id: str
    object: Literal["adapter"] = "adapter"
    bytes: int


class AdapterList(BaseModel):
    """`available`: folders from which others can be loaded, for who has an admin key."""

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
    engine, one_at_a_time = state.llm.engine, asyncio.Lock()

    def loaded(name: str) -> LoadedAdapter:
        return LoadedAdapter(id=name, bytes=engine.adapters.nbytes(name))

    @routes.get("/v1/adapters", responses=documented(answer=AdapterList))
    async def adapters(http_request: HttpRequest) -> Response:
        """The adapters that are loaded, in the order of loading."""
        data = await state.llm.call(lambda: [loaded(name) for name in engine.adapters.names])
        available = await asyncio.to_thread(_folders, state) if is_admin(http_request) else None
        return json_answer(AdapterList(data=data, available=available))

    @routes.post("/v1/adapters", responses=documented(400, 403, 404, 409, 422, answer=LoadedAdapter))
    async def load(http_request: HttpRequest, asked: LoadRequest) -> Response:
        """Load an adapter. Answers that are being written are not disturbed."""
        _need_admin(http_request)
        name = asked.name

        def take(adapter: Adapter) -> LoadedAdapter:
            if name in state.models:
                raise Refusal(
                    409, f"{name!r} is loaded already", field="name", hint="unload it first, or take another name"
                )
            engine.adapters.load(name, adapter)
            return loaded(name)

        async with one_at_a_time:  # or many of them would be read into memory at once
            adapter = await asyncio.to_thread(_read, state, asked.folder or name)
            try:
                return json_answer(await state.llm.call(lambda: take(adapter)))
            except AdapterError as e:
                raise Refusal.of(e, status=422, field="name") from e

    @routes.delete("/v1/adapters/{name}", responses=documented(403, 404, 409, answer=UnloadedAdapter))
    async def unload(http_request: HttpRequest, name: str) -> Response:
        """Forget an adapter that no request uses."""
        _need_admin(http_request)

        def drop() -> None:
            if name not in engine.adapters.names:
                raise Refusal(404, f"no adapter {name!r:.100} is loaded", field="name", code="model_not_found")
            engine.unload_adapter(name)

        try:
            await state.llm.call(drop)
        except AdapterError as e:
            raise Refusal.of(e, status=409, field="name") from e
        return json_answer(UnloadedAdapter(id=name))

    return routes


def _need_admin(http_request: HttpRequest) -> None:
    if not is_admin(http_request):
        raise Refusal(403, "loading and unloading adapters takes an admin key", code="admin_key_needed")


def _root(state: State) -> pathlib.Path:
    if state.config.adapter_folder is None:
        raise Refusal(
            403, "this server has no folder of adapters", code="no_folder", hint="start it with --adapter-folder"
        )
    return pathlib.Path(state.config.adapter_folder).expanduser().resolve()


def _folders(state: State) -> list[str]:
    """Names of the folders that hold an adapter."""
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
    """The file of weights in a folder, if all that would be opened lies within `root`."""
    for name in WEIGHTS:
        file = root / folder / name
        if file.is_file():
            opened = [file, *(file.with_name(beside) for beside in BESIDE)]
            return file if all(path.resolve().is_relative_to(root) for path in opened) else None
    return None


def _read(state: State, folder: str) -> Adapter:
    """The adapter in a folder. Refusal for one that is not there, or cannot be read."""
    root, args = _root(state), state.llm.engine.model.args
    file = _weights(root, folder)
    if file is None:
        wanted = " or ".join(WEIGHTS)
        raise Refusal(404, f"there is no adapter {folder!r}: no folder of this name with {wanted}", field="folder")
    try:
        return read_adapter(file, args)
    except CheckpointError as e:  # clients may know the names of files, and not where the folder is
        place = e.place and os.path.relpath(e.place, root)
        raise Refusal.of(e, status=422, field="folder", place=place) from e
