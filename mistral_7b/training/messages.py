"""The messages of a row of data: OpenAI's, ShareGPT's, and which of them are trained.

What is checked here holds for every chat template: types, roles, weights, tool calls and their results. The rest
is checked by the template that encodes the conversation.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..errors import TrainingError
from ..text.conversation import REASONING

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = ("role", "content", "weight", "tool_calls", "tool_call_id", "name", *REASONING)
# ShareGPT's names of who wrote a turn.
WRITERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "assistant": "assistant", "model": "assistant", "bot": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip


def check_spelling(row: Mapping[str, Any], known: Collection[str], place: str = "") -> None:
    """Raise TrainingError for a key that is almost, but not quite, a known one that is missing.

    `place` names the object in the row that has the keys.
    """
    missing = [key for key in known if key not in row]
    for key in row:
        if key not in known and (close := difflib.get_close_matches(str(key), missing, 1, 0.8)):
            field = f"{place}.{key}" if place else str(key)
            raise TrainingError(f"{field} is an unknown key: is it {close[0]!r}?", field=field)


def read_messages(value: Any, field: str) -> tuple[list[Message], set[int]]:
    """Return checked messages without null fields and weights, and the indices of those of weight 0.

    `field` names them in errors. TrainingError for what no template can take.
    """
    if not isinstance(value, list) or not value:
        raise TrainingError(f"{field} must be a list of at least one message", field=field)
    messages: list[Message] = []
    muted: set[int] = set()
    for i, given in enumerate(value):
        name = f"{field}[{i}]"
        if not isinstance(given, dict):
            raise TrainingError(f"{name} must be an object with a role, not {given!r:.60}", field=name)
        message = {key: v for key, v in given.items() if v is not None}
        check_spelling(message, KEYS, name)
        role = message.get("role")
        if role not in ROLES:
            raise TrainingError(f"{name}.role must be one of {', '.join(ROLES)}, not {role!r:.60}", field=name)
        if "prefix" in message:
            raise TrainingError(f"{name}: a message of data is whole, and no prefix", field=f"{name}.prefix")
        weight = message.pop("weight", None)
        if weight is not None and (role != "assistant" or weight not in (0, 1)):
            said = "must be 0 or 1" if role == "assistant" else "is of the assistant's messages only"
            raise TrainingError(f"{name}.weight {said}, not {weight!r:.60}", field=f"{name}.weight")
        if weight == 0:
            muted.add(i)
        messages.append(message)
    _check_calls(messages, field)
    return messages, muted


def answers_of(messages: Sequence[Message], muted: Collection[int]) -> tuple[int, ...]:
    """Return the indices of the assistant's messages that are not muted, each checked to be an answer.

    TrainingError if there are none, for an empty one, for one that answers nothing, and for a conversation that
    goes on behind its last answer.
    """
    answers = tuple(i for i, m in enumerate(messages) if m["role"] == "assistant" and i not in muted)
    if not any(m["role"] == "assistant" for m in messages):
        raise TrainingError("has no message of role 'assistant': there is nothing to train", field="messages")
    if messages[-1]["role"] != "assistant":
        raise TrainingError(
            f"ends with a message of role {messages[-1]['role']!r}, which nothing answers", field="messages"
        )
    if not answers:
        raise TrainingError("every message of role 'assistant' has weight 0", field="messages")
    for i in answers:
        if i == 0 or messages[i - 1]["role"] not in ("user", "tool"):
            before = f"a message of role {messages[i - 1]['role']!r}" if i else "nothing"
            raise TrainingError(
                f"messages[{i}], of role 'assistant', follows {before}, and no user or tool: mute it with "
                '"weight": 0',
                field=f"messages[{i}].role",
            )
        if not messages[i].get("tool_calls") and not _has_text(messages[i].get("content")):
            raise TrainingError(f"messages[{i}], of role 'assistant', is empty", field=f"messages[{i}].content")
    return answers


def _has_text(content: Any) -> bool:
    if isinstance(content, list):
        return any(isinstance(part, dict) and _has_text(part.get("text")) for part in content)
    return bool(content.strip()) if isinstance(content, str) else content is not None


def _check_calls(messages: Sequence[Message], field: str) -> None:
    """Raise TrainingError for a call that cannot be read, and for a result of no call."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        name = f"{field}[{i}]"
        calls = message.get("tool_calls", [])
        if not isinstance(calls, list) or (calls and message["role"] != "assistant"):
            raise TrainingError(f"{name}.tool_calls must be a list, of the assistant", field=f"{name}.tool_calls")
        for k, call in enumerate(calls):
            called.add(_check_call(call, f"{name}.tool_calls[{k}]"))
        result = message.get("tool_call_id")
        if result is not None and result not in called:
            raise TrainingError(
                f"{name}.tool_call_id {result!r:.60} is the id of no tool call before it",
                field=f"{name}.tool_call_id",
            )


