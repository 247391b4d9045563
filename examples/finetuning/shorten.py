"""DPO makes the starter's answers short, and leaves what it knows of other text as it was.

    python examples/finetuning/shorten.py [--out FOLDER] [--json FILE] [--curve FILE.png]

Pairs are made of its own answers (questions.py). Questions of other forms about other things are answered greedily
before and after. The bound on what may be forgotten, KL_BOUND, is checked: the command fails above it.
"""

from __future__ import annotations

import time
from pathlib import Path

import tyro
from questions import FORMS, HELD_OUT_FORMS, HELD_OUT_THINGS, THINGS, figures, pair, questions
from shown import Messages, answers, draw, record, write_record, write_rows

from mistral_7b import LLM, FinetuneArgs, finetune

KL_BOUND = 0.05  # nats per token of neutral text, from the base
REJECTED = 96  # tokens of the answers that pairs are made of
LONGEST = 256  # tokens of the answers that are measured
LOOKED_AT = 6  # held-out pairs that are evaluated during the run


def prompts(asked: list[str]) -> list[Messages]:
    """Return a conversation for each question."""
    return [[{"role": "user", "content": question}] for question in asked]


def main(
    out: Path = Path("runs/shorten"),
    model: str = "starter",
    steps: int = 12,
    lr: float = 2e-4,
    things: int = 12,
    held_things: int = 15,
    json: Path | None = None,
    curve: Path | None = None,
) -> None:
    """Train for short answers, and measure length and forgetting.

    Args:
        out: Folder of the data and the run.
        model: The base model.
        steps: Updates of 512 tokens, which are two or three pairs.
        lr: Peak learning rate.
        things: Things that are asked about in training, at most 20.
        held_things: Things that are asked about afterwards, at most 15.
        json: File to write the record to.
        curve: File to draw the curve to.
    """
    asked, held = questions(FORMS, THINGS[:things]), questions(HELD_OUT_FORMS, HELD_OUT_THINGS[:held_things])
    base = LLM(model)
    own = answers(base, prompts(asked), REJECTED)
    before = answers(base, prompts(held), LONGEST)
    del base
    pairs = [row for question, made in zip(asked, own, strict=True) if (row := pair(question, made.text))]
    other = [row for question, made in zip(held, before, strict=True) if (row := pair(question, made.text))]
    args = FinetuneArgs(
        model=model, method="dpo", data=(write_rows(out / "pairs.jsonl", pairs),), out=str(out / "run"),
        held_out=write_rows(out / "held_out.jsonl", other[:LOOKED_AT]), eval_every=max(1, steps // 4),
        steps=steps, lr=lr, seq_len=512, rows=1, accumulate=1, warmup=4, max_tokens=LONGEST,
    )  # fmt: skip
    began = time.perf_counter()
    last = finetune(args=args)
    seconds = time.perf_counter() - began
    short = LLM(model, adapters={"short": str(out / "run" / "adapter")})
    after = answers(short, prompts(held), LONGEST, "short")
    made = record(args, seconds, {
        "pairs": len(pairs),
        "kl_bound": KL_BOUND,
        "kl_from_base": last["kl_from_base"],
        "held_out": {"before": figures(before, held), "after": figures(after, held)},
        "samples": [
            {"question": question, "before": old.text, "after": new.text}
            for question, old, new in list(zip(held, before, after, strict=True))[:4]
        ],
    })  # fmt: skip
    write_record(json, made)
    if curve is not None:
        left = {"reward_chosen": "reward of chosen", "reward_rejected": "of rejected"}
        draw(curve, made["log"], left, {"kl_from_base": "KL from the base"}, "DPO on short and long answers")
    if not last["kl_from_base"] <= KL_BOUND:
        raise SystemExit(f"the KL from the base is above {KL_BOUND} nats per token")


if __name__ == "__main__":
    tyro.cli(main)
