"""`mistral-7b quantize`: write a quantized checkpoint and measure its distance."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from ..kernels import threads
from .inputs import UsageError, read_flags, read_text

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint.quantized import Record
    from ..text.tokenizer import Tokenizer

Folder = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OUT")]
Source = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="IN")]

ROW = 512  # tokens per row of the text


@dataclasses.dataclass(frozen=True)
class Quantize:
    """Quantize a checkpoint's weights, and measure on a text the distance from the original.

    The folder can be used wherever a MODEL is named. It is created completely or not at all. The same
    command continues after an interruption.
    """

    source: Source
    """A folder, a file, a hub id, "starter" or "demo"."""
    out: Folder
    """The output folder."""
    scheme: Literal["int8", "q6_k", "q4_k_m", "int4"] = "int4"
    """Bits a weight: int8 8.5, nearly lossless; q6_k 6.6; q4_k_m 4.8; int4 4.5."""
    text: str = ""
    """Text file to measure the distance on; default: this package's source."""
    tokens: int = 4096
    """Maximum number of tokens of that text."""
    calibrate: bool = False
    """Round with error feedback on a text, which about halves the loss of int4."""
    calibration_text: str = ""
    """That text, which should resemble the model's inputs: a text file, or JSONL with "text";
    default: the topics of Python's help."""
    calibration_tokens: int = 4096
    """Maximum number of calibration tokens."""
    tokenizer: str | None = None
    """A tokenizer file, or a folder or model with one; None: that of the model."""
    threads: int | None = None
    """CPU threads, at most 4 per CPU; None: PyTorch's default, within the CPU quota."""


def run(argv: list[str]) -> int:
    args = read_flags(Quantize, "quantize", argv)
    for flag, value, least in (
        ("tokens", args.tokens, 2),
        ("calibration-tokens", args.calibration_tokens, 2),
    ):
        if value < least:
            raise UsageError(f"--{flag} must be at least {least}, not {value}", field=f"--{flag}")
    if args.calibration_text and not args.calibrate:
        raise UsageError("--calibration-text: only with --calibrate", field="--calibration-text")
    threads.check(args.threads, "--threads")
    from ..checkpoint import hub

    for source in filter(None, (args.source, args.tokenizer)):
        hub.find(source)  # before PyTorch is imported
    name, text = (args.text, read_text(args.text)) if args.text else own_source()
    calibration_name, calibration_texts = calibration(args) if args.calibrate else ("", None)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("opening", total=None)

        def advance(done: int, total: int, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        def resumed(done: int, layers: int) -> None:
            bar.console.print(f"continuing after {done} of {layers} layers of an interrupted run")

        from ..checkpoint import quantize, read_args
        from ..quantization import Scheme
        from ..text.tokenizer import Tokenizer

        threads.use(args.threads)
        folder = hub.resolve(args.source)
        longest = min(ROW, read_args(folder)[0].max_seq_len)
        tokenizer = Tokenizer.from_pretrained(args.tokenizer or folder)
        tokens = rows(tokenizer, text, args.tokens, longest)
        scheme = Scheme(args.scheme)
        guide = None
        if calibration_texts is not None:
            guide = documents(tokenizer, calibration_texts, args.calibration_tokens, longest)
        try:
            record = quantize(
                folder, args.out, scheme, tokens, name, advance,
                calibration_tokens=guide, calibration_text=calibration_name, resumed=resumed,
            )  # fmt: skip
        except KeyboardInterrupt:
            bar.stop()
            print("interrupted: the same command continues after the last complete layer", file=sys.stderr)
            raise
    print(f"{args.source} is written to {args.out}: {summary(record)}", file=sys.stderr)
    return 0


def own_source() -> tuple[str, str]:
    """Return name and content of the default text: the modules at the root of this package."""
    root = pathlib.Path(__file__).parent.parent
    return "the source of mistral_7b", "".join(f.read_text(encoding="utf-8") for f in sorted(root.glob("*.py")))


def calibration(args: Quantize) -> tuple[str, list[str]]:
    """Return name and content of the texts to calibrate on."""
    if args.calibration_text:
        return args.calibration_text, texts(args.calibration_text, read_text(args.calibration_text))
    from ..text.default_text import default_text

    name, text = default_text()
    return name, [text]


def rows(tokenizer: Tokenizer, text: str, most: int, length: int) -> Tensor:
    """Return at most `most` tokens of a text as rows (R, T <= length), each starting with BOS."""
    import torch

    ids = tokenizer.encode(text, bos=False)[:most]
    width = min(length - 1, len(ids))
    if width < 1:
        raise UsageError("the text for the distance is empty: there is nothing to measure on")
    whole = torch.tensor(ids[: len(ids) // width * width]).view(-1, width)
    return torch.nn.functional.pad(whole, (1, 0), value=tokenizer.start_id)


def texts(name: str, content: str) -> list[str]:
    """Return the texts of a JSONL file (detected by its first line), or the whole file as one."""
    lines = [(n, line) for n, line in enumerate(content.split("\n"), 1) if line.strip()]
    found = [content]
    if lines and _text_of(lines[0][1]) is not None:
        found = []
        for n, line in lines:
            if (text := _text_of(line)) is None:
                raise UsageError(
                    'not a JSON object with a "text", as the first line is', place=f"{name}, line {n}"
                )
            found.append(text)
    nonempty = [text for text in found if text.strip()]
    if not nonempty:
        raise UsageError("the text to calibrate on is empty", place=name)
    return nonempty


def _text_of(line: str) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    text = entry.get("text") if isinstance(entry, dict) else None
    return text if isinstance(text, str) else None


def documents(tokenizer: Tokenizer, texts: list[str], most: int, length: int) -> list[list[int]]:
    """Return at most `most` tokens as rows of at most `length`, each with a BOS that counts.

    Longer texts are sampled: rows are taken at equal distances.
    """
    encoded = [tokenizer.encode(text, bos=False) for text in texts]
    rows = [
        [tokenizer.start_id, *ids[start : start + length - 1]]
        for ids in encoded
        for start in range(0, len(ids), length - 1)
    ]
    share = min(1.0, most / max(1, sum(map(len, rows))))
    out: list[list[int]] = []
    passed = taken = 0
    for row in rows:
        if taken <= passed * share and len(part := row[: most - taken]) > 1:
            out.append(part)
            taken += len(part)
        passed += len(row)
    return out


def summary(record: Record) -> str:
    """Return one line on a quantized checkpoint and its loss."""
    d = record.distance
    increase = d["perplexity"] / d["perplexity_original"] - 1
    calibration = record.calibration
    method = "rounded to nearest"
    if calibration:
        method = f"calibrated on {calibration['tokens']:,} tokens of {calibration['text']}"
    return (
        f"{record.scheme}, {method}, {record.nbytes / 1e9:.2f} GB. On {d['tokens']:,} tokens of {d['text']}: KL "
        f"{d['kl']:.4f}, top-1 agreement {d['top1_agreement']:.1%}, perplexity {d['perplexity_original']:.3f} -> "
        f"{d['perplexity']:.3f} ({increase:+.2%})"
    )
