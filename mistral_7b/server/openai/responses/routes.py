"""/v1/responses: OpenAI's Responses API."""

from __future__ import annotations

import threading
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from fastapi import APIRouter, Query, Response
from fastapi import Request as HttpRequest
from pydantic_core import from_json

from ....engine.completion import TextPiece
from ....engine.request import Request
from ....errors import AbandonedError, Mistral7BError
from ...http.errors import HttpError
from ...http.json_bodies import JsonRoute, json_answer
from ...http.sse import Frames, event_stream, frame
from ...state import State, account_of, answer, disconnect_event, prepare
from ..answers import documented
from ..chat import Choices, read_chat
from ..protocol import MOST_MESSAGES, ChatRequest
from .conversation import Conversation, Tools, chat_request, in_prompt, plain_item, renamed
from .events import Answer, Deleted, Event, ItemList, ResponseAnswer, begun
from .store import Encoded, Store, Stored
from .wire import Item, ResponsesRequest


def router(state: State) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["OpenAI"], route_class=JsonRoute)
    store = Store(state.config.max_stored, state.config.max_stored_bytes)

    @routes.post(
        "/v1/responses",
        responses=documented(400, 404, 422, 429, 500, 503, 504, answer=ResponseAnswer, stream=True),
    )
    async def create(body: ResponsesRequest, http_request: HttpRequest) -> Response:
        """Complete a conversation, as OpenAI's Responses API does."""
        job = _Job(state, store, body, account_of(http_request).name)
        request = await prepare(state, partial(job.read, disconnect_event(http_request)), "input")
        choices, pieces = Choices(state, job.chat, request), answer(state, http_request, request)
        if body.stream:
            return await event_stream(job.stream(choices, pieces), lambda why: _frames(list(job.answer.fail(why))))
        async with aclosing(pieces):
            async for piece in pieces:
                job.take(choices, piece)
        job.end(choices)
        return json_answer(job.answer.response)

    @routes.get("/v1/responses/{response_id}", responses=documented(400, 404, answer=ResponseAnswer))
    async def retrieve(response_id: str, http_request: HttpRequest, stream: bool = False) -> Response:
        """A stored response."""
        if stream:
            raise HttpError(400, "stream: a stored response is complete and cannot be streamed", field="stream")
        return json_answer(_stored(store, http_request, response_id).body)

    @routes.delete("/v1/responses/{response_id}", responses=documented(404, answer=Deleted))
    async def delete(response_id: str, http_request: HttpRequest) -> Response:
        """Delete a stored response."""
        _stored(store, http_request, response_id)
        store.remove(account_of(http_request).name, response_id)
        return json_answer({"id": response_id, "object": "response", "deleted": True})

    @routes.get("/v1/responses/{response_id}/input_items", responses=documented(400, 404, answer=ItemList))
    async def input_items(
        response_id: str, http_request: HttpRequest, after: str | None = None,
        limit: int = Query(20, ge=1, le=100), order: Literal["asc", "desc"] = "desc",
    ) -> Response:  # fmt: skip
        """The context of a stored response: the items of earlier responses, then its own input."""
        items = _stored(store, http_request, response_id).context
        items = items if order == "asc" else items[::-1]
        names = [name for name, _ in items]
        if after is not None:
            if after not in names:
                raise HttpError(400, f"after: there is no item {after!r:.100}", field="after")
            items = items[names.index(after) + 1 :]
        page = items[:limit]
        first, last = (page[0][0], page[-1][0]) if page else ("", "")
        return json_answer({
            "object": "list", "data": [from_json(data) for _, data in page], "first_id": first, "last_id": last,
            "has_more": len(items) > limit,
        })  # fmt: skip

    return routes


def _stored(store: Store, http_request: HttpRequest, name: str) -> Stored:
    """HttpError (404) if the owner has no such response."""
    found = store.get(account_of(http_request).name, name)
    if found is None:
        raise HttpError(404, f"Response with id '{name:.100}' not found.", field="response_id", code="not_found")
    return found


