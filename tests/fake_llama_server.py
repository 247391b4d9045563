"""A llama-server that computes nothing: it answers as llama.cpp's does, or badly, as the name of its file says.

    fine.gguf   every token after a hundredth of a second    broken.gguf  breaks off after two tokens
    full.gguf   refuses every request                        gone.gguf    does not start
    silent.gguf says nothing of half of the tokens but in the end
Its last flags and the requests that it got are left beside the file.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import sys

WORDS = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=False))


def install(folder: pathlib.Path) -> str:
    """Make this a llama-server in the folder; its path."""
    script = folder / "llama-server"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E {pathlib.Path(__file__)} "$@"\n')
    script.chmod(0o755)
    return str(script)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    if head.startswith("GET /health "):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    else:
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        await complete(json.loads(await reader.readexactly(length)), writer)
    await writer.drain()
    writer.close()


async def complete(asked: dict, writer: asyncio.StreamWriter) -> None:
    file = pathlib.Path(WORDS["-m"])
    with file.with_name("requests").open("a") as log:
        log.write(json.dumps(asked) + "\n")
    if file.stem == "full":
        body = b'{"error": {"message": "no slot is free"}}'
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        return
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    n, usage = asked["max_tokens"], None
    for i in range(n + 1):
        if i < n:
            await asyncio.sleep(0.01)
        else:
            usage = {"completion_tokens": n, "prompt_tokens_details": {"cached_tokens": 3}}
        text = "" if i == n or (file.stem == "silent" and i % 2) else " word"
        said = f"data: {json.dumps({'choices': [{'text': text}], 'usage': usage})}\n\n".encode()
        # An event may come in two parts, and two events in one.
        for part in (said[:9], said[9:] + (b"data: [DONE]\n\n" if i == n else b"")):
            writer.write(b"%x\r\n%s\r\n" % (len(part), part))
        await writer.drain()
        if file.stem == "broken" and i == 1:
            return
    writer.write(b"0\r\n\r\n")


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", int(WORDS["--port"]))
    await server.serve_forever()


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        sys.exit("version: 7 (abc)")
    print("system_info: n_threads = 2 | AVX512 = 1 | AMX_INT8 = 1 | SVE = 0 |", flush=True)
    if pathlib.Path(WORDS["-m"]).stem == "gone":
        sys.exit("cannot open the file")
    pathlib.Path(WORDS["-m"]).with_name("flags").write_text(json.dumps(sys.argv[1:]))
    asyncio.run(main())
