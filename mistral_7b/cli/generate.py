"""`mistral-7b generate`: continue a text. Output streams to stdout, statistics go to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import tyro

from ..distributed import ranks
from ..sampling.params import SamplingParams
from .inputs import ModelName, TextOptions, UsageError, read_flags, read_text, sampling_of

if TYPE_CHECKING:
    from ..engine.speculation import Speculation, Tally
    from ..generate import TextPiece
    from ..model import Mistral7B
    from ..text.tokenizer import Tokenizer

PROMPT_LOOKUP = "prompt-lookup"
DEMO_PROMPT = "class TestParser(unittest.TestCase):\n"  # frequent in the bundled model's training data


class Prompted(Protocol):
    """The options of a command with a prompt."""

    @property
    def model(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def prompt_file(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Generate(TextOptions):
    """Continue a text. The prompt is the second argument, or comes from a flag, a file or a pipe; the bundled
    model has a default one."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[PROMPT]")] = ""
    """Text to continue."""
    prompt: str = ""
    """Text to continue. A prompt that begins with a dash is written --prompt="-x"."""
    prompt_file: str = ""
    """File with the prompt; - is standard input."""
    echo: Literal["auto", "always", "never"] = "auto"
    """Print the prompt before its continuation; auto: on a terminal, or with the default prompt."""
    json: bool = False
    """Print one JSON object at the end: text, token ids, log-probabilities, statistics."""
    speculate: Annotated[str, tyro.conf.arg(metavar="prompt-lookup|MODEL")] = ""
    """Speculative decoding: draft tokens from repetitions in the text, or with a smaller model of the same
    vocabulary."""
    max_draft: int | None = None
    """Maximum number of draft tokens per step; None: 10. The number adapts to how many are accepted."""
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.7, max_tokens=256)
    )
    """Sampling parameters. Without a flag, the model's own default (generation_config.json) precedes these."""


def run(argv: list[str]) -> int:
    args = read_flags(Generate, "generate", argv)
    params = args.constrained(args.sampling)
    scored = params.logprobs is not None or params.prompt_logprobs is not None
    if scored and not args.json:
        raise UsageError(
            "--logprobs and --prompt-logprobs are part of the JSON output", field="--logprobs", hint="add --json"
        )
    args.check_paths(args.model)
    prompt = ranks.first(lambda: read_prompt(args))  # a pipe has one reader
    echo = args.echo == "always" or (args.echo == "auto" and (sys.stdout.isatty() or not prompt))
    prompt = prompt or DEMO_PROMPT
    model, tokenizer, adapter = args.open_adapted(args.model, args.adapter)
    sampling = sampling_of(args, "generate", argv, model)
    params = dataclasses.replace(sampling, structured_outputs=params.structured_outputs)
    speculate = speculation(args)
    from ..sampling.sampler import draw_seed

    params = dataclasses.replace(params, seed=ranks.first(draw_seed) if params.seed is None else params.seed)
    ids = tokenizer.encode(prompt)
    generation = Generation(
        params.n, len(ids), params.n == 1 and not args.json, speculate.tally if speculate else None
    )
    if echo and not args.json:
        _show(prompt)
    options = {"speculate": speculate, "kv_dtype": args.kv_dtype, "adapter": adapter}
    if scored:
        results, code = score(model, ids, params, tokenizer, generation, **options), 0
    else:
        code = write(model, ids, params, tokenizer, generation, **options)
        results = {"outputs": generation.outputs}
    if args.json:
        inputs = {"model": args.model, "prompt": prompt, "prompt_token_ids": ids, "seed": params.seed}
        print(json.dumps({**inputs, **results, "stats": generation.stats()}))
    else:
        generation.show_rest()
        if code == 0:
            print(generation.summary(), file=sys.stderr)
    return code


def speculation(args: Generate) -> Speculation | None:
    """Return the speculation of the flags, with the draft model loaded; None without --speculate."""
    if not args.speculate:
        if args.max_draft is not None:
            raise UsageError("--max-draft needs --speculate", field="--max-draft")
        return None
    from ..engine.speculation import Speculation

    model = None if args.speculate == PROMPT_LOOKUP else args.open_model(args.speculate)
    return Speculation(model) if args.max_draft is None else Speculation(model, max_draft=args.max_draft)


