"""A scripted server with OpenAI's API for tests of the page: fast and deterministic.

    python -m tests.server.page.scripted PORT

A word in the last user message selects the response: "slow", "long", "markdown", "evil", "emoji", "weather" (a
tool call), "json", "full" (429 the first two times), "tight" (400 if there is a token
limit), "length", "error" or "hang up" (during the response), else a
sentence. With "several", each event carries three tokens.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import sys
import zlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from mistral_7b.server.page import router

SENTENCE = "The window slides over the text, and each layer looks one window further back than the layer below it."
ANSWERS = {
    "markdown": (
        "## Sliding windows\n\nA cache of **W** positions is enough, as "
        "[the paper](https://arxiv.org/abs/2310.06825) says &amp; shows:\n\n"
        "- each token sees the *last* `W` tokens\n- layers stack, so information travels further\n\n"
        "| layers | reach |\n|---|---:|\n| 1 | 4,096 |\n| 32 | 131,072 |\n\n```python\n"
        "def visible(i: int, j: int, window: int) -> bool:\n    \"\"\"Whether position i may look at j.\"\"\"\n"
        "    return i - window < j <= i  # causal\n```\n\n"
        "3. third\n4. fourth\n\n"
        "So the cache never grows past the window, however long the text is."
    ),
    "formulas": (
        "# Attention\n\nA query \\(q_i\\) meets the keys \\(k_1, \\dots, k_j\\), scaled by $\\sqrt{d_k}$:\n\n"
        "\\[\n\\operatorname{softmax}\\left(\\frac{q_i k_j^\\top}{\\sqrt{d_k}}\\right)\n= "
        "\\frac{e^{s_{ij}}}{\\sum_{t=1}^{n} e^{s_{it}}}\n- 0\n\\]\n\n"
        "It costs $5 and not $10, or US$3 (about 2$), and `$x$` is code.\n\n"
        "$$\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix} \\begin{cases} 1 & x < 0 \\\\ "
        "\\int_0^\\infty e^{-x^2}\\,dx & x \\ge 0 \\end{cases}$$\n\n"
        "- with \\(\\alpha *\\beta\\) and \\(a* b\\) in a list\n- and \\(\\oops{x}\\), which is not LaTeX"
    ),
    "evil": (
        "<script>window.hurt = 1</script><img src=x onerror='window.hurt = 2'> [press](javascript:window.hurt=3) "
        "![dot](https://example.org/dot.png)\n\n"
        "<div style='position:fixed' onclick='window.hurt = 4'>over</div>\n\n"
        "```html\n<b onload=\"window.hurt = 5\">\n```"
    ),
    "emoji": "Good 🙂 day",
    "json": '{"name": "Ada", "born": 1815}',
    "length": "It goes on and",
    "long": "\n\n".join([SENTENCE] * 60),
    "slow": " ".join(f"{SENTENCE}" for _ in range(12)),
}  # fmt: skip
MODELS = [
    {"id": "mistral-7b", "object": "model", "created": 1, "owned_by": "mistral-7b", "max_model_len": 4096,
     "precision": "int8", "chat_template": True, "sampling_defaults": {"temperature": 0.6, "max_tokens": 9},
     "tokenizer": {
         "kind": "SentencePiece", "file": "tokenizer.model", "vocab_size": 32002, "added_tokens": 2,
         "ends": [{"id": 32000, "token": "<|im_end|>"}],
         "chat": {"name": "chat_template.jinja", "tools": False, "system": True},
     }},
    {"id": "poems", "object": "model", "created": 1, "owned_by": "mistral-7b", "parent": "mistral-7b"},
    {"id": "base", "object": "model", "created": 1, "owned_by": "mistral-7b", "max_model_len": 4096,
     "precision": "bfloat16", "chat_template": False},
    {"id": "silent", "object": "model", "created": 1, "owned_by": "mistral-7b", "chat_template": False,
     "tokenizer": {"kind": "byte-level BPE", "file": "tokenizer.json", "vocab_size": 700, "added_tokens": 0,
                   "ends": [], "chat": None}},
]  # fmt: skip


def split(text: str) -> list[bytes]:
    """Split a text into tokens as bytes; some are a part of a character."""
    tokens = []
    for piece in re.findall(r"\n+|[ ]?[A-Za-z]+|[ ]?[0-9]|[ ]?[^\sA-Za-z0-9]|[ ]+", text):
        data = piece.encode()
        tokens += [data] if piece.isascii() else [data[i : i + 1] for i in range(len(data))]
    return tokens


def entry(token: bytes, share: float) -> dict[str, Any]:
    text = token.decode("utf-8", "replace")
    return {"token": text, "logprob": math.log(share), "bytes": list(token)}


def told(token: bytes, i: int) -> dict[str, Any]:
    """The log-probability entry of a token, with a probability that depends on token and position."""
    share = (0.99, 0.95, 0.8, 0.97, 0.5, 0.99, 0.3, 0.93, 0.15, 0.98, 0.05)[(zlib.crc32(token) + i) % 11]
    others = [b" maybe", b" never", b"\n", b" or"]
    top = [entry(token, share), *(entry(other, (1 - share) / 2 ** (k + 1)) for k, other in enumerate(others))]
    return {**entry(token, share), "top_logprobs": sorted(top, key=lambda e: -e["logprob"])}


class Script:
    """The routes of the scripted server; `asked` records the request bodies."""

    def __init__(self) -> None:
        self.key = ""
        self.asked: list[dict[str, Any]] = []
        self.seen: Counter[str] = Counter()

    def refused(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        error = {
            "message": "wrong or missing API key",
            "type": "authentication_error",
            "param": None,
            "code": None,
        }
        return JSONResponse({"error": error}, 401)

    async def chat(self, request: Request) -> Response:
        if (no := self.refused(request)) is not None:
            return no
        body = await request.json()
        self.asked.append(body)
        said = next((m["content"] for m in reversed(body["messages"]) if m["role"] == "user"), "")
        self.seen[said] += 1
        if "full" in said and self.seen[said] <= 2:
            error = {"message": "3 requests are waiting, and no more may.", "type": "rate_limit_error"}
            return JSONResponse({"error": error}, 429, {"retry-after": "3"})
        if "tight" in said and body.get("max_tokens"):
            error = {"message": "max_tokens does not fit the context", "type": "invalid_request_error"}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(self.chunks(body, said), media_type="text/event-stream")

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)

        async def chunks() -> AsyncIterator[str]:
            for text, finish in ((" and so", None), (" on", "stop")):
                choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
                yield f"data: {json.dumps({'model': body['model'], 'choices': [choice], 'usage': None})}\n\n"
            usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            yield f"data: {json.dumps({'model': body['model'], 'choices': [], 'usage': usage})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def chunks(self, body: dict[str, Any], said: str) -> AsyncIterator[str]:
        last = body["messages"][-1]
        prefix = last["content"] if last["role"] == "assistant" else ""
        frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": body["model"]}

        def chunk(delta: dict[str, Any], finish: str | None = None, tokens: list[Any] | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": finish,
                      "logprobs": {"content": tokens} if tokens is not None else None}  # fmt: skip
            return f"data: {json.dumps({**frame, 'choices': [choice], 'usage': None})}\r\n\r\n"

        yield ": come in\n\n" + chunk({"role": "assistant", "content": ""})
        if "weather" in said and body.get("tools") and last["role"] == "user":
            call = {
                "index": 0,
                "id": "abcdefghi",
                "type": "function",
                "function": {"name": "weather", "arguments": ""},
            }
            yield chunk({"tool_calls": [call]})
            for part in ('{"city"', ': "Paris"}'):
                yield chunk({"tool_calls": [{"index": 0, "function": {"arguments": part}}]})
            yield chunk({}, "tool_calls")
        else:
            text = next((answer for word, answer in ANSWERS.items() if word in said), SENTENCE)
            if last["role"] == "tool":
                text = f"It is {last['content']}."
            if prefix:
                text = text[len(prefix) :] if text.startswith(prefix) else ", and so it went on."
            held, content, tokens = b"", "", []
            for i, token in enumerate(split(text)):
                await asyncio.sleep(0.02 if "slow" in said else 0.001)
                if "error" in said and i == 4:
                    yield 'data: {"error": {"message": "the step failed", "type": "server_error"}}\n\n'
                    return
                if "hang up" in said and i == 4:
                    return
                held += token
                try:
                    piece, held = held.decode(), b""
                except UnicodeDecodeError:
                    piece = ""
                content, tokens = content + piece, [*tokens, told(token, i)]
                if "several" in said and len(tokens) < 3:
                    continue
                yield chunk({"content": content}, None, tokens)
                content, tokens = "", []
            finish = "length" if "length" in said and not prefix else "stop"
            yield chunk({"content": content} if content else {}, finish, tokens)
        usage = {"prompt_tokens": 900, "completion_tokens": 124, "total_tokens": 1024}
        yield f"data: {json.dumps({**frame, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"


def build() -> FastAPI:
    script, app = Script(), FastAPI()
    app.include_router(router(None))  # type: ignore[arg-type]
    app.add_api_route("/v1/chat/completions", script.chat, methods=["POST"])
    app.add_api_route("/v1/completions", script.complete, methods=["POST"])

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return script.refused(request) or JSONResponse({"object": "list", "data": MODELS})

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, int]:
        return {"count": sum(len(split(m["content"] or "")) for m in (await request.json())["messages"])}

    @app.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/asked")
    async def asked() -> list[dict[str, Any]]:
        return script.asked

    @app.get("/use-key")
    async def use_key(key: str) -> None:
        script.key = key

    return app


if __name__ == "__main__":
    uvicorn.run(build(), port=int(sys.argv[1]), log_level="error", timeout_graceful_shutdown=1)
