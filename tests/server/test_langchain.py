"""LangChain's clients for OpenAI, Mistral and Anthropic against a real server; skipped if not installed."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from serving import Serving

pytest.importorskip("langchain_openai")
pytest.importorskip("langchain_mistralai")
pytest.importorskip("langchain_anthropic")

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_mistralai import ChatMistralAI
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict

ASK = [("system", "Be brief."), ("human", "How will the weather be?")]


class Weather(BaseModel):
    """How the weather will be."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    sunny: bool


@pytest.fixture(params=["openai", "mistral", "anthropic"])
def chat(request: pytest.FixtureRequest, server: Serving) -> Any:
    """A chat model with a token limit for tool calls; bind(max_tokens=...) lowers it."""
    common: dict[str, Any] = {"model": "tiny", "api_key": "none", "max_tokens": 400, "timeout": 20}
    if request.param == "openai":
        return ChatOpenAI(base_url=f"{server.url}/v1", max_retries=0, seed=3, stream_usage=True, **common)
    if request.param == "mistral":
        return ChatMistralAI(endpoint=f"{server.url}/v1", max_retries=1, random_seed=3, **common)
    return ChatAnthropic(base_url=server.url, max_retries=0, **common)


def test_answers_and_what_they_took(chat: Any) -> None:
    short = chat.bind(max_tokens=6)
    out = short.invoke(ASK)
    assert out.content
    assert out.usage_metadata["output_tokens"] == 6
    assert out.usage_metadata["total_tokens"] == out.usage_metadata["input_tokens"] + 6
    several = short.batch(["one", "two two", "three"])
    assert [m.usage_metadata["output_tokens"] for m in several] == [6, 6, 6]
    assert asyncio.run(short.ainvoke(ASK)).usage_metadata["output_tokens"] == 6


def test_a_stream(chat: Any) -> None:
    whole = None
    for chunk in chat.bind(max_tokens=6).stream(ASK):
        whole = chunk if whole is None else whole + chunk
    assert whole.content
    assert whole.usage_metadata["output_tokens"] == 6


def test_tools_are_called_and_their_results_read(chat: Any) -> None:
    called = chat.bind_tools([Weather], tool_choice="Weather").invoke(ASK)
    (call,) = called.tool_calls
    assert call["name"] == "Weather"
    assert Weather(**call["args"])
    many = chat.bind_tools([Weather], tool_choice="any").invoke(ASK)
    assert {c["name"] for c in many.tool_calls} == {"Weather"}
    talk = [HumanMessage("hi"), many, *[ToolMessage("sunny", tool_call_id=c["id"]) for c in many.tool_calls]]
    answered = chat.bind_tools([Weather]).bind(max_tokens=5).invoke(talk)
    assert answered.usage_metadata["output_tokens"] == 5


def test_tools_in_a_stream(chat: Any) -> None:
    whole = None
    for chunk in chat.bind_tools([Weather], tool_choice="Weather").stream(ASK):
        whole = chunk if whole is None else whole + chunk
    (call,) = whole.tool_calls
    assert Weather(**call["args"])


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Any, method: str) -> None:
    assert isinstance(chat.with_structured_output(Weather, method=method).invoke(ASK), Weather)


def test_texts_and_embeddings(server: Serving) -> None:
    common: dict[str, Any] = {"model": "tiny", "base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    text = OpenAI(max_tokens=4, seed=1, **common)
    assert text.invoke("one") == "".join(text.stream("one"))
    found = OpenAIEmbeddings(check_embedding_ctx_length=False, **common).embed_documents(["one", "two two"])
    assert [len(f) for f in found] == [40, 40]
