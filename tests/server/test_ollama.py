"""Ollama's API: raw requests, and Ollama's and LangChain's clients if they are installed."""

from __future__ import annotations

import asyncio
import json
from random import Random
from typing import Any

import pytest
from serving import HELLO, TOOL, Serving, serving

from mistral_7b.server.ollama.bodies import ChatBody
from mistral_7b.text.tokenizer import Tokenizer

ASK: dict[str, Any] = {"model": "tiny", "options": {"temperature": 0, "num_predict": 5}}
SCHEMA = {
    "type": "object",
    "required": ["a"],
    "additionalProperties": False,
    "properties": {"a": {"enum": [1, 2]}},
}


def lines(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_a_stream_of_lines_is_the_default(server: Serving) -> None:
    status, headers, data = server.ask("POST", "/api/chat", {**ASK, "messages": HELLO})
    parts = lines(data)
    assert (status, headers["content-type"]) == (200, "application/x-ndjson")
    assert all(part["model"] == "tiny" and part["message"]["role"] == "assistant" for part in parts)
    assert [part["done"] for part in parts] == [False] * (len(parts) - 1) + [True]
    last = parts[-1]
    assert (last["done_reason"], last["eval_count"]) == ("length", 5)
    assert last["prompt_eval_count"] == len(Tokenizer.v3().encode_chat(HELLO))
    times = [last["prompt_eval_duration"], last["eval_duration"]]
    assert all(type(t) is int for t in times)
    assert 1000 < sum(times) <= last["total_duration"]
    status, whole = server.post("/api/chat", {**ASK, "messages": HELLO, "stream": False})
    assert whole["message"]["content"] == "".join(part["message"]["content"] for part in parts)
    openai = {"messages": HELLO, "max_tokens": 5, "temperature": 0}
    assert (
        whole["message"]["content"]
        == server.post("/v1/chat/completions", openai)[1]["choices"][0]["message"]["content"]
    )


def test_a_text(server: Serving) -> None:
    parts = lines(server.ask("POST", "/api/generate", {**ASK, "prompt": "How will the weather be?"})[2])
    text = "".join(part["response"] for part in parts)
    ids = parts[-1]["context"]
    assert ids[:-5] == Tokenizer.v3().encode_chat(HELLO)
    raw = server.post("/api/generate", {**ASK, "prompt": "one", "raw": True, "stream": False})[1]
    openai = server.post("/v1/completions", {"prompt": "one", "max_tokens": 5, "temperature": 0})[1]
    assert raw["response"] == openai["choices"][0]["text"] != text
    more = server.post("/api/generate", {**ASK, "prompt": "Well?", "context": ids, "stream": False})[1]
    assert more["context"][: len(ids)] == ids
    assert (
        more["prompt_eval_count"]
        == len(ids) + len(Tokenizer.v3().encode_chat([{**HELLO[0], "content": "Well?"}])) - 1
    )
    told = server.post("/api/generate", {**ASK, "prompt": "a", "system": "s", "stream": False})[1]
    system = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert told["context"][:-5] == Tokenizer.v3().encode_chat(system)


def test_options(server: Serving) -> None:
    def say(**options: Any) -> dict[str, Any]:
        body = {"model": "tiny", "messages": HELLO, "stream": False, "options": options}
        return server.post("/api/chat", body)[1]

    greedy = say(temperature=0, num_predict=4)["message"]["content"]
    assert say(top_k=1, num_predict=4)["message"]["content"] == greedy
    assert say(top_p=0, num_predict=4)["message"]["content"] == greedy
    one, same, other = (say(seed=s, num_predict=8)["message"]["content"] for s in (1, 1, 2))
    assert one == same != other
    stop = greedy[2:4]
    stopped = say(temperature=0, num_predict=4, stop=[stop])
    assert (stopped["message"]["content"], stopped["done_reason"]) == (greedy[: greedy.index(stop)], "stop")
    assert say(num_predict=2, num_ctx=4096, num_gpu=1, mirostat=0, made_up=7)["eval_count"] == 2
    penalties = {"repeat_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1, "min_p": 0.01}
    assert say(num_predict=2, **penalties)["eval_count"] == 2


@pytest.mark.parametrize("limit", [{}, {"num_predict": -1}, {"num_predict": 10**6}])
def test_without_a_limit_the_context_is_filled(limit: dict[str, int]) -> None:
    with serving(sliding_window=None, max_seq_len=64) as server:
        biased = {"model": "tiny", "messages": HELLO, "stream": False, "options": {"seed": 1, **limit}}
        out = server.post("/api/chat", biased)[1]
        assert out["prompt_eval_count"] + out["eval_count"] == 64 or out["done_reason"] == "stop"
        assert out["eval_count"] > 5
        server.idle()


def test_formats(server: Serving) -> None:
    ask = {"model": "tiny", "stream": False, "options": {"seed": 3, "num_predict": 200}}
    out = server.post("/api/chat", {**ask, "messages": HELLO, "format": SCHEMA})[1]
    assert json.loads(out["message"]["content"])["a"] in (1, 2)
    out = server.post("/api/generate", {**ask, "prompt": "a", "format": SCHEMA})[1]
    assert json.loads(out["response"])["a"] in (1, 2)
    assert (
        server.post("/api/chat", {**ask, "messages": HELLO, "format": "json"})[1]["message"]["content"][0]
        in "{ \n"
    )
    assert server.post("/api/chat", {**ASK, "messages": HELLO, "format": "", "stream": False})[0] == 200


def test_tool_results_find_their_calls(server: Serving) -> None:
    """The conversation is that of OpenAI's with ids."""

    def call(name: str, id: str | None = None) -> dict[str, Any]:
        return {**({"id": id} if id else {}), "function": {"name": name, "arguments": {"city": "Rome"}}}

    ours = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [call("f"), call("g")]},
            {"role": "tool", "tool_name": "g", "content": "sunny"},
            {"role": "tool", "content": "dry"}]  # fmt: skip
    ids = ("call_1_0", "call_1_1")
    openai = [*HELLO, {"role": "assistant", "tool_calls": [
        {"id": id, "type": "function", "function": {"name": name, "arguments": '{"city": "Rome"}'}}
        for id, name in zip(ids, "fg", strict=True)]},
        {"role": "tool", "tool_call_id": ids[1], "content": "sunny"},
        {"role": "tool", "tool_call_id": ids[0], "content": "dry"}]  # fmt: skip
    out = server.post("/api/chat", {**ASK, "messages": ours, "tools": [TOOL], "stream": False})[1]
    count = server.post("/tokenize", {"messages": openai, "tools": [TOOL]})[1]["count"]
    assert out["prompt_eval_count"] == count
    plain = {"messages": openai, "tools": [TOOL], "max_tokens": 5, "temperature": 0}
    assert (
        out["message"]["content"]
        == server.post("/v1/chat/completions", plain)[1]["choices"][0]["message"]["content"]
    )


