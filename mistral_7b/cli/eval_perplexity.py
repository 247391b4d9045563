"""`mistral-7b eval perplexity`: perplexity of a text file with a sliding context."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from functools import partial

from .inputs import ModelName, ModelOptions, UsageError, read_flags


@dataclasses.dataclass(frozen=True)
class Perplexity(ModelOptions):
    """Measure the perplexity of a text file. With a sliding window, one pass over the text is exact."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    text: str = ""
    """UTF-8 text file of any size; it is read in blocks."""
    context: int | None = None
    """Tokens of a context, for a model without a window; None: the model's longest."""
    stride: int | None = None
    """Tokens by which the context moves; each token has at least context - stride - 1 before it. None: half."""
    state: str | None = None
    """File to which the run is saved every half minute; the same command continues from it after a kill."""
    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Perplexity, "eval perplexity", argv)
    if not args.text:
        raise UsageError("--text is missing", field="--text", hint="name a text file")
    path = pathlib.Path(args.text).expanduser()
    if not path.is_file():
        what = "is no regular file" if path.exists() else "there is no such file"
        raise UsageError(f"{path}: {what}", field="--text", hint="name a UTF-8 text file")
    if args.state and not pathlib.Path(args.state).expanduser().exists():
        from ..files import check_place

        check_place(args.state)
    model, tokenizer = args.open(args.model)
    from tqdm.auto import tqdm

    from ..evaluation import sliding_perplexity

    measure = partial(sliding_perplexity, model, tokenizer, path)
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        found = measure(
            context=args.context,
            stride=args.stride,
            state=args.state,
            progress=lambda read: bar.update(read - bar.n),
        )
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, **found.to_dict()}, indent=2))
    else:
        print(
            f"perplexity {found.perplexity:.4f}, {found.bits_per_byte:.4f} bits per byte, {found.tokens:,} tokens"
        )
    return 0
