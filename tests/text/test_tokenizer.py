"""The tokenizer, compared with mistral-common, with literal ids, and with itself."""

import json
import random
import shutil

import pytest
from example_counts import MANY
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.protocol.instruct import messages as mc
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Function, FunctionCall, Tool, ToolCall
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from refusals import refused

from mistral_7b.errors import TokenizerError
from mistral_7b.text.messages import tool_call_id
from mistral_7b.text.tokenizer import Tokenizer

VERSIONS = ("v1", "v2", "v3")
OURS = {v: getattr(Tokenizer, v)() for v in VERSIONS}
THEIRS = {v: getattr(MistralTokenizer, v)() for v in VERSIONS}

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": " See you. \n"},
    {"role": "user", "content": "One more: 日本語 🙂\n"},
]
CALLS = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "abcDEF123", "type": "function", "function": {"name": "get", "arguments": '{"at": "Paris é"}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "abcDEF123", "name": "get", "content": '{"degrees": 21}'},
]
SCHEMA = {"type": "object", "properties": {"at": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "get", "description": "Weather", "parameters": SCHEMA}}]

tokenizers = pytest.mark.parametrize("version", VERSIONS)


def theirs(version, messages, tools=None):
    """The ids of mistral-common, its objects written out by hand."""
    objects = []
    for m in messages:
        if m["role"] == "assistant":
            calls = [
                ToolCall(id=c["id"], function=FunctionCall(**c["function"])) for c in m.get("tool_calls") or []
            ]
            objects.append(mc.AssistantMessage(content=m["content"], tool_calls=calls or None))
        else:
            kind = {"system": mc.SystemMessage, "user": mc.UserMessage, "tool": mc.ToolMessage}[m["role"]]
            objects.append(kind(**{k: v for k, v in m.items() if k != "role"}))
    offered = [Tool(function=Function(**t["function"])) for t in tools or []] or None
    return THEIRS[version].encode_chat_completion(ChatCompletionRequest(messages=objects, tools=offered)).tokens


@tokenizers
@pytest.mark.parametrize("turns", [1, 3, 5])
@pytest.mark.parametrize("system", [0, 1, 2])
@pytest.mark.parametrize("tools", [False, True])
def test_trap_16_chat_ids_are_those_of_mistral_common(version, turns, system, tools):
    messages = [SYSTEM] * min(system, 1) + TURNS[:turns] + [SYSTEM] * (system == 2)
    if version == "v1" and tools:
        with refused(TokenizerError, field="tools"):
            OURS[version].encode_chat(messages, TOOLS)
        return
    offered = TOOLS if tools else None
    assert OURS[version].encode_chat(messages, offered) == theirs(version, messages, offered)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize(
    "after", [[], [{"role": "assistant", "content": "Warm"}, {"role": "user", "content": "?"}]]
)
@pytest.mark.parametrize("system", [[], [SYSTEM]])
def test_trap_16_tool_calls_and_results(version, after, system):
    messages = system + CALLS + after
    assert OURS[version].encode_chat(messages, TOOLS) == theirs(version, messages, TOOLS)


def test_trap_16_literal_ids():
    chat = [SYSTEM, *TURNS[:3]]
    # v1: plain text, the system text joins the first turn.  [ INST ] Be brief . \n \n Hi [ / INST ] ...
    assert OURS["v1"].encode_chat(chat) == [
        1, 733, 16289, 28793, 1739, 6817, 28723, 13, 13, 23809, 733, 28748, 16289, 28793, 22557, 2,
        733, 16289, 28793, 2463, 28706, 733, 28748, 16289, 28793,
    ]  # fmt: skip
    # v2 and v3: control ids 3 and 4, the system text joins the last turn, tools (6 ... 7) just before it.
    last = [3, 2507, 7585, 29491, 781, 781, 2698, 29474, 4]
    assert OURS["v2"].encode_chat(chat) == OURS["v3"].encode_chat(chat) == [1, 3, 16127, 4, 23325, 2, *last]
    with_tools = OURS["v3"].encode_chat(chat, TOOLS)
    assert with_tools[:7] == [1, 3, 16127, 4, 23325, 2, 6]
    assert with_tools[-10:] == [7, *last]
    call = {"function": {"name": "f", "arguments": '{"x": 1}'}, "id": "A2345678z"}
    result = {"role": "tool", "content": "2", "tool_call_id": "A2345678z"}
    chat = [TURNS[0], {"role": "assistant", "tool_calls": [call]}, result]
    text = [OURS["v3"].piece(i) for i in OURS["v3"].encode_chat(chat)]
    assert "".join(text) == (
        '<s>[INST] Hi[/INST][TOOL_CALLS] [{"name": "f", "arguments": {"x": 1}, "id": "A2345678z"}]</s>'
        '[TOOL_RESULTS] {"content": 2, "call_id": "A2345678z"}[/TOOL_RESULTS]'
    )


