"""The command `mistral-7b`: one module per subcommand, each with `run(argv) -> exit code`.

Only the module of the requested command is imported, and none imports torch before its flags are parsed, so that
`--help` takes a quarter of a second.

Exit codes: 0 success, 1 failure, 2 invalid input, 130 interrupted by Ctrl-C, 141 stdout closed by its reader.
MISTRAL_7B_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import sys
import warnings

from .. import __version__
from ..distributed import ranks
from ..errors import ConfigError, DistributedError, HubError, Mistral7BError, WriteError
from ..files import ADVICE, write_error_in

COMMANDS = {
    "generate": "continue a text",
    "chat": "chat with an instruction-tuned model",
    "run": "answer one message, or chat",
    "explain": "draw attention, predictions, caches or times inside a model",
    "info": "show a checkpoint's release, shape, tokenizer and memory requirements",
    "convert": "convert a checkpoint to another format",
    "quantize": "quantize a checkpoint to int8 or int4",
    "merge": "merge a LoRA adapter into its base model",
    "compare": "compare two models: their distance, and its cause if it is a fault",
    "pull": "download a model: one of the Hugging Face hub, or the starter model",
    "serve": "serve a model over HTTP with the OpenAI API",
    "train": "train a model on text files",
    "finetune": "fine-tune a model on examples, preferences or rewards",
    "plan": "plan a model over several GPUs: memory, traffic, what to choose",
    "bench": "measure speed, memory and quality, compared with hardware limits and other engines",
    "eval": "evaluate a model: perplexity, tasks of lm-eval, long contexts",
    "verify": "check the files of a model: weights, tokenizer, chat template, hashes",
    "doctor": "check this machine: hardware, kernels, missing software",
    "course": "exercises that rebuild the model, from RMSNorm to a paged, quantized decoder",
    "agent-guide": "print one page on this package for a coding assistant",
}

PARALLEL = ("generate", "finetune")  # commands that torchrun may start with several processes

ELSEWHERE = {  # commands of other programs -> what to do here
    "list": "a model is a folder or a file; `hf cache ls` lists those downloaded from the hub",
    "rm": "delete a model's folder; `hf cache rm` removes one downloaded from the hub",
    "show": "use `mistral-7b info MODEL`",
    "create": "use `mistral-7b convert` or `mistral-7b quantize`",
}

INTERRUPTED, BROKEN_PIPE = 130, 141  # 128 + SIGINT, 128 + SIGPIPE, as a shell reports them


def main(argv: list[str] | None = None) -> int:
    """Run `mistral-7b` with these arguments (default: sys.argv) and return its exit code."""
    debug = os.environ.get("MISTRAL_7B_DEBUG", "") not in ("", "0")
    _open_streams()
    if ranks.rank() > 0:  # rank 0 speaks; an error is reported on the original stderr
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    show = warnings.showwarning
    warnings.showwarning = _show_warning
    try:
        with ranks.lost_ranks_named():
            code = _dispatch(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # raises BrokenPipeError here, not at exit
        return code
    except SystemExit as exit:  # from the flag parser, which has printed the reason
        if isinstance(exit.__context__, BrokenPipeError):  # or from rich
            return BROKEN_PIPE
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except KeyboardInterrupt:
        if sys.stderr.isatty():
            print(file=sys.stderr)  # end the line on which the terminal shows ^C
        return INTERRUPTED
    except BrokenPipeError:
        _forget_stdout()
        return BROKEN_PIPE
    except Exception as error:
        if debug:
            raise
        code = _report(error)
        try:
            sys.stdout.flush()
        except OSError:  # stdout itself fails: its buffer is lost
            _forget_stdout()
        return code
    finally:
        warnings.showwarning = show


def _open_streams() -> None:
    """Replace closed standard streams by the null device, and fix the encodings of the others.

    The lowest free descriptors are used: else a file opened later would get them, and what is printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # whatever the locale
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal cannot encode


def _show_warning(message: Warning | str, category: type[Warning], *place: object, **rest: object) -> None:
    """Print a warning as one line, without the place in the source."""
    with contextlib.suppress(OSError):
        print(f"mistral-7b: {str(message).strip().splitlines()[0]}", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    command = argv[0] if argv else ""
    if ranks.size() > 1 and command not in PARALLEL:
        raise ConfigError(
            f"`{command}` runs in one process, and torchrun started {ranks.size()}",
            field="--nproc-per-node",
            hint=f"start it without torchrun; over several processes run: {', '.join(PARALLEL)}",
        )
    if command in COMMANDS:
        return importlib.import_module(f".{command.replace('-', '_')}", __name__).run(argv[1:])
    if command == "help" and argv[1:2] and argv[1] in COMMANDS:
        return _dispatch([argv[1], "--help"])
    if command == "help" and argv[1:2]:
        return _dispatch(argv[1:2])
    if command in ("-h", "--help", "help"):
        print(_help())
        return 0
    if command == "--version":
        print(f"mistral-7b {__version__}")
        return 0
    if not command:
        print(_help(), file=sys.stderr)
        return 2
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    what = "flag" if command.startswith("-") else "command"
    hint = ELSEWHERE.get(command) or (f"did you mean {close[0]!r}?" if close else "")
    print(
        f"mistral-7b: there is no {what} {command!r}"
        + (f"; {hint}" if hint else "")
        + f"\nThe commands are: {', '.join(COMMANDS)}.",
        file=sys.stderr,
    )
    return 2


def _help() -> str:
    commands = "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())
    return (
        "usage: mistral-7b [-h] [--version] COMMAND ...\n\n"
        "Mistral 7B in PyTorch: readable, exact and fast at once.\n\n"
        f"commands:\n{commands}\n\n"
        "`mistral-7b help COMMAND` lists the flags of a command. MODEL is a folder, a file, a hub id\n"
        '(owner/name), "starter" (a small chat model, downloaded once), or "demo" (the default): the bundled\n'
        "small model of Python code."
    )


def _report(error: Exception) -> int:
    """Print an error as one message and return its exit code."""
    hint = ""
    bad_input = isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError))
    if isinstance(error, Mistral7BError):
        bad_input = not isinstance(error, (DistributedError, HubError, WriteError))
        text = str(error)
    elif (refusal := write_error_in(error)) is not None:
        what = refusal.filename or ("the output" if refusal.errno in ADVICE else "")
        text = f"{what}: {refusal.strerror}" if what else str(refusal)
        if refusal.errno in ADVICE and not bad_input:
            text += f"; {ADVICE[refusal.errno]}"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: {error}. `mistral-7b info MODEL --context N` says what is needed"
    else:
        text = f"{type(error).__name__}: {error}"
        hint = "\n(this should not happen: MISTRAL_7B_DEBUG=1 shows the traceback, please report it)"
    if ranks.reports():
        with contextlib.suppress(OSError):  # stderr is closed, or its disk is full: the code remains
            print(f"mistral-7b: {text}{hint}", file=sys.__stderr__ if ranks.rank() else sys.stderr)
    return 2 if bad_input else 1


def _forget_stdout() -> None:
    """Redirect stdout to the null device, so that flushing it at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
