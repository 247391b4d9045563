"""The progress line: what it shows follows what a run measures."""

from __future__ import annotations

import io

from mistral_7b.training.finetune_args import FinetuneArgs
from mistral_7b.training.progress import ProgressLine


def test_the_loss_shown_is_a_mean_of_those_seen_without_weight_on_the_first() -> None:
    file = io.StringIO()
    line = ProgressLine(FinetuneArgs(steps=4, warmup=1), file)
    for step, loss in enumerate((4.0, 2.0, 2.0, 1.0), 1):
        line({"step": step, "loss": loss, "tokens_per_s": 100 * step, "seconds": 2.0})
    shown = file.getvalue().splitlines()
    assert [text.split("loss ")[1].split()[0] for text in shown] == ["4.000", "3.000", "2.667", "2.250"]
    assert "250 tokens/s" in shown[-1]
    assert "0:00:06 left" in shown[0]