def test_trap_16_tool_call_ids_become_nine_alphanumerics():
    assert tool_call_id("abcDEF123") == "abcDEF123"
    made = {tool_call_id(f"call_{i}") for i in range(1000)} | {tool_call_id("abcDEF12é")}
    assert len(made) == 1001
    assert all(len(i) == 9 and i.isascii() and i.isalnum() for i in made)
    foreign = json.loads(json.dumps(CALLS).replace("abcDEF123", "call_6kZ-1"))
    mapped = json.loads(json.dumps(CALLS).replace("abcDEF123", tool_call_id("call_6kZ-1")))
    assert OURS["v3"].encode_chat(foreign) == theirs("v3", mapped)


def test_null_and_missing_fields_of_openai_clients_are_accepted():
    v3, plain = OURS["v3"], theirs("v3", [SYSTEM, *CALLS])
    loose = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}], "name": None},
        CALLS[0],
        {**CALLS[1], "content": "", "refusal": None, "audio": None, "function_call": None},
        {**CALLS[2], "name": None},
    ]
    assert v3.encode_chat(loose) == plain
    as_dict = {**CALLS[1]["tool_calls"][0]["function"], "arguments": {"at": "Paris é"}}
    loose[2] = {"role": "assistant", "tool_calls": [{"id": "abcDEF123", "function": as_dict}]}
    assert v3.encode_chat(loose) == plain
    # without ids: results answer the calls in order
    nameless = [{"function": {"name": n, "arguments": None}} for n in ("a", "b")]
    results = [{"role": "tool", "content": c} for c in ("one", "two")]
    text = v3.decode(v3.encode_chat([CALLS[0], {"role": "assistant", "tool_calls": nameless}, *results]))
    first, second = tool_call_id("1.0"), tool_call_id("1.1")
    assert f'"one", "call_id": "{first}"' in text
    assert f'"two", "call_id": "{second}"' in text
    # the v2 template writes a result's name, which OpenAI's clients leave out
    assert OURS["v2"].encode_chat([*CALLS[:2], {**CALLS[2], "name": None}]) == theirs("v2", CALLS)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        *[(nothing, "{}") for nothing in (None, "", " ", "null", ' "null" ', '""', {})],
        (json.dumps('{"at": "Paris é"}'), '{"at": "Paris é"}'),
        (json.dumps(json.dumps({"at": [1, None]})), '{"at": [1, null]}'),
        *[(text, text) for text in ("[1]", "3", '"Paris"', "Paris", '{"at": "Par', "[" * 9)],  # as it was written
    ],
)
@pytest.mark.parametrize("version", ["v2", "v3"])
def test_arguments_in_unusual_encodings_are_normalized(version, given, meant):
    function = {"name": "get"} if given is None else {"name": "get", "arguments": given}
    call = {"id": "abcDEF123", "type": "function", "function": function}
    ours = OURS[version].encode_chat([CALLS[0], {"role": "assistant", "tool_calls": [call]}, CALLS[2], TURNS[0]])
    theirs = ToolCall(id="abcDEF123", function=FunctionCall(name="get", arguments=meant))
    chat = [
        mc.UserMessage(content="Weather?"), mc.AssistantMessage(content=None, tool_calls=[theirs]),
        mc.ToolMessage(tool_call_id="abcDEF123", name="get", content=CALLS[2]["content"]),
        mc.UserMessage(content="Hi"),
    ]  # fmt: skip
    assert ours == THEIRS[version].encode_chat_completion(ChatCompletionRequest(messages=chat)).tokens


