"""A small model trained to call a tool and to use its result."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.nn.functional as F
from tiny import tiny_args

from mistral_7b.cache import Stateless
from mistral_7b.model import Mistral7B
from mistral_7b.text.tokenizer import Tokenizer

WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {
        "type": "object", "required": ["city"], "additionalProperties": False,
        "properties": {"city": {"type": "string"}}}},
}  # fmt: skip
CITIES = ("Rome", "Oslo")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def calls_of(*cities: str) -> str:
    return json.dumps([{"name": "weather", "arguments": {"city": city}} for city in cities])


def turns() -> list[tuple[list[dict[str, Any]], str, bool]]:
    """Conversations, each with its response and whether that is a tool call."""
    out: list[tuple[list[dict[str, Any]], str, bool]] = [([user("Hello")], "Hi there!", False)]
    for asked in (("Rome",), ("Oslo",), CITIES):
        talk = [user(f"Weather in {' and '.join(asked)}?")]
        out.append((talk, calls_of(*asked), True))
        made = [
            {"id": f"call{city:5}".replace(" ", "0"), "type": "function",
             "function": {"name": "weather", "arguments": json.dumps({"city": city})}}
            for city in asked
        ]  # fmt: skip
        results = [{"role": "tool", "tool_call_id": c["id"], "content": "sunny"} for c in made]
        said = f"It is sunny in {' and '.join(asked)}."
        out.append(([*talk, {"role": "assistant", "tool_calls": made}, *results], said, False))
    return out


def trained() -> Mistral7B:
    """Train a model on the turns above until it reproduces them; takes a few seconds."""
    tokenizer = Tokenizer.v3()
    torch.manual_seed(0)
    args = tiny_args(
        dim=40, head_dim=16, hidden_dim=96, n_heads=4, n_kv_heads=2, vocab_size=32768, sliding_window=None,
        max_seq_len=1024,
    )  # fmt: skip
    model = Mistral7B(args, dtype=torch.float32, device="cpu")
    for name, p in model.named_parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3 if name.startswith("tok_") else p.shape[1] ** -0.5)
    tokens, owners, answers = [], [], []
    for turn, (talk, said, call) in enumerate(turns()):
        prompt = tokenizer.encode_chat(talk, [WEATHER])
        answer = [*([5] if call else []), *tokenizer.encode(said, bos=False), tokenizer.eos_id]
        tokens += prompt + answer
        owners += [turn] * len(prompt + answer)
        answers += range(len(tokens) - len(answer), len(tokens))
    ids, turn_of, places = torch.tensor([tokens]), torch.tensor([owners]), torch.tensor(answers)
    used, targets = ids[0, places].unique(return_inverse=True)  # the logits of all other tokens stay 0
    words = model.output.weight.detach()[used].clone().requires_grad_()
    model.output.weight.data.zero_()
    learning = [words, *model.layers.parameters(), *model.norm.parameters()]
    optimizer = torch.optim.Adam(learning, lr=5e-3)
    for _ in range(200):
        hidden = model.hidden(ids, Stateless(None), turn_of)[0]
        logits = F.pad(hidden[places - 1] @ words.T, (0, 1))
        loss = F.cross_entropy(logits.float(), targets)
        if loss < 0.01:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05, f"it did not learn its turns: {loss}"
    model.output.weight.data[used] = words.detach()
    return model.requires_grad_(False)