def test_results_take_the_calls_in_order() -> None:
    """The first open call of the name, or else the first one."""

    def taken(calls: str, results: list[str | None]) -> list[str | None]:
        functions = [{"function": {"name": name}} for name in calls]
        messages = [{"role": "assistant", "tool_calls": functions}]
        messages += [{"role": "tool", "tool_name": name} for name in results]
        body = ChatBody.model_validate({"model": "m", "messages": messages})
        return [told["tool_call_id"] for told in body.conversation()[1:]]

    results = ["g", None, "f", "f", "h", "g"]
    assert taken("fgfgf", results) == ["call_0_1", "call_0_0", "call_0_2", "call_0_4", "call_0_3", None]
    random = Random(1)
    for _ in range(100):
        calls = "".join(random.choices("fgh", k=random.randrange(8)))
        asked: list[str | None] = random.choices([*"fghi", None], k=9)
        left, expected = list(enumerate(calls)), []
        for name in asked:
            found = next((call for call in left if call[1] == name), left[0] if left else None)
            expected.append(None if found is None else f"call_0_{found[0]}")
            left = [call for call in left if call != found]
        assert taken(calls, asked) == expected


def test_many_results_take_linear_time() -> None:
    """Each comparison of a name is counted: a search of the open calls would do millions."""
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    functions = [{"function": {"name": "f"}} for _ in range(2000)]
    messages = [{"role": "assistant", "tool_calls": functions}]
    messages += [{"role": "tool"} for _ in range(2000)]
    body = ChatBody.model_validate({"model": "m", "messages": messages})
    for message in body.messages[1:]:
        message.tool_name = Name("g")
    assert len({told["tool_call_id"] for told in body.conversation()[1:]}) == 2000
    assert compared < 10_000


