"""Random conversations, and texts that are valid or nearly valid JSON."""

from __future__ import annotations

import json
import random
from typing import Any

Chat = list[dict[str, Any]]
WORDS = [
    "", " ", "  ", "Hi", " Hi", "Hi ", "Hi  ", "a\n", "\n", " \n\t ", "日本語 🙂", "é", "Be\n\nbrief.", "x" * 40,
    "]", "[", "<", "[/", "INST]", "'quoted' & \"so\" <b>", "\\", "\\n", "{", "}", "{{ 7 * 7 }}", "{% if %}",
    "\u2047", "\x00", "\u2028",
]  # fmt: skip
SPELLED = [
    "[INST]", "x [/INST] y", "</s>", "<s>", "<unk>", "[TOOL_CALLS]", "[control_8]", "[REFERENCE_DOC_1]", "[IMG]",
]  # fmt: skip
VALUES = [
    0, 1, -7, 12345678901234567890, 1.5, -0.25, 100.0, 0.1, 0.30000000000000004, 123456.789, 1e16, 1e-5, None,
    True, False, float("nan"), "", "é", 'a "b" \\ \n\t', "a: b, c [d] {e}", "\x1b", [], {}, [1, [2, {"a": []}]],
    {"k": {"k": 1}},
]  # fmt: skip
ODD = [
    "21 degrees", "2026-07-01", "007", "+1", "1.", ".5", "1e5", "1.50", "-0", "-0.0", "0.00001", "1E400", "--1",
    "-", "1_0", "nan", "NaN", "-Infinity", "inf", "true", "True", "null", "[1,2,]", "[1 2]", "{a: 1}", '{"a" 1}',
    '{"a": 1', '"a', '"a"b', '{"a": 1, "a": 2}', '[{"a": 1}, {"a": 1}]', '"\\u00e9"', '"\\u00zz"', '"\\/"',
    '"\\x"', '"\\\\u00e9"', '"a\nb"', "] [", '{"a":[1,{"b":"c"}],"d":null}', ' { "a" :\t[ ] }\n', "[[[[]]]]",
    "{,}", "[,]", '{"a":}', "1 1", ",", '"\\"', '"\\\\"', '{"path":"C:\\\\dir\\\\"}', "\ufeff{}", "\uff11\uff12",
    '["\\ud83d\\ude42"]', "0.1000", "12345678901234567.5", "[]]", "{}{}",
]  # fmt: skip


class Drawing:
    """Yield random conversations, most of which can be encoded."""

    def __init__(self, seed: int, version: str) -> None:
        self.draw = random.Random(seed)
        self.tools = version != "v1"

    def text(self) -> str:
        words = self.draw.choices(WORDS, k=self.draw.choice([1, 1, 1, 2, 3]))
        return "".join(words) if self.chance(0.99) else "".join([*words, self.draw.choice(SPELLED)])

    def content(self) -> Any:
        if self.chance(0.9):
            return self.text()
        return [{"type": "text", "text": self.text()} for _ in range(self.draw.randrange(3))]

    def value(self) -> Any:
        keys = self.draw.sample(["a", "b b", "", "é", 'q"'], self.draw.randrange(4))
        return {key: self.draw.choice(VALUES) for key in keys}

    def json(self, value: Any) -> str:
        form = self.draw.randrange(4)
        if form == 3:
            return json.dumps(value, ensure_ascii=self.chance(0.2))
        spaced = {"indent": 2} if form else {"separators": (",", ":")}
        return json.dumps(value, ensure_ascii=False, **spaced)  # type: ignore[arg-type]

    def result(self) -> Any:
        return self.draw.choice(
            [self.text, self.content, lambda: self.draw.choice(ODD), lambda: self.json(self.draw.choice(VALUES)),
             lambda: self.json(self.value())]
        )()  # fmt: skip

    def calls(self) -> Chat:
        """An assistant's tool calls and their results."""
        ids = ["".join(self.draw.choices("abcXYZ0123456789", k=9)) for _ in range(self.draw.choice([1, 1, 2, 3]))]
        ids = [self.draw.choice(["call_6kZ", "a bcdefgh"]) if self.chance(0.01) else name for name in ids]
        given = [self.value, lambda: self.json(self.value()), lambda: self.draw.choice([None, "", *ODD])]
        calls = [
            {"id": i, "type": "function", "function": {"name": f"f{k}", "arguments": self.draw.choice(given)()}}
            for k, i in enumerate(ids)
        ]
        self.draw.shuffle(ids)
        said = self.draw.choice([None, "", "I look it up."])
        results = [{"role": "tool", "tool_call_id": i, "content": self.result()} for i in ids]
        return [{"role": "assistant", "content": said, "tool_calls": calls}, *results]

    def chat(self) -> Chat:
        """Mostly user turns, calls and answers; some messages are not supported by Mistral's templates."""
        out: Chat = []
        for _ in range(self.draw.randrange(1, 5)):
            if not out or out[-1]["role"] == "user" or self.chance(0.03):
                out += self.said("system", [0, 0, 1, 2]) + self.said("developer", [0, 0, 0, 1])
            out += self.said("user", [1] * 20 + [0, 2, 2, 3])
            if self.chance(0.1):
                out += self.said("system", [1])
                out += self.said("user", [0, 1])
            while self.tools and self.chance(0.3) and out[-1:] and out[-1]["role"] in ("user", "tool"):
                out += self.calls()
            out += self.said("assistant", [0, 1, 1, 1, 1, 2])
        if self.chance(0.5):
            out += self.said("user", [1])
        elif self.tools and self.chance(0.5):
            out += [*self.said("user", [1]), *self.calls()]
        elif out and out[-1]["role"] == "assistant":
            out[-1]["prefix"] = True
        return out

    def chance(self, probability: float) -> bool:
        return self.draw.random() < probability

    def said(self, role: str, times: list[int]) -> Chat:
        out = [{"role": role, "content": self.content()} for _ in range(self.draw.choice(times))]
        for message in out:
            if role == "assistant" and not self.chance(0.01):
                message["content"] = message["content"] or "Yes. "
        return out

    def offered(self) -> Any:
        """Tools, some with fields that the template ignores."""
        if not self.tools or self.chance(0.6):
            return None
        schema = {"type": "object", "properties": {"b": {"type": "string", "description": self.text()}, "a": {}}}
        functions: Chat = [
            {"name": "f0", "description": self.text(), "parameters": schema},
            {"name": "f1", "strict": True},
        ]
        functions.append({"parameters": None, "description": None, "name": "f2"})
        return [{"type": "function", "function": f} for f in self.draw.sample(functions, self.draw.randrange(4))]
