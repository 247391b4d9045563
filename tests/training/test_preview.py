"""The preview: which spans of a document have which style, on a terminal and without one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tokenizer_files import byte_level_folder

from mistral_7b.text.tokenizer import Tokenizer
from mistral_7b.training.encoding import Encoded, Encoder, Prompt
from mistral_7b.training.forms import Chat, Judged, Preference
from mistral_7b.training.preview import CONTROL, OTHER, TRAINED, preview, styled

USER = {"role": "user", "content": "Hi </s>"}


def chat(text: str) -> Chat:
    return Chat([USER, {"role": "assistant", "content": text}], None, (1,))


def spans(document: Encoded, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    text = styled(document, tokenizer, color=True)
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans]


def plain(items: list[Any], tokenizer: Tokenizer, n: int = 9, **options: Any) -> str:
    out = io.StringIO()
    preview(items, tokenizer, n, Console(file=out, width=200, **options))
    return out.getvalue()


@pytest.mark.parametrize("name", ["v1", "v3", "chatml"])
def test_trap_25_colors_by_tokenizer(name: str, tmp_path: Path) -> None:
    t = (
        Tokenizer.from_pretrained(byte_level_folder(tmp_path), "chatml")
        if name == "chatml"
        else getattr(Tokenizer, name)()
    )
    (document,) = Encoder(t, 99).encode(chat("Hello"))
    control, end = f"{OTHER} {CONTROL}", f"{TRAINED} {CONTROL}"
    wanted = {
        "v1": [("<s>", control), (" [INST] Hi </s> [/INST]", OTHER), (" Hello", TRAINED), ("</s>", end)],
        "v3": [
            ("<s>", control), ("[INST]", control), (" Hi </s>", OTHER), ("[/INST]", control), (" Hello", TRAINED),
            ("</s>", end),
        ],
        "chatml": [
            ("<|im_start|>", control), ("user\nHi </s>", OTHER), ("<|im_end|>", control), ("\n", OTHER),
            ("<|im_start|>", control), ("assistant\n", OTHER), ("Hello", TRAINED), ("<|im_end|>", end),
        ],
    }  # fmt: skip
    assert isinstance(document, Encoded)
    assert spans(document, t) == wanted[name]


def test_without_a_terminal_marks_stand_for_colors() -> None:
    t = Tokenizer.v3()
    pair, thumb = (
        Encoder(t, 99).encode(sample)[0] for sample in (Preference(chat("a"), chat("b")), Judged(chat("c"), False))
    )
    out = plain([pair, thumb, Prompt(np.asarray(t.encode_chat([USER]), np.int32), {})], t)
    head = "⟨<s>⟩⟨[INST]⟩ Hi </s>⟨[/INST]⟩"
    shown = [line for line in out.splitlines() if line.startswith("⟨")]
    assert shown == [f"{head}« a⟨</s>⟩»", f"{head}« b⟨</s>⟩»", f"{head}« c⟨</s>⟩»", head]
    assert all(word in out for word in ("chosen", "rejected", "bad", "prompt"))
    assert "\x1b" not in out


def test_a_terminal_has_colors_and_no_marks() -> None:
    t = Tokenizer.v3()
    items = Encoder(t, 99).encode(chat("Hello"))
    out = plain(items, t, force_terminal=True, color_system="standard")
    assert "\x1b[1;32m Hello" in out
    assert "«" not in out


def test_text_of_data_steers_no_terminal_and_n_limits() -> None:
    t = Tokenizer.v3()
    items = [item for text in ("\x1b[2Ja\x9bb\r", "日本", "c") for item in Encoder(t, 99).encode(chat(text))]
    out = plain(items, t, 2)
    assert "\\x1b[2Ja\\x9bb\\x0d" in out
    assert "日本" in out
    assert "« c" not in out