def _frames(events: list[Event]) -> bytes:
    """Encode events, to share one write."""
    return b"".join(frame(event, event["type"]) for event in events)


class _Job:
    """One request for a response: its conversion to a chat request, and the storing of the result.

    Raises HttpError for an invalid request, a response or item that is not stored, and an unknown model.
    """

    def __init__(self, state: State, store: Store, body: ResponsesRequest, owner: str) -> None:
        self.state, self.store, self.body, self.owner = state, store, body, owner
        self.adapter = state.adapter(body.model)
        self.tools, self.talk = Tools(body.tools), Conversation()
        if body.instructions:
            message = {"type": "message", "role": "system", "content": [{"text": body.instructions}]}
            self.talk.add("instructions", message, self.tools)
        self.before = self._history(body.previous_response_id)
        for _, data in self.before:
            self.talk.add("previous_response_id", from_json(data), self.tools)
        self.items: list[dict[str, Any]] = []
        for i, item in enumerate(body.input):
            if item.type != "reasoning" and in_prompt(plain := self._item(i, item)):
                self.items.append(plain)
                self.talk.add(f"input[{i}]", plain, self.tools)
        if not self.talk.messages:
            raise HttpError(400, "input is missing", field="input", code="missing_field")
        self.chat: ChatRequest = chat_request(body, self.talk, self.tools)
        response = begun(body, body.model or state.model_name, state.llm.inputs.model_defaults)
        self.answer = Answer(response, self.tools.origins)

    def _history(self, name: str | None) -> tuple[Encoded, ...]:
        """The items of the response `name` and of its context. HttpError if there are too many with the input."""
        if name is None:
            return ()
        found = self.store.get(self.owner, name)
        if found is None:
            raise HttpError(400, f"Previous response with id '{name:.100}' not found.",
                            field="previous_response_id", code="previous_response_not_found")  # fmt: skip
        before, new = found.items, len(self.body.input)
        if len(before) + new > MOST_MESSAGES:
            raise HttpError(400, f"the conversation would have {len(before) + new} items: {len(before)} of the "
                            f"previous response and {new} of input; at most {MOST_MESSAGES} are allowed",
                            field="previous_response_id" if len(before) >= MOST_MESSAGES else "input",
                            hint="start a new conversation")  # fmt: skip
        return before

    def _item(self, place: int, item: Item) -> dict[str, Any]:
        if item.type != "item_reference":
            return plain_item(item)
        found: dict[str, Any] | None = self.store.item(self.owner, item.id or "")
        if found is None:
            raise HttpError(404, f"Item with id '{item.id:.100}' not found.", field=f"input[{place}]",
                            code="item_not_found")  # fmt: skip
        return found

    def read(self, gone: threading.Event | None) -> Request:
        """Build the engine request. Slow: run it on a thread."""
        try:
            return read_chat(self.state, self.chat, self.adapter, gone, self.talk.labels)
        except AbandonedError:
            raise
        except Mistral7BError as e:
            raise renamed(e, self.tools) from e

    def take(self, choices: Choices, piece: TextPiece) -> list[Event]:
        """Add a piece of the completion; return its events."""
        return [event for chunk in choices.add(piece) for event in self.answer.take(chunk)]

    def end(self, choices: Choices) -> list[Event]:
        """End the response and store it; return the final events."""
        events = list(self.answer.end(choices.usage))
        if self.answer.response["store"]:
            self.store.add(self.owner, self.answer.response, self.before, self.items)
        return events

    async def stream(self, choices: Choices, pieces: AsyncGenerator[TextPiece, None]) -> Frames:
        """The events. The first ones are sent with the first token, so that an earlier error sets the status."""
        events = self.answer.begin()
        async with aclosing(pieces):
            async for piece in pieces:
                events += self.take(choices, piece)
                if events:
                    yield _frames(events)
                events = []
        yield _frames(events + self.end(choices))
