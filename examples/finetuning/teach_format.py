"""A LoRA teaches the starter a format that it cannot write: one strict line of JSON for an order in English.

    python examples/finetuning/teach_format.py [--out FOLDER] [--json FILE] [--curve FILE.png]

Held-out orders (orders.py) are answered greedily before and after. Before, the format is described in the prompt;
and once more with three examples in the conversation, because showing is what one would try before training.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import tyro
from orders import HELD_OUT, TRAIN, UNSEEN, orders, scores
from shown import Messages, answers, draw, record, write_record, write_rows

from mistral_7b import LLM, FinetuneArgs, finetune

LONGEST = 96  # tokens of an answer; the right ones have 30 to 40
LOOKED_AT = 16  # held-out orders that are evaluated during the run


def conversations(rows: list[dict[str, Any]], examples: list[dict[str, Any]]) -> list[Messages]:
    """Return the prompts of rows, each after the same answered examples."""
    shown = [message for row in examples for message in row["messages"]]
    return [[*shown, *row["messages"][:-1]] for row in rows]


def measured(llm: LLM, rows: list[dict[str, Any]], examples: list[dict[str, Any]], adapter: str | None) -> Any:
    """Return the scores of a model's answers to rows, the first answer, and up to three wrong ones."""
    texts = [made.text for made in answers(llm, conversations(rows, examples), LONGEST, adapter)]
    wrong = [
        [text, right]
        for row, text in zip(rows, texts, strict=True)
        if text != (right := row["messages"][-1]["content"])
    ]
    return {**scores(texts, rows), "first": texts[0], "wrong": wrong[:3]}


def main(
    out: Path = Path("runs/teach_format"),
    model: str = "starter",
    steps: int = 60,
    lr: float = 3e-4,
    train_rows: int = 400,
    held_rows: int = 40,
    json: Path | None = None,
    curve: Path | None = None,
) -> None:
    """Teach the format, and measure it before and after.

    Args:
        out: Folder of the data and the run.
        model: The base model.
        steps: Updates of up to 512 tokens, which are 4 orders.
        lr: Peak learning rate.
        train_rows: Orders to train on.
        held_rows: Held-out orders of known forms of sentence, and as many of unseen forms.
        json: File to write the record to.
        curve: File to draw the curve to.
    """
    train, known, unseen = (
        orders(TRAIN, train_rows, 1),
        orders(HELD_OUT, held_rows, 2),
        orders(UNSEEN, held_rows, 3),
    )
    args = FinetuneArgs(
        model=model, data=(write_rows(out / "train.jsonl", train),), out=str(out / "run"),
        held_out=write_rows(out / "held_out.jsonl", known[:LOOKED_AT]), eval_every=max(1, steps // 6),
        steps=steps, lr=lr, seq_len=512, rows=1, accumulate=1, warmup=5, max_tokens=LONGEST,
    )  # fmt: skip
    began = time.perf_counter()
    finetune(args=args)
    seconds = time.perf_counter() - began
    llm = LLM(model, adapters={"taught": str(out / "run" / "adapter")})
    made = record(args, seconds, {
        "held_out": {
            "before": measured(llm, known, [], None),
            "before_with_3_examples": measured(llm, known, train[:3], None),
            "after": measured(llm, known, [], "taught"),
        },
        "unseen_sentences": {
            "before": measured(llm, unseen, [], None),
            "before_with_3_examples": measured(llm, unseen, train[:3], None),
            "after": measured(llm, unseen, [], "taught"),
        },
    })  # fmt: skip
    write_record(json, made)
    if curve is not None:
        left = {"loss": "loss (nats per token)", "eval_loss": "held-out loss"}
        draw(curve, made["log"], left, {"kl_from_base": "KL from the base"}, "Teaching the starter a format")


if __name__ == "__main__":
    tyro.cli(main)
