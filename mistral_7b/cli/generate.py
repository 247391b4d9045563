"""`mistral-7b generate`: continue one text. Text on stdout as it comes, statistics on stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ..sampling.params import SamplingParams
from .inputs import ModelName, TextOptions, UsageError, read_flags, read_text

if TYPE_CHECKING:
    from ..engine.speculation import Speculation, Tally
    from ..generate import TextPiece
    from ..model import Mistral7B
    from ..text.tokenizer import Tokenizer

PROMPT_LOOKUP = "prompt-lookup"
DEMO_PROMPT = "class TestParser(unittest.TestCase):\n"  # the bundled model has read many of these


@dataclasses.dataclass(frozen=True)
class Generate(TextOptions):
    """Continue a text. Without a prompt it is read from standard input; the bundled model has one of its own."""

    model: ModelName = "demo"
    """A folder, a file, a hub id or "demo"."""
    prompt: str = ""
    """The text to continue; --prompt="..." for one that begins with a dash."""
    prompt_file: str = ""
    """A file that holds it; - is standard input."""
    echo: Literal["auto", "always", "never"] = "auto"
    """Print the prompt before its continuation; auto: on a terminal, or if nobody gave one."""
    json: bool = False
    """Print one JSON object at the end: text, token ids, log-probabilities, statistics."""
    speculate: Annotated[str, tyro.conf.arg(metavar="prompt-lookup|MODEL")] = ""
    """Guess tokens ahead, from repetitions in the text or by a smaller model of the same vocabulary."""
    max_draft: int | None = None
    """Most tokens guessed at once; none: 10. How many are, follows from how many prove right."""
    sampling: SamplingParams = dataclasses.field(
        default_factory=lambda: SamplingParams(temperature=0.7, max_tokens=256)
    )
    """How tokens are chosen."""


def run(argv: list[str]) -> int:
    args = read_flags(Generate, "generate", argv)
    params = args.constrained(args.sampling)
    scored = params.logprobs is not None or params.prompt_logprobs is not None
    if scored and not args.json:
        raise UsageError(
            "--logprobs and --prompt-logprobs are part of the JSON output", field="--logprobs", hint="add --json"
        )
    prompt = given_prompt(args)
    echo = args.echo == "always" or (args.echo == "auto" and (sys.stdout.isatty() or not prompt))
    prompt = prompt or DEMO_PROMPT
    model, tokenizer = args.open(args.model)
    speculate = speculation(args)
    from ..sampling.sampler import draw_seed

    params = dataclasses.replace(params, seed=draw_seed() if params.seed is None else params.seed)
    ids = tokenizer.encode(prompt)
    written = Written(params.n, len(ids), params.n == 1 and not args.json, speculate.tally if speculate else None)
    if echo and not args.json:
        _show(prompt)
    how = {"speculate": speculate, "kv_dtype": args.kv_dtype, "adapter": args.adapter}
    if scored:
        facts, code = score(model, ids, params, tokenizer, written, **how), 0
    else:
        code = write(model, ids, params, tokenizer, written, **how)
        facts = {"outputs": written.outputs}
    if args.json:
        known = {"model": args.model, "prompt": prompt, "prompt_token_ids": ids, "seed": params.seed}
        print(json.dumps({**known, **facts, "stats": written.stats()}))
    else:
        written.show_rest()
        if code == 0:
            print(written.summary(), file=sys.stderr)
    return code


def speculation(args: Generate) -> Speculation | None:
    """How tokens are to be guessed ahead, if at all; opens the model that guesses."""
    if not args.speculate:
        if args.max_draft is not None:
            raise UsageError("--max-draft goes with --speculate", field="--max-draft")
        return None
    from ..engine.speculation import Speculation

    model = None if args.speculate == PROMPT_LOOKUP else args.open_model(args.speculate)
    return Speculation(model) if args.max_draft is None else Speculation(model, max_draft=args.max_draft)


def given_prompt(args: Generate) -> str:
    """The prompt that was given, by flag, file or pipe; "" where the bundled model may use its own."""
    if args.prompt and args.prompt_file:
        raise UsageError("--prompt and --prompt-file exclude each other", field="--prompt")
    prompt = args.prompt
    if args.prompt_file:
        prompt = read_text(args.prompt_file)
    elif not prompt and not sys.stdin.isatty():
        prompt = read_text("-")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8 text", field="--prompt") from error
    if not prompt and args.model != "demo":
        raise UsageError("no prompt", hint="give --prompt TEXT or --prompt-file FILE, or pipe a text in")
    return prompt


class Written:
    """What has been generated so far: shown as it comes if `live`, counted and timed."""

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
        """Take the next piece of one of the completions."""
        self.count(len(piece.token_ids))
        output = self.outputs[piece.index]
        output["text"] += piece.text
        output["token_ids"] += piece.token_ids
        if piece.finish_reason:
            output.update(finish_reason=piece.finish_reason, stop_reason=piece.stop_reason)
        if self.live:
            _show(piece.text)

    def count(self, tokens: int) -> None:
        """Note that so many more tokens have come just now."""
        self.ended = time.perf_counter()
        if self.first is None:
            self.first = self.ended - self.began
        self.tokens += tokens

    def show_rest(self) -> None:
        """End the live text with a line break, or print what was not shown yet."""
        if self.live:
            _show("\n")
            return
        for output in self.outputs:
            _show(f"--- {output['index'] + 1} of {len(self.outputs)} ---\n{output['text']}\n")

    def stats(self) -> dict[str, Any]:
        """Counts, and times in seconds; the model's loading is not among them."""
        seconds = self.ended - self.began
        facts: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.tokens,
            "seconds": round(seconds, 4),
            "seconds_to_first_token": None if self.first is None else round(self.first, 4),
            "tokens_per_second": round(self.tokens / seconds, 2) if seconds else None,
        }
        if self.tally is not None:
            facts["speculation"] = {
                **vars(self.tally),
                "acceptance": round(self.tally.acceptance, 4),
                "tokens_per_step": round(self.tally.tokens_per_step, 4),
            }
        return facts

    def summary(self) -> str:
        """The statistics in a line."""
        s = self.stats()
        guessed = ""
        if self.tally is not None:
            guessed = (
                f"; {self.tally.tokens_per_step:.2f} tokens a step, "
                f"{self.tally.accepted} of {self.tally.drafted} guesses right"
            )
        return (
            f"{s['prompt_tokens']} tokens of prompt, {s['completion_tokens']} generated in {s['seconds']:.2f} s: "
            f"{s['tokens_per_second'] or 0:.1f} tokens/s, the first after {s['seconds_to_first_token'] or 0:.2f} s"
            f"{guessed}"
        )