def read_prompt(args: Prompted) -> str:
    """Return the prompt of the flag, the file or the pipe; "" selects the bundled model's default.

    Raises UsageError for two prompts, none, or one that is not UTF-8.
    """
    if (args.text or args.prompt) and args.prompt_file:
        raise UsageError("--prompt and --prompt-file exclude each other", field="--prompt")
    if args.text and args.prompt:
        raise UsageError("there are two prompts: the second argument and --prompt", field="--prompt")
    prompt = args.text or args.prompt
    if args.prompt_file:
        prompt = read_text(args.prompt_file)
        if not prompt:
            raise UsageError("is empty: there is nothing to continue", place=args.prompt_file)
    elif not prompt and not sys.stdin.isatty():
        prompt = read_text("-")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8 text", field="--prompt") from error
    if not prompt and args.model != "demo":
        raise UsageError("no prompt", hint="name it after the model, use --prompt-file FILE, or pipe a text")
    return prompt


class Generation:
    """The generated text and its statistics; printed while it streams if `live`."""

    def __init__(self, n: int, prompt_tokens: int, live: bool, tally: Tally | None = None) -> None:
        self.outputs: list[dict[str, Any]] = [
            {"index": i, "text": "", "token_ids": [], "finish_reason": "abort", "stop_reason": None}
            for i in range(n)
        ]
        self.prompt_tokens, self.live, self.tally = prompt_tokens, live, tally
        self.tokens = 0
        self.began = self.ended = time.perf_counter()
        self.first: float | None = None  # seconds until the first token

    def push(self, piece: TextPiece) -> None:
        """Append the next piece of one of the completions."""
        self.count(len(piece.token_ids))
        output = self.outputs[piece.index]
        output["text"] += piece.text
        output["token_ids"] += piece.token_ids
        if piece.finish_reason:
            output.update(finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
        if self.live:
            _show(piece.text)

    def count(self, tokens: int) -> None:
        """Count tokens that have just arrived."""
        self.ended = time.perf_counter()
        if self.first is None:
            self.first = self.ended - self.began
        self.tokens += tokens

    def show_rest(self) -> None:
        """End live text with a line break, or print all completions."""
        if self.live:
            _show("\n")
            return
        for output in self.outputs:
            _show(f"--- {output['index'] + 1} of {len(self.outputs)} ---\n{output['text']}\n")

    def stats(self) -> dict[str, Any]:
        """Return counts, and times in seconds without loading the model."""
        seconds = self.ended - self.began
        stats: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "seconds": round(seconds, 4),
            "seconds_to_first_token": None if self.first is None else round(self.first, 4),
            "tokens_per_second": round(self.tokens / seconds, 2) if seconds else None,
        }
        if self.tally is not None:
            stats["speculation"] = {
                **vars(self.tally),
                "acceptance": round(self.tally.acceptance, 4),
                "tokens_per_step": round(self.tally.tokens_per_step, 4),
            }
        return stats

    def summary(self) -> str:
        """Return the statistics as one line."""
        s = self.stats()
        drafted = ""
        if self.tally is not None:
            drafted = (
                f"; {self.tally.tokens_per_step:.2f} tokens per step, "
                f"{self.tally.accepted} of {self.tally.drafted} draft tokens accepted"
            )
        return (
            f"{s['prompt_tokens']} prompt tokens, {s['completion_tokens']} generated in {s['seconds']:.2f} s: "
            f"{s['tokens_per_second'] or 0:.1f} tokens/s, first token after "
            f"{s['seconds_to_first_token'] or 0:.2f} s{drafted}"
        )


def write(
    model: Mistral7B,
    ids: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    generation: Generation,
    **options: Any,
) -> int:
    """Stream into `generation` (`options` as in `stream`) and return the exit code.

    Ctrl-C ends the stream; the text so far is kept.
    """
    from ..generate import stream

    generation.began = time.perf_counter()
    try:
        for piece in stream(model, ids, params, tokenizer, **options):
            generation.push(piece)
    except KeyboardInterrupt:
        return 130
    return 0


def score(
    model: Mistral7B,
    ids: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    generation: Generation,
    **options: Any,
) -> dict[str, Any]:
    """Generate with log-probabilities (`options` as in `generate`) and return the fields of the JSON output."""
    from ..generate import generate

    generation.began = time.perf_counter()
    request = generate(model, [ids], params, tokenizer, **options)[0]
    generation.count(sum(len(c.token_ids) for c in request.outputs))
    generation.first = None  # unknown: all tokens arrive at once
    outputs = [{**vars(c), "logprobs": _named(c.logprobs)} for c in request.outputs]
    return {"outputs": outputs, "prompt_logprobs": _named(request.prompt_logprobs)}


def _named(places: Any) -> Any:
    """Turn named tuples of log-probabilities into dicts, so that JSON keeps their fields."""
    if places is None:
        return None
    return [place and {token: entry._asdict() for token, entry in place.items()} for place in places]


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
