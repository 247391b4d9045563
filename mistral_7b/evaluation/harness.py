"""lm-eval's tasks on the engine: a model of lm-eval (0.4) over `scoring.py`, and the function that runs tasks.

loglikelihood          scores on the engine, with shared prefixes
loglikelihood_rolling  with a sliding window one pass over the whole text; else lm-eval's windows of the context
generate_until         completions on the engine

Prompts begin with BOS exactly once, where the model's texts do: also where lm-eval puts it before a window, and
where a chat template writes it. Text that spells a control token stays text.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import jinja2
import yaml  # type: ignore[import-untyped]
from lm_eval import simple_evaluate  # type: ignore[import-untyped]
from lm_eval.api.model import TemplateLM  # type: ignore[import-untyped]
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore[import-untyped]
from tqdm.auto import tqdm

from ..engine.inputs import RequestOptions
from ..engine.llm import run
from ..errors import EvaluationError, Mistral7BError, first_line
from ..model import Mistral7B
from ..sampling.params import SamplingParams
from ..text.tokenizer import Tokenizer
from .scoring import score, scoring_engine
from .task_names import check_names, folders_of, no_task, path_or_name

GENERATED = 256  # tokens, if a task does not say
SAMPLED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # of a task's generation_kwargs


class HarnessModel(TemplateLM):
    """A model as lm-eval sees it. Scores are bit-identical at every batch size and in any order of requests.

    `batch_size` is the number of requests of usual length that are computed together (scoring.py), `seed` that of
    tasks that sample.
    """

    def __init__(self, model: Mistral7B, tokenizer: Tokenizer, batch_size: int = 8, seed: int = 1234) -> None:
        super().__init__()
        self.inputs = scoring_engine(model, tokenizer, batch_size)
        self.words, self.batch_size, self.seed = tokenizer, batch_size, seed
        self.max_length = model.args.max_seq_len
        self.windowed = model.args.sliding_window is not None
        self._stderr = sys.stderr  # for progress bars: run_tasks silences those of lm-eval
        self._chats: dict[str, list[int]] = {}  # rendered conversations, whose ids their text alone does not tell

    @property
    def eot_token_id(self) -> int:
        return self.words.start_id if self.words.eos_id is None else self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS in a vocabulary without it."""
        return self.eot_token_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.words.path.parent.name}/{self.words.path.name}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The name of the template, for lm-eval's records."""
        return self.words.chat.name if self.words.chat is not None else ""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        for length in sorted({len(text) for text in self._chats}, reverse=True):
            if (chat := self._chats.get(string[:length])) is not None:
                rest = string[length:]
                return [*chat, *(self.words.encode(rest, bos=False) if rest else [])]
        return self.words.encode(string, bos=add_special_tokens is not False)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The display form of a conversation's ids; tok_encode turns it back into these ids."""
        chat: list[dict[str, Any]] = [dict(message) for message in chat_history]
        if not add_generation_prompt:
            chat[-1]["prefix"] = True
        ids = self.words.encode_chat(chat)
        text = "".join(map(self.words.piece, ids))
        self._chats[text] = ids
        return text

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self._chats:  # its last blanks belong to the template
            return self._chats[context], self.words.encode(continuation, bos=False)
        return super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        with self._bar("scores", len(pairs), disable_tqdm) as bar:
            scores = score(self.inputs, pairs, bar.update)
        out = [(sum(s.logprob for s in each), all(s.greedy for s in each)) for each in scores]
        for (key, _, _), answer in zip(requests, out, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return out

    def _bar(self, what: str, total: int, hidden: bool) -> tqdm[Any]:
        """A progress bar on a terminal, else none."""
        return tqdm(total=total, desc=what, file=self._stderr, disable=hidden or None)

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair without the first tokens of a context that is too long; as in lm-eval, it then has no BOS."""
        if not continuation:
            raise EvaluationError("a task asks for the score of an empty text", field="--tasks")
        over = len(context) + len(continuation) - (self.max_length + 1)
        if over <= 0 or self.windowed:
            return context, continuation
        if over >= len(context):
            raise EvaluationError(
                f"a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}",
                field="--tasks",
            )
        return context[over:], continuation

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        owners: list[int] = []
        windows: list[tuple[Any, list[int], list[int]]] = []
        for i, (text,) in enumerate(request.args for request in requests):
            for context, targets in self._windows(self.words.encode(text, bos=False)):
                owners.append(i)
                windows.append((None, context, targets))
        sums = [0.0] * len(requests)
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        if self.windowed:  # the cache forgets what no later token sees, so that one pass is exact
            return iter([([self.prefix_token_id], ids)] if ids else [])
        return map(make_disjoint_window, get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        made, stops = [], []
        for i, (context, options) in enumerate(request.args for request in requests):
            params, until = self._sampling(options)
            room = None if self.windowed else self.max_length - (params.max_tokens or 0)
            if room is not None and room < 1:
                raise EvaluationError(
                    f"{params.max_tokens} tokens to generate fill the context of {self.max_length}",
                    field="--tasks",
                    hint="lower max_gen_toks of the task",
                )
            ids = self.tok_encode(context)
            ids = ids if room is None else ids[-room:]
            made.append(self.inputs.text(ids, params, RequestOptions(), name=f"request {i}"))
            stops.append(until)
        order = sorted(range(len(made)), key=lambda i: made[i].ids)  # neighbors share prefixes
        with self._bar("completions", len(made), disable_tqdm) as bar:
            run(self.inputs.engine, [made[i] for i in order], bar.update)
        out = []
        for request, made_request, until in zip(requests, made, stops, strict=True):
            if made_request.error is not None:
                raise made_request.error
            text = postprocess_generated_text(made_request.output().outputs[0].text, until, None)
            self.cache_hook.add_partial("generate_until", request.args, text)
            out.append(text)
        return out

    def _sampling(self, options: Mapping[str, Any]) -> tuple[SamplingParams, list[str]]:
        """The parameters of a task's generation_kwargs, and its stop strings."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), GENERATED))
        until = [stop for stop in kwargs["until"] if stop]
        sampled = {name: kwargs[name] for name in SAMPLED if kwargs.get(name) is not None}
        temperature = float(sampled.pop("temperature", 0.0 if not kwargs["do_sample"] else 1.0))
        params = SamplingParams(
            temperature=temperature,
            max_tokens=kwargs["max_gen_toks"],
            stop=until or None,
            seed=self.seed,
            **sampled,
        )
        return params, until


def evaluate(
    model: Mistral7B,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    include: str | pathlib.Path | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    few_shot: int | None = None,
    chat: bool = False,
    seed: int = 1234,
    manager: TaskManager | None = None,
) -> dict[str, Any]:
    """Run tasks of lm-eval, of the package, or of the folder `include`, by name or as the path of a YAML file.

    `manager` is what find_tasks returned for these tasks, if it was called before.

    Returns lm-eval's results: "results" by task, "versions", "n-shot", "samples" and more. EvaluationError for a
    task that there is none of, or whose data cannot be loaded.
    """
    return run_tasks(
        HarnessModel(model, tokenizer, batch_size, seed), tasks, include=include, limit=limit, few_shot=few_shot,
        chat=chat, manager=manager,
    )  # fmt: skip


def find_tasks(tasks: Sequence[str], include: str | pathlib.Path | None = None) -> TaskManager:
    """The index of our tasks, of `include` and, for other names, of lm-eval's own, which takes seconds to read.

    EvaluationError if there is no such folder, file or task.
    """
    check_names(tasks, include)
    names = [path_or_name(task) for task in tasks]
    for defaults in (False, True):
        with _silence(), _task_errors(names):
            manager = TaskManager(include_path=list(folders_of(include)), include_defaults=defaults)
        missing = [n for n in names if n not in manager.all_tasks and not pathlib.Path(n).is_file()]
        if not missing:
            return manager
    raise no_task(missing[0], manager.all_tasks)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without what lm-eval prints, and the programs that tell it the machine and the commit of the folder."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
        mock.patch("lm_eval.evaluator.add_env_info"),  # 0.6 s
    ):
        yield