def write(
    model: Mistral7B,
    ids: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    written: Written,
    **how: Any,
) -> int:
    """Stream into `written`, `how` as in `stream`; the exit code. Ctrl-C ends it, and what has come stays."""
    from ..generate import stream

    written.began = time.perf_counter()
    try:
        for piece in stream(model, ids, params, tokenizer, **how):
            written.push(piece)
    except KeyboardInterrupt:
        return 130
    return 0


def score(
    model: Mistral7B,
    ids: list[int],
    params: SamplingParams,
    tokenizer: Tokenizer,
    written: Written,
    **how: Any,
) -> dict[str, Any]:
    """Generate with log-probabilities, `how` as in `generate`; what the JSON output says of it."""
    from ..generate import generate

    written.began = time.perf_counter()
    request = generate(model, [ids], params, tokenizer, **how)[0]
    written.count(sum(len(c.token_ids) for c in request.outputs))
    written.first = None  # all came at once
    outputs = [{**vars(c), "logprobs": _named(c.logprobs)} for c in request.outputs]
    return {"outputs": outputs, "prompt_logprobs": _named(request.prompt_logprobs)}


def _named(places: Any) -> Any:
    """Log-probabilities with their fields' names, which JSON would drop from a named tuple."""
    if places is None:
        return None
    return [place and {token: entry._asdict() for token, entry in place.items()} for place in places]


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