def _check_call(call: Any, name: str) -> str:
    """Return the id of a call, "" if it has none. TrainingError unless it names a function and its arguments."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise TrainingError(f"{name} must be an object with a function that has a name", field=name)
    arguments = function.get("arguments")
    try:
        value = json.loads(arguments) if isinstance(arguments, str) and arguments.strip() else arguments or {}
    except ValueError as e:
        raise TrainingError(f"{name}.function.arguments are not JSON: {e}", field=name) from None
    if not isinstance(value, dict):
        raise TrainingError(f"{name}.function.arguments must be an object, not {value!r:.60}", field=name)
    return str(call.get("id") or "")


def read_tools(row: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a row in OpenAI's form, None without any. They may be JSON in a text."""
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as e:
            raise TrainingError(f"tools are not JSON: {e}", field="tools") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise TrainingError("tools must be a list of objects", field="tools")
    wrapped = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    for i, tool in enumerate(wrapped):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise TrainingError(f"tools[{i}] must have a function with a name", field=f"tools[{i}]")
    return wrapped


def sharegpt_messages(value: Any) -> list[Message]:
    """Return ShareGPT's turns as messages of the OpenAI API. TrainingError for a writer that is not known."""
    if not isinstance(value, list) or not value:
        raise TrainingError("conversations must be a list of at least one turn", field="conversations")
    messages: list[Message] = []
    for i, turn in enumerate(value):
        name = f"conversations[{i}]"
        if not isinstance(turn, dict):
            raise TrainingError(f"{name} must be an object with from and value, not {turn!r:.60}", field=name)
        check_spelling(turn, ("from", "value", "weight"), name)
        writer, said = turn.get("from"), turn.get("value")
        if not isinstance(writer, str) or writer not in WRITERS:
            raise TrainingError(f"{name}.from must be one of {', '.join(WRITERS)}, not {writer!r:.60}", field=name)
        if not isinstance(said, str):
            raise TrainingError(f"{name}.value must be a text, not {said!r:.60}", field=name)
        message: Message = {"role": WRITERS[writer], "content": said, "weight": turn.get("weight")}
        if writer == "function_call":
            message |= {"content": None, "tool_calls": _calls_in(said, name)}
        messages.append(message)
    return messages


def _calls_in(text: str, name: str) -> list[Any]:
    """Return the calls that a turn of a "function_call" is: JSON of a name and arguments, or a list of such."""
    try:
        calls = json.loads(text)
    except ValueError as e:
        raise TrainingError(f"{name}.value, a function call, is not JSON: {e}", field=name) from None
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def judged_messages(prompt: Any, answer: Any, field: str) -> tuple[list[Message], int]:
    """Return a conversation that ends with an answer, and the index at which the answer begins.

    `answer` is a text, one message, or messages: those behind the prompt, or, if the first is not the assistant's,
    the whole conversation, whose last message is the answer.
    """
    if isinstance(answer, str):
        answer = [{"role": "assistant", "content": answer}]
    after, _ = read_messages([answer] if isinstance(answer, dict) else answer, field)
    if after[0]["role"] != "assistant":
        return after, len(after) - 1
    if prompt is None:
        raise TrainingError(f"{field} begins with the assistant's answer, and there is no prompt", field="prompt")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages, _ = read_messages([*read_messages(before, "prompt")[0], *after], field)
    return messages, len(before)
