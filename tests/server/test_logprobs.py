"""Log-probabilities: their tokens' bytes concatenate to the text, byte tokens, stops and tool calls included."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from example_counts import MANY
from hypothesis import given
from hypothesis import strategies as st
from serving import HELLO, Serving
from template_shapes import HERMES_TOOLS
from tokenizer_files import byte_level_folder, sentencepiece_folder, write

from mistral_7b.engine.completion import Completion, TextPiece
from mistral_7b.sampling.logprobs import Logprob
from mistral_7b.sampling.params import SamplingParams
from mistral_7b.server.openai.logprobs import ChatLogprobs, Part, TokenSpans, joined, text_logprobs
from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.text.tool_calls import CLOSING, OPENING, ToolCallStream
from mistral_7b.text.vocabularies.fast import BYTES as BYTE_OF

TEXTS = [
    "a🙂b世界 龘x",
    "🙂",
    "  two  spaces",
    "é\u0301 ﷽",
    "\n\n龘龘",
    "👩‍👩‍👧‍👦 ist Grüße\t鱻",
    " ",
    "plain text",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.v3()


def wanted(tokenizer: Tokenizer, ids: list[int], keep_space: bool = False) -> list[int]:
    """Expected offsets, computed independently: the complete characters in the bytes before each token."""
    data, out = b"", []
    for token in ids:
        new = tokenizer.piece_bytes(token)
        if not data and not keep_space and new.startswith(b" "):
            new = new[1:]
        out.append(len(data.decode(errors="ignore")))
        data += new
    return out


def told(parts: TokenSpans, tokens: Sequence[int]) -> list[Part]:
    """Push all tokens; return all parts."""
    for token in tokens:
        parts.push(token, None)
    parts.end()
    return parts.told()


@pytest.mark.parametrize("text", TEXTS)
def test_where_tokens_stand(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, eos=True)
    parts = TokenSpans(tokenizer)
    assert [part.offset for part in told(parts, ids)] == wanted(tokenizer, ids)
    assert parts.length == len(text)
    for cut in range(1, len(ids)):  # the prompt's length
        head, tail = ids[:cut], ids[cut:]
        found = told(TokenSpans(tokenizer, head, 100), tail)
        if "\ufffd" not in tokenizer.decode(head):
            assert [part.offset - 100 for part in found] == wanted(tokenizer, tail, keep_space=cut > 1)


def test_bytes_that_become_no_character_stand_alone(tokenizer: Tokenizer) -> None:
    start, more, _ = tokenizer.encode("龘", bos=False)[-3:]
    x = tokenizer.encode("x", bos=False)[-1]
    unknown = list("\ufffd".encode())
    for tokens in ((start, more, start), (start, more, x), (start, start, x)):
        parts = told(TokenSpans(tokenizer), tokens)
        assert [part.offset for part in parts] == [0, 1, 2]
        assert [list(part.data) for part in parts[:2]] == [unknown, unknown]
        assert joined(parts) == tokenizer.decode(tokens)
    real = [BYTE[bytes([b])] for b in unknown]
    assert [part.data for part in told(TokenSpans(tokenizer), real)] == [b"\xef", b"\xbf", b"\xbd"]


def test_of_two_tokens_with_one_spelling_the_likelier_is_told(tokenizer: Tokenizer) -> None:
    letter = next(i for i in range(1000, 32768) if tokenizer.surface(i) == "A")
    byte = next(i for i in range(1000) if tokenizer.surface(i) == b"A")
    entry = {byte: Logprob(-3.0, 2), letter: Logprob(-1.0, 1)}
    out = text_logprobs(tokenizer, [Part(byte, entry, False, b"A", 1)], 2)
    assert out["token_logprobs"] == [-3.0]
    assert out["top_logprobs"] == [{"A": -1.0}]


CALL = '[{"name": "f", "arguments": {"a": "So it"}}]'
V3 = Tokenizer.v3()
CONTROLS = {V3.piece(i) for i in range(771) if V3.is_control(i)}
BYTES = range(771, 1027)
BYTE = {V3.surface(i): i for i in BYTES}
TEXT = ("So", " it", "龘", "🙂", ". End", "a b", "\n\n", "\ufffd", CALL)
IN_BYTES = (CALL, CALL[:20], CALL + "]", "é", "So", "E")
SPELT = [V3.encode(text, bos=False) for text in TEXT]
SPELT += [[BYTE[bytes([b])] for b in text.encode()] for text in IN_BYTES]
CALLING = [[5, *run] for run in SPELT[-6:]]
ODD = [[BYTE[b"\xe9"]], [BYTE[b"\xbf"]], [0], [V3.eos_id], [3], [5], [V3.encode(" ", bos=False)[0]]]


def told_in_pieces(
    tokenizer: Tokenizer, c: Completion, tokens: Sequence[int], sizes: Sequence[int], calls: bool = False
) -> tuple[list[int], list[dict[str, Any]]]:
    """Push tokens, so many a piece: the entries told so far spell the text so far.

    Returns the numbers of the tokens that were told, and their entries.
    """
    pieces = []
    for number, token in enumerate(tokens):
        if not c.finished:
            entry = {token: Logprob(-float(number), 1)}
            text = c.push(token, entry)
            taken = c.take_deltas()
            pieces.append(TextPiece(text, 0, (token,), c.finish_reason, c.stop_reason, (entry,), taken))
    logprobs, size = ChatLogprobs(tokenizer, c.prompt, 0, calls), itertools.cycle(sizes)
    given, spelt, entries = "", b"", []
    left = iter(pieces)
    while some := list(itertools.islice(left, next(size))):
        text, found = logprobs.of(TextPiece.joined(some))
        given += text
        entries += found["content"]
        spelt += b"".join(bytes(entry["bytes"]) for entry in found["content"])
        assert spelt.decode() == given
        assert c.text.startswith(given)
    assert given == c.text
    numbers = [-int(entry["logprob"]) for entry in entries]
    assert numbers == sorted(set(numbers))
    return numbers, entries


@given(
    st.lists(st.sampled_from([*SPELT, *CALLING, *ODD]), max_size=8),
    st.lists(st.sampled_from(["End", " it", "t", "o i", "龘", "\ufffd", "a", '"a"', "]", "b\n"]), max_size=2),
    st.lists(st.integers(1, 6), min_size=1),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
@MANY
def test_tokens_told_so_far_are_the_text_so_far(
    runs: list[list[int]], stops: list[str], sizes: list[int], calls: bool, chat: bool, cut: bool
) -> None:
    """For any tokens, stop conditions, and numbers of tokens per piece."""
    tokens = [token for run in runs for token in run]
    prompt = [1, 3, 4] if chat else V3.encode("Say")
    stream = ToolCallStream(V3.tool_syntax, str) if calls else None
    params = SamplingParams(stop=stops, ignore_eos=True, logprobs=0, stop_token_ids=None if cut else BYTES[:70:69])
    c = Completion(prompt, params, max(1, len(tokens)), 0, tokenizer=V3, calls=stream)
    numbers, entries = told_in_pieces(V3, c, tokens, sizes, calls)
    if not stops and not calls:
        ended = len(c.token_ids) - (c.stop_reason is not None)
        assert numbers == [i for i in range(ended) if not V3.is_control(tokens[i])]
    for number, entry in zip(numbers, entries, strict=True):
        assert tokens[number] in BYTES or entry["token"] == bytes(entry["bytes"]).decode()


@pytest.fixture(scope="module")
def hermes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer whose model writes tool calls between tags."""
    return Tokenizer.from_pretrained(
        sentencepiece_folder(tmp_path_factory.mktemp("h"), chat_template=HERMES_TOOLS)
    )