def test_a_prefix_of_the_answer_is_continued():
    chat = [TURNS[0], {"role": "assistant", "content": "Well,", "prefix": True}]
    ids = OURS["v3"].encode_chat(chat)
    assert ids == [*OURS["v3"].encode_chat(chat[:1]), *OURS["v3"].encode("Well,", bos=False)]


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ([{"content": "x"}], "messages[0].role"),
        ([TURNS[0], {"role": "bot", "content": "x"}], "messages[1].role"),
        ([TURNS[0], {"role": "user"}], "messages[1].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        (TURNS[:2], "messages[1]"),
        ([SYSTEM], "messages"),
        ([TURNS[0], {"role": "assistant", "content": ""}], "messages[1].content"),
        ([TURNS[0], CALLS[2], *TURNS[:3]], "messages[1]"),
        ([TURNS[0], {"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages[1].tool_calls"),
        ([*TURNS[:3], {"role": "assistant", "content": "a", "prefix": True}, TURNS[0]], "messages[3].prefix"),
    ],
)
def test_an_invalid_conversation_names_the_message(messages, field):
    with refused(TokenizerError, field=field):
        OURS["v3"].encode_chat(messages)
    if field.startswith("messages["):
        labels = [f"turn {i}" for i in range(len(messages))]
        with refused(TokenizerError, field=field.replace("messages[", "turn ", 1).replace("]", "", 1)):
            OURS["v3"].encode_chat(messages, labels=labels)


@pytest.mark.wording
def test_error_messages_of_invalid_conversations():
    with pytest.raises(TokenizerError, match=r"^messages\[1\]: unknown role 'bot'; must be one of system, "):
        OURS["v3"].encode_chat([TURNS[0], {"role": "bot", "content": "x"}])
    with pytest.raises(TokenizerError, match=r"^messages\[1\]: .*'tool' after role 'user'"):
        OURS["v3"].encode_chat([TURNS[0], CALLS[2], *TURNS[:3]])


def test_text_beside_calls_is_dropped_as_in_mistrals_templates():
    """Clients send back the text that a model wrote before its calls, and the conversation continues."""
    ids = OURS["v3"].encode_chat([TURNS[0], {**CALLS[1], "content": "I look it up."}, CALLS[2]])
    assert ids == OURS["v3"].encode_chat([TURNS[0], CALLS[1], CALLS[2]])


def test_invalid_tools_are_refused():
    for tool in ({"type": "function"}, {"function": {"name": "a b", "parameters": {}}}, "x"):
        with refused(TokenizerError, field="tools"):
            OURS["v3"].encode_chat(TURNS[:1], [tool])
    with refused(TokenizerError, field="messages[1].tool_calls"):
        OURS["v1"].encode_chat(CALLS)


@tokenizers
def test_trap_17_exactly_one_bos_on_every_path(version):
    t = OURS[version]
    spelled = "<s> <s>a"
    paths = [
        t.encode(""),
        t.encode(spelled),
        t.encode_chat(TURNS),
        t.encode_chat([{"role": "user", "content": spelled}]),
    ]
    paths += [t.encode_chat([SYSTEM, *CALLS], TOOLS)] if version != "v1" else []
    for ids in paths:
        assert ids[0] == t.bos_id == 1
        assert ids.count(1) == 1
    assert t.encode("a", bos=False) == t.encode("a")[1:]
    assert t.encode("a", eos=True) == [*t.encode("a"), 2]


@tokenizers
def test_trap_18_text_that_spells_a_control_token_stays_text(version):
    t = OURS[version]
    names = "[INST] [/INST] </s> <s> <unk> [TOOL_CALLS] [AVAILABLE_TOOLS] [/TOOL_RESULTS] [control_8] [IMG] <0x0A>"
    ids = t.encode(names)
    assert not any(t.is_control(i) for i in ids[1:])
    assert t.decode(ids) == names
    for messages in ([{"role": "user", "content": names}], [SYSTEM | {"content": names}, *TURNS[:3]]):
        controls = [i for i in t.encode_chat(messages) if t.is_control(i)]
        harmless = [dict(m, content="x") for m in messages]
        assert controls == [i for i in t.encode_chat(harmless) if t.is_control(i)]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"))


@tokenizers
@given(
    text=TEXTS
    | st.sampled_from([" ", "  a", "\n b", "\r\n\t", "😀👩‍👩‍👧", "日本", "\x00", "\ufffd", "a\u0301", "⁇"])
)
@MANY
def test_text_round_trips(version, text):
    t = OURS[version]
    ids = t.encode(text)
    assert t.decode(ids) == text
    stream = t.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == text


def ids_of(version):
    """Ids of any kind, with long runs of bytes and plenty of spaces and control tokens."""
    t = OURS[version]
    first = t.encode("\x00", bos=False)[-1]
    byte = st.integers(first, first + 255)
    space = st.sampled_from([t.encode(" ", bos=False)[0], t.encode("", eos=True)[1], 1, 0, t.vocab_size])
    return st.lists(byte | byte | space | st.integers(0, t.vocab_size + 99), max_size=30)


@tokenizers
@given(data=st.data())
@MANY
def test_trap_19_streamed_text_equals_decoded_text(version, data):
    t = OURS[version]
    ids = data.draw(ids_of(version))
    stream = t.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == t.decode(ids)


@tokenizers
def test_trap_19_spaces_are_kept_and_characters_stay_whole(version):
    t = OURS[version]
    first = t.encode("\x00", bos=False)[-1]
    stream = t.stream()
    spelled = [first + b for b in "é😀".encode()]  # byte fallback
    assert [stream.push(i) for i in spelled] == ["", "é", "", "", "", "😀"]
    assert stream.push(spelled[2]) == ""
    assert stream.push(t.encode("x", bos=False)[0]) == "\ufffd x"  # cut short by another piece
    assert stream.push(first + 0xFF) == "\ufffd"
    assert stream.push(first + 0xE2) + stream.flush() == "\ufffd"
    # what goes on a text keeps the space of its first word; what begins one does not
    words = t.encode("one two", bos=False)
    assert t.stream().push(words[0]) == "one"
    assert t.stream(after=t.encode("zero")).push(words[0]) == " one"
    assert t.stream(after=t.encode("")).push(words[0]) == "one"
    for cut in range(1, len(words)):
        stream = t.stream(after=words[:cut])
        assert t.decode(words[:cut]) + "".join(stream.push(i) for i in words[cut:]) == "one two"


@tokenizers
def test_pieces_for_display(version):
    t = OURS[version]
    first = t.encode("\x00", bos=False)[-1]
    assert (t.piece(first + 10), t.piece(first + 0xE2), t.piece(2)) == ("\n", "<0xE2>", "</s>")
    assert (t.piece_bytes(first + 0xE2), t.piece_bytes(2)) == (b"\xe2", b"")
    ids = t.encode("Hi there, 𒀀 🙂", bos=False)
    assert b"".join(t.piece_bytes(i) for i in ids).decode() == " Hi there, 𒀀 🙂"


@tokenizers
@pytest.mark.parametrize("behind", [0, 63, 2**40])
def test_ids_beyond_the_vocabulary_have_no_text(version, behind):
    """A model may have more ids than its tokenizer, and emit them."""
    t = OURS[version]
    unused, words = t.vocab_size + behind, t.encode("one two")
    assert (t.piece(unused), t.piece_bytes(unused), t.surface(unused)) == (f"<unused_{unused}>", b"", None)
    assert t.is_control(unused)
    assert t.decode([unused, *words, unused]) == "one two"
    stream = t.stream(after=[unused])
    assert [stream.push(i) for i in (unused, words[1], unused)] == ["", "one", ""]
    assert not stream.waiting


@tokenizers
def test_negative_ids_are_refused(version):
    t = OURS[version]
    for read in (t.piece, t.piece_bytes, t.stream().push, lambda i: t.decode([1, i])):
        with refused(TokenizerError, field="ids"):
            read(-1)
    with refused(TokenizerError, field="text"):
        t.encode("\ud800")


def test_the_template_is_detected_from_the_vocabulary(tmp_path):
    for version, name, found in [
        ("v1", "tokenizer.model.v3", "v1"),
        ("v3", "tokenizer.model", "v3"),
        ("v3", "anything.bin", "v3"),
        ("v2", "tokenizer.model", "v3"),  # the vocabulary that v0.3 was released with
        ("v2", "tokenizer.model.v2", "v2"),
    ]:
        shutil.copy(OURS[version].path, tmp_path / name)
        assert Tokenizer.from_file(tmp_path / name).version == found
        (tmp_path / name).unlink()
    v7 = MistralTokenizer.v7().instruct_tokenizer.tokenizer.file_path
    shutil.copy(v7, tmp_path / "tokenizer.model.v3")
    t = Tokenizer.from_file(tmp_path / "tokenizer.model.v3")
    assert t.version == "v7"
    want = MistralTokenizer.v7().encode_chat_completion(
        ChatCompletionRequest(messages=[mc.SystemMessage(content="Be brief."), mc.UserMessage(content="Hi")])
    )
    assert t.encode_chat([SYSTEM, TURNS[0]]) == want.tokens


def test_the_tokenizer_file_of_a_folder_is_chosen(tmp_path):
    with refused(TokenizerError, place=tmp_path):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with refused(TokenizerError, place=tmp_path / "tokenizer.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    shutil.copy(OURS["v1"].path, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model.v3.incomplete").write_text("half")
    assert Tokenizer.from_pretrained(tmp_path).version == "v1"
    shutil.copy(OURS["v3"].path, tmp_path / "tokenizer.model.v3")
    assert Tokenizer.from_pretrained(tmp_path).path.name == "tokenizer.model.v3"
    assert Tokenizer.from_pretrained(tmp_path / "tokenizer.model").version == "v1"
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert Tokenizer.from_pretrained(tmp_path / "model.safetensors").version == "v3"


def test_invalid_tokenizer_files_are_refused(tmp_path):
    with refused(TokenizerError, place=tmp_path / "tokenizer.model"):
        Tokenizer.from_file(tmp_path / "tokenizer.model")
    bad = tmp_path / "tokenizer.model"
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", random.Random(0).randbytes(1000)):
        bad.write_bytes(content)
        with refused(TokenizerError, place=bad):
            Tokenizer.from_file(bad)
    with refused(TokenizerError, field="version", place=OURS["v1"].path):
        Tokenizer.from_file(OURS["v1"].path, "v3")
    with refused(TokenizerError, field="version"):
        Tokenizer.from_file(OURS["v1"].path, "v9")