def test_tools_are_called() -> None:
    from caller import WEATHER, trained, user

    with serving(trained=trained()) as server:
        ask = {"model": "tiny", "messages": [user("Weather in Rome and Oslo?")], "tools": [WEATHER],
               "options": {"temperature": 0, "num_predict": 100}}  # fmt: skip
        parts = lines(server.ask("POST", "/api/chat", ask)[2])
        (calls,) = [part["message"]["tool_calls"] for part in parts if "tool_calls" in part["message"]]
        assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == [
            ("weather", {"city": "Rome"}), ("weather", {"city": "Oslo"}),
        ]  # fmt: skip
        whole = server.post("/api/chat", {**ask, "stream": False})[1]
        assert [c["function"] for c in whole["message"]["tool_calls"]] == [c["function"] for c in calls]
        assert "tools" in server.post("/api/show", {"model": "tiny"})[1]["capabilities"]
        server.idle()


def test_a_begun_answer_is_continued(server: Serving) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "It will be"}]
    out = server.post("/api/chat", {**ASK, "messages": begun, "stream": False})[1]
    same = server.post("/v1/chat/completions", {"messages": begun, "continue_final_message": True, "max_tokens": 5,
                                                "temperature": 0})[1]  # fmt: skip
    assert out["message"]["content"] == same["choices"][0]["message"]["content"]


def test_embeddings(server: Serving) -> None:
    status, out = server.post("/api/embed", {"model": "tiny", "input": ["one", "two two"]})
    plain = server.post("/v1/embeddings", {"input": ["one", "two two"]})[1]
    assert status == 200
    for ours, theirs in zip(out["embeddings"], plain["data"], strict=True):
        assert ours == pytest.approx(theirs["embedding"], abs=1e-5)
    (one,) = server.post("/api/embed", {"model": "tiny", "input": "one"})[1]["embeddings"]
    assert one == pytest.approx(out["embeddings"][0], abs=1e-5)
    old = server.post("/api/embeddings", {"model": "tiny", "prompt": "one"})[1]
    assert old["embedding"] == pytest.approx(one, abs=1e-5)
    long = {"model": "tiny", "input": "x " * 2000}
    assert server.post("/api/embed", long)[1]["prompt_eval_count"] == server.llm.engine.model.args.max_seq_len
    status, out = server.post("/api/embed", {**long, "truncate": False})
    assert status == 400
    assert "maximum context length" in out["error"]


def test_the_models(server: Serving) -> None:
    listed = json.loads(server.ask("GET", "/api/tags")[2])["models"]
    assert [m["name"] for m in listed] == ["tiny", "sql"]
    running = json.loads(server.ask("GET", "/api/ps")[2])["models"]
    assert running[0]["context_length"] == server.llm.engine.model.args.max_seq_len
    for name in ({"model": "tiny:latest"}, {"name": "sql"}):
        status, out = server.post("/api/show", name)
        assert (status, out["model_info"]["general.architecture"]) == (200, "llama")
    parameters = sum(p.numel() for p in server.llm.engine.model.parameters())
    assert out["model_info"]["general.parameter_count"] == parameters
    assert json.loads(server.ask("GET", "/api/version")[2])["version"].count(".") == 2
    assert server.post("/api/chat", {"model": "tiny"})[1]["done_reason"] == "load"
    assert server.post("/api/generate", {"model": "sql:latest", "keep_alive": 0})[1]["done_reason"] == "load"


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("chat", {"model": "no", "messages": HELLO}, 404, "no model 'no'"),
        ("chat", {"messages": HELLO}, 400, "model is missing"),
        ("chat", {**ASK, "messages": [{**HELLO[0], "images": ["aGk="]}]}, 400, "messages.0.images: not supported"),
        ("chat", {**ASK, "messages": HELLO, "format": "xml"}, 400, "format must be"),
        ("chat", {**ASK, "messages": HELLO, "options": {"temperature": -1}}, 400, "options.temperature must be"),
        ("chat", {**ASK, "messages": [{"role": "user", "content": "x " * 2000}]}, 400, "maximum context length"),
        ("generate", {**ASK, "prompt": "a", "suffix": "b"}, 400, "suffix: not supported"),
        ("generate", {"model": "tiny", "prompt": "a", "record": ["residual"]}, 400, "record: not supported: POST"),
        ("generate", {"model": "tiny", "prompt": "a", "options": {"record": ["z"]}}, 400, "options.record: not"),
        ("chat", {**ASK, "messages": HELLO, "steer": [{"layer": 0}]}, 400, "steer: not supported: POST"),
        ("embed", {"model": "tiny", "input": "a", "record": ["residual"]}, 400, "record: not supported: POST"),
        ("show", {"model": "no"}, 404, "no model 'no'"),
        ("pull", {"model": "no"}, 404, "no route /api/pull"),
    ],
)  # fmt: skip
def test_errors_are_a_sentence(server: Serving, path: str, body: dict[str, Any], status: int, words: str) -> None:
    answered, out = server.post(f"/api/{path}", body)
    assert (answered, list(out)) == (status, ["error"])
    assert words in out["error"]


