"""`mistral-7b explain`: a picture of a model's inside, as a page or a PNG."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .generate import DEMO_PROMPT, read_prompt
from .inputs import ModelName, ModelOptions, UsageError, busy, read_flags

if TYPE_CHECKING:
    from ..interpret.explain import Picture
    from ..model import Mistral7B
    from ..text.tokenizer import Tokenizer

What = Literal["attention", "probabilities", "lens", "attribution", "cache", "time"]
OWN = {"layers": ("attention", "lens"), "target": ("attribution",), "max_tokens": ("cache",)}  # flag -> pictures


@dataclasses.dataclass(frozen=True)
class Explain(ModelOptions):
    """Draw what happens inside a model as it reads a prompt. The prompt is the second argument, or comes from a
    flag, a file or a pipe; the bundled model has a default one."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PROMPT]")] = ""
    """Text to explain."""
    prompt: str = ""
    """Text to explain. A prompt that begins with a dash is written --prompt="-x"."""
    prompt_file: str = ""
    """File with the prompt; - is standard input."""
    what: What = "attention"
    """attention: which tokens each head reads.
    probabilities: each token's, with alternatives.
    lens: what each layer would predict.
    attribution: how much each token contributes to the next one.
    cache: KV pages and a ring, step by step.
    time: the operators of a decode step beside their roofline."""
    output: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE.html|FILE.png")] = ""
    """The file to write; None: a page named after the picture. A PNG needs matplotlib."""
    layers: tuple[int, ...] = ()
    """Layers of attention and lens, from 0; none: all. Fewer leave more room for the weights of each."""
    target: str = ""
    """The token whose log-probability is attributed; none: the most probable next one."""
    max_tokens: int = 32
    """Tokens that each request of the cache's trace generates."""


def run(argv: list[str]) -> int:
    args = read_flags(Explain, "explain", argv)
    usual = Explain()
    for name, pictures in OWN.items():
        if getattr(args, name) != getattr(usual, name) and args.what not in pictures:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} belongs to --what {' and '.join(pictures)}", field=flag)
    target = pathlib.Path(args.output or f"{args.what}.html")
    if target.suffix not in (".html", ".png"):
        raise UsageError("a picture is an .html or a .png file", field="--output", place=target)
    args.check_paths(args.model)
    prompt = read_prompt(args) or DEMO_PROMPT
    model, tokenizer = args.open(args.model)
    with busy(f"drawing {args.what}"):
        picture = draw(args, model, tokenizer, prompt)
        picture.save(target)
    print(f"{target}: {picture.title}", file=sys.stderr)
    return 0


def draw(args: Explain, model: Mistral7B, tokenizer: Tokenizer, prompt: str) -> Picture:
    """The picture of the flags."""
    from ..interpret import explain

    layers = list(args.layers) or None
    if args.what == "attention":
        return explain.attention_maps(model, tokenizer, prompt, layers=layers)
    if args.what == "probabilities":
        return explain.token_probabilities(model, tokenizer, prompt)
    if args.what == "lens":
        return explain.logit_lens(model, tokenizer, prompt, layers=layers)
    if args.what == "attribution":
        return explain.attributions(model, tokenizer, prompt, target=args.target or None)
    if args.what == "cache":
        return explain.cache_trace(model, tokenizer, prompt, max_tokens=args.max_tokens)
    return explain.step_times(model, tokenizer, prompt, **ceilings(args, model))


def ceilings(args: Explain, model: Mistral7B) -> dict[str, Any]:
    """This machine's bandwidth and its peak for the model's products. Takes some seconds."""
    from ..bench.roofline import Ceilings, measure
    from ..quantization.linear import BlockLinear

    found: Any = dict(measure())
    measured = Ceilings(**found)
    if isinstance(model.get_submodule("layers.0.feed_forward.w2"), BlockLinear):
        peak = measured.peak("int8")
    else:
        peak = measured.fp32 if args.dtype == "float32" else measured.peak("bf16")
    return {"bandwidth": measured.read_bandwidth, "peak": peak}