@given(
    st.lists(
        st.sampled_from([OPENING, CLOSING, f"{OPENING}\n{CALL[1:-1]}\n{CLOSING}", CALL[1:-1], "\n", " <", "é"]),
        max_size=8,
    ),
    st.lists(st.sampled_from(["End", "So", "<", "call>", "\n"]), max_size=1),
    st.lists(st.integers(1, 6), min_size=1), st.booleans(),
)  # fmt: skip
@MANY
def test_tokens_between_tags_are_no_text(
    hermes: Tokenizer, texts: list[str], stops: list[str], sizes: list[int], cut: bool
) -> None:
    tokens = hermes.encode("".join(texts), bos=False)
    params = SamplingParams(stop=stops, ignore_eos=True, logprobs=0)
    stream = ToolCallStream(hermes.tool_syntax, str)
    c = Completion([1], params, max(1, len(tokens) + (not cut)), 0, tokenizer=hermes, calls=stream)
    told_in_pieces(hermes, c, [*tokens, 3], sizes, calls=True)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its tokens are bytes, several each, that begin and end within characters."""
    return Tokenizer.from_pretrained(byte_level_folder(tmp_path_factory.mktemp("files")))


@given(
    st.lists(st.sampled_from(["日本", "é", " So it", "🙂", "\ufffd", "End"]) | st.integers(0, 699), max_size=12),
    st.lists(st.sampled_from(["End", " it", "t", "本", "\ufffd", "🙂"]), max_size=2),
    st.lists(st.integers(1, 6), min_size=1),
)
@MANY
def test_tokens_of_several_bytes_are_the_text_so_far(
    byte_level: Tokenizer, runs: list[str | int], stops: list[str], sizes: list[int]
) -> None:
    tokens = [i for run in runs for i in (byte_level.encode(run) if isinstance(run, str) else [run])]
    params = SamplingParams(stop=stops, ignore_eos=True, logprobs=0)
    c = Completion([1], params, max(1, len(tokens)), 0, tokenizer=byte_level)
    numbers, _ = told_in_pieces(byte_level, c, tokens, sizes)
    if not stops:
        assert numbers == [i for i in range(len(tokens)) if not byte_level.is_control(tokens[i])]


def test_no_token_is_told_in_the_middle_of_a_character(tmp_path: Path) -> None:
    """日本 in two tokens, of which the second is held back as the start of a stop string."""
    names = {byte: name for name, byte in BYTE_OF.items()}
    first, second = ("".join(names[b] for b in part) for part in (b"\xe6\x97", b"\xa5\xe6\x9c\xac"))
    vocabulary = {name: i for i, name in enumerate([*names.values(), first, second])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    decoder = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    t = Tokenizer.from_pretrained(write(tmp_path, tokenizer={"model": model, "decoder": decoder}))
    c = Completion([1], SamplingParams(stop="本x", logprobs=0), 9, 0, tokenizer=t)
    logprobs, out = ChatLogprobs(t, [1], 0, False), []
    for token in (256, 257, vocabulary["y"]):
        entry = {token: Logprob(-1.0, 1)}
        piece = TextPiece(c.push(token, entry), 0, (token,), c.finish_reason, c.stop_reason, (entry,))
        text, found = logprobs.of(piece)
        out.append((piece.text, text, [bytes(e["bytes"]) for e in found["content"]]))
    assert out == [("", "", []), ("日", "", []), ("本y", "日本y", [b"\xe6\x97", b"\xa5\xe6\x9c\xac", b"y"])]


def test_where_tokens_of_several_bytes_stand(byte_level: Tokenizer) -> None:
    for text in TEXTS:
        ids = byte_level.encode(text)
        parts = told(TokenSpans(byte_level), ids)
        assert [part.offset for part in parts] == wanted(byte_level, ids, keep_space=True)
        assert [byte_level.piece_bytes(i) for i in ids] == [part.data for part in parts]


def test_a_stop_id_that_is_text_is_left_out(byte_level: Tokenizer) -> None:
    word = byte_level.encode("So")[-1]
    t = byte_level.stopping_at([word])
    c = Completion([1], SamplingParams(logprobs=0), 9, 0, tokenizer=t)
    tokens = [*t.encode("it "), word]
    pieces = []
    for token in tokens:
        entry = {token: Logprob(-1.0, 1)}
        pieces.append(TextPiece(c.push(token, entry), 0, (token,), c.finish_reason, c.stop_reason, (entry,)))
    assert (c.text, c.finish_reason, c.stop_reason) == ("it ", "stop", None)
    text, found = ChatLogprobs(t, [1], 0, False).of(TextPiece.joined(pieces))
    assert text == "it " == "".join(entry["token"] for entry in found["content"])


def streamed(server: Serving, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    data = server.ask("POST", path, {**body, "stream": True})[2].decode()
    return [json.loads(line)["choices"][0] for line in re.findall(r"^data: (\{.*)$", data, re.M)]


@pytest.mark.parametrize("text", [t for t in TEXTS if t.strip() == t])
def test_a_chats_bytes_are_the_text(server: Serving, text: str) -> None:
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 3, "temperature": 0,
            "structured_outputs": {"choice": [text]}}  # fmt: skip
    whole = server.post("/v1/chat/completions", body)[1]["choices"][0]
    assert whole["message"]["content"] == text
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(t["bytes"]) for t in content).decode() == text
    parts = streamed(server, "/v1/chat/completions", body)
    assert "".join(p["delta"].get("content", "") for p in parts) == text
    later = [t for p in parts if p["logprobs"] for t in p["logprobs"]["content"]]
    assert [t["bytes"] for t in later] == [t["bytes"] for t in content]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("echo", [False, True])
def test_a_completions_tokens_stand_in_the_text(
    server: Serving, tokenizer: Tokenizer, text: str, echo: bool
) -> None:
    body = {"prompt": "龘 so", "logprobs": 1, "echo": echo, "max_tokens": 60, "temperature": 0,
            "structured_outputs": {"choice": [text]}}  # fmt: skip
    whole = server.post("/v1/completions", body)[1]["choices"][0]
    assert whole["text"] == ("龘 so" if echo else "") + text
    found = whole["logprobs"]
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not re.fullmatch(r"<s>|</s>|<0x..>", token):
            assert whole["text"][offset:].startswith(token)
        elif token != "<s>" and token != "</s>":
            assert int(token[3:5], 16) in whole["text"][offset].encode()
    parts = streamed(server, "/v1/completions", body)
    assert "".join(p["text"] for p in parts) == whole["text"]
    assert [o for p in parts if p["logprobs"] for o in p["logprobs"]["text_offset"]] == found["text_offset"]


def spelled(choice: dict[str, Any]) -> str:
    """The text that the log-probabilities of a response or chunk spell."""
    found = choice["logprobs"]
    if found is None:
        return ""
    if "content" in found:
        return b"".join(bytes(token["bytes"]) for token in found["content"]).decode()
    return "".join(token for token in found["tokens"] if token not in CONTROLS)


@pytest.mark.parametrize("where", [(0, 2), (1, 3), (4, 7), (9, 10), (10, 30)])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_of_a_stopped_answer_the_tokens_told_are_its_text(
    server: Serving, path: str, where: tuple[int, int]
) -> None:
    chat = path == "/v1/chat/completions"
    body: dict[str, Any] = {"messages": HELLO, "logprobs": True} if chat else {"prompt": "one", "logprobs": 1}
    body |= {"max_tokens": 16, "seed": 4}

    def text_of(choice: dict[str, Any]) -> str:
        return choice["message"]["content"] if chat else choice["text"]

    (free,) = server.post(path, body)[1]["choices"]
    assert spelled(free) == text_of(free)
    stop = text_of(free)[slice(*where)]
    (cut,) = server.post(path, {**body, "stop": [stop, "never said"]})[1]["choices"]
    assert spelled(cut) == text_of(cut) == text_of(free)[: text_of(free).index(stop)]
    text, told = "", ""
    for part in streamed(server, path, {**body, "stop": [stop]}):
        text += part["delta"].get("content", "") if chat else part["text"]
        told += spelled(part)
        assert told == text
    assert told == text_of(cut)
    if not chat:
        lengths = [0 if token in CONTROLS else len(token) for token in cut["logprobs"]["tokens"]]
        assert cut["logprobs"]["text_offset"] == [0, *itertools.accumulate(lengths)][: len(lengths)]


def test_an_echoed_text_is_its_tokens(server: Serving) -> None:
    body = {"prompt": "one two", "logprobs": 1, "echo": True, "max_tokens": 4, "seed": 1}
    (choice,) = server.post("/v1/completions", body)[1]["choices"]
    assert spelled(choice) == choice["text"]
    assert choice["logprobs"]["tokens"][1] == "one"


@pytest.mark.parametrize("most", [0, 1])
def test_scores_are_the_models_own(server: Serving, tokenizer: Tokenizer, most: int) -> None:
    """The request of lm-eval's local-completions: batches of ids, with `echo` and `logprobs`."""
    import torch

    model, greedy = server.llm.engine.model, [1, 7, 9]
    for _ in range(3):
        greedy.append(int(model(torch.tensor([greedy]))[0][0, -1].argmax()))
    prompts = [tokenizer.encode("The sky is green 世界龘"), greedy]
    body = {"prompt": prompts, "max_tokens": most, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    choices = server.post("/v1/completions", body)[1]["choices"]
    for ids, choice in zip(prompts, choices, strict=True):
        logits = model(torch.tensor([ids]))[0][0, :-1].double().log_softmax(-1)
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(ids) + most
        own = logits[range(len(ids) - 1), ids[1:]].tolist()
        assert found["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-4)
        best = logits.max(-1).values.tolist()
        assert [max(top.values()) for top in found["top_logprobs"][1 : len(ids)]] == pytest.approx(best, abs=1e-4)
    tops, tokens = (choices[1]["logprobs"][key][3:6] for key in ("top_logprobs", "tokens"))
    assert [max(top, key=top.get) for top in tops] == tokens