def test_any_content_type(server: Serving) -> None:
    for kind in ("application/x-www-form-urlencoded", "text/plain", ""):
        body = {**ASK, "messages": HELLO, "stream": False}
        assert server.ask("POST", "/api/chat", body, {"content-type": kind})[0] == 200


# ---------------------------------------------------------------------- clients


def test_ollamas_client(server: Serving) -> None:
    ollama = pytest.importorskip("ollama")
    client, options = ollama.Client(host=server.url), {"num_predict": 5, "seed": 1}
    whole = client.chat("tiny", HELLO, options=options, think=False, keep_alive="5m")
    assert whole.message.content
    assert whole.eval_count == 5
    parts = list(client.chat("tiny", HELLO, options=options, stream=True))
    assert "".join(part.message.content for part in parts) == whole.message.content
    assert parts[-1].done_reason == "length"
    assert client.generate("tiny", "one", options=options).response
    assert "".join(p.response for p in client.generate("tiny", "one", options=options, stream=True))
    told = client.chat("tiny", HELLO, format=SCHEMA, tools=[TOOL], options={"num_predict": 60}).message.content
    assert json.loads(told)["a"] in (1, 2)
    assert len(client.embed("tiny", ["one", "two"]).embeddings) == 2
    assert len(client.embeddings("tiny", "one").embedding) == 40
    assert [m.model for m in client.list().models] == ["tiny", "sql"]
    assert client.ps().models[0].context_length == 1024
    assert "completion" in client.show("tiny").capabilities
    with pytest.raises(ollama.ResponseError, match="there is no model 'no'") as refused:
        client.chat("no", HELLO)
    assert refused.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="no route"):
        client.pull("no")

    async def several() -> list[Any]:
        here = ollama.AsyncClient(host=server.url)
        return await asyncio.gather(*[here.chat("tiny", HELLO, options=options) for _ in range(3)])

    assert {out.message.content for out in asyncio.run(several())} == {whole.message.content}


def test_langchains_client(server: Serving) -> None:
    lc = pytest.importorskip("langchain_ollama")
    common: dict[str, Any] = {"model": "tiny", "base_url": server.url}
    chat = lc.ChatOllama(num_predict=5, seed=1, validate_model_on_init=True, **common)
    out = chat.invoke([("system", "Be brief."), ("human", "How will the weather be?")])
    assert out.content
    assert out.usage_metadata["output_tokens"] == 5
    assert "".join(part.content for part in chat.stream("one")) == chat.invoke("one").content
    assert asyncio.run(chat.ainvoke("one")).content
    typed = lc.ChatOllama(num_predict=60, seed=1, **common).with_structured_output(SCHEMA, method="json_schema")
    assert typed.invoke("one")["a"] in (1, 2)
    assert chat.bind_tools([TOOL]).invoke("one").content
    assert lc.OllamaLLM(num_predict=5, **common).invoke("one")
    assert [len(v) for v in lc.OllamaEmbeddings(**common).embed_documents(["one", "two"])] == [40, 40]