@contextlib.contextmanager
def _task_errors(names: Sequence[str]) -> Iterator[None]:
    """Raise what lm-eval raises for a wrong task as EvaluationError."""
    try:
        yield
    except Mistral7BError:
        raise
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, AssertionError, yaml.YAMLError,
        jinja2.TemplateError,
    ) as error:  # fmt: skip
        raise EvaluationError(
            f"lm-eval could not run {', '.join(names)}: {type(error).__name__}: {first_line(error)}",
            field="--tasks",
            hint="its data may need the network; tasks with local data are run offline",
        ) from error


def run_tasks(
    model: Any, tasks: Sequence[str], *, include: str | pathlib.Path | None = None, limit: int | None = None,
    few_shot: int | None = None, chat: bool = False, manager: TaskManager | None = None, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """`evaluate` for any model of lm-eval, or the name of one with `model_args`."""
    manager = find_tasks(tasks, include) if manager is None else manager
    names = [path_or_name(task) for task in tasks]
    with _silence(), _task_errors(names):
        found = simple_evaluate(
            model=model, tasks=list(names), task_manager=manager, limit=limit, num_fewshot=few_shot,
            apply_chat_template=chat, fewshot_as_multiturn=chat, bootstrap_iters=0, **more,
        )  # fmt: skip
    assert found is not None  # None only on the other ranks of several processes
    return dict(found)
