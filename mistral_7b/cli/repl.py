"""The dialogue of `mistral-7b chat`: reading what is typed, the commands, showing answers.

It knows nothing of models: `answer(messages)` yields pieces of text. What it raises after some of them
is told, and the pieces are kept.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator

from ..errors import Mistral7BError
from .conversation import Conversation, Message
from .inputs import UsageError
from .render import Render

Answer = Callable[[list[Message]], Iterator[str]]

HELP = '''\
/help           this list
/system TEXT    instructions for the model; without TEXT: show them; "/system -" removes them
/reset          forget the turns so far (the system text stays)
/save FILE      write the conversation as JSON
/load FILE      go on with a saved conversation
/exit           leave (or Ctrl-D)

End a line with \\ to go on in the next one, or begin with """ and end with """ for a block.
Ctrl-C stops an answer; what has come of it stays in the conversation.
A message that begins with / is sent if a space stands before it.'''


class Repl:
    """One dialogue. `render` None: plain text on stdout; otherwise as rendered on a terminal."""

    def __init__(self, answer: Answer, conversation: Conversation, render: Render | None = None) -> None:
        self.answer = answer
        self.conversation = conversation
        self.render = render
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
        }

    def loop(self) -> None:
        """Read and answer until /exit or the end of input."""
        while True:
            try:
                message = read_message()
            except EOFError:
                if sys.stdin.isatty():
                    notice("")
                return
            except KeyboardInterrupt:
                notice("\n(Ctrl-D or /exit leaves)")
                continue
            if message.strip() in ("/exit", "/quit"):
                return
            if not message.strip():
                continue
            try:
                self._command(message) if message.startswith("/") else self._ask(message.strip())
            except KeyboardInterrupt:  # between the last piece and the next prompt
                notice("(stopped)")
            except BrokenPipeError:
                raise
            except (Mistral7BError, OSError) as error:
                notice(f"{error}")

    def _ask(self, question: str) -> None:
        """Answer one message. Only a question that got an answer enters the conversation."""
        pieces: list[str] = []
        stopped = False
        try:
            with showing(self.render) as push:
                try:
                    for piece in self.answer(self.conversation.asking(question)):
                        pieces.append(piece)
                        push(piece)
                except KeyboardInterrupt:
                    stopped = True
        finally:
            answer = "".join(pieces).strip()
            if answer:
                self.conversation.answered(question, answer)
        if stopped:
            kept = "" if answer else ": nothing had come, and the question is not kept"
            notice(f"(stopped{kept})")
        elif not answer:
            notice("(the model gave an empty answer, and the question is not kept)")

    def _command(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command = self._commands.get(name.strip())
        if command is None:
            raise UsageError(
                f"there is no command {name.strip()}",
                hint="/help lists them (a space before the / sends it as text)",
            )
        command(rest.strip())

    def _help(self, rest: str) -> None:
        notice(HELP)

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else text
        notice(f"system: {self.conversation.system or '(none)'}")

    def _reset(self, rest: str) -> None:
        forgotten = len(self.conversation.turns) // 2
        self.conversation.turns = []
        notice(f"({forgotten} {'turn' if forgotten == 1 else 'turns'} forgotten)")

    def _save(self, path: str) -> None:
        if not path:
            raise UsageError("/save needs the name of a file")
        self.conversation.save(path)
        notice(f"(saved to {path})")

    def _load(self, path: str) -> None:
        if not path:
            raise UsageError("/load needs the name of a file")
        loaded = Conversation.load(path)
        self.conversation.system, self.conversation.turns = loaded.system, loaded.turns
        notice(f"({len(loaded.turns) // 2} turns loaded from {path})")


def notice(text: str) -> None:
    """Say something that is no answer: on stderr, so that stdout holds the answers alone."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing(render: Render | None) -> Iterator[Callable[[str], None]]:
    """Where the pieces of an answer go, as they come; a line break follows the last."""
    if render is not None:
        from rich.console import Console

        from .render import live_text

        with live_text(Console(), render) as text:
            yield text.push
        return

    def push(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    try:
        yield push
    finally:
        push("\n")


def read_message() -> str:
    """One message from the terminal or a pipe: a line, lines joined by a last "\\\\", or a \"\"\" block."""
    line = _read_line("> ")
    if line.strip() == '"""' or (line.startswith('"""') and not line.rstrip().endswith('"""')):
        lines = [line.removeprefix('"""')] if line.strip() != '"""' else []
        with contextlib.suppress(EOFError):  # a block that the end of input cuts off is a message too
            while not (line := _read_line("... ")).rstrip().endswith('"""'):
                lines.append(line)
            lines.append(line.rstrip().removesuffix('"""'))
        return " " + "\n".join(lines).strip("\n")  # never a command
    if line.startswith('"""'):
        return " " + line.rstrip()[3:-3]
    with contextlib.suppress(EOFError):
        while line.endswith("\\"):
            line = line[:-1] + "\n"
            line += _read_line("... ")
    return line


def _read_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        return input()
    if sys.stdout.isatty():
        return input(prompt)  # with readline: editing and history
    print(prompt, end="", file=sys.stderr, flush=True)
    return input()


def state_file(name: str) -> pathlib.Path:
    """Where something is kept between runs: $XDG_STATE_HOME/mistral-7b, by default in ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = pathlib.Path(home) if os.path.isabs(home) else pathlib.Path.home() / ".local" / "state"
    return base / "mistral-7b" / name


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Line editing with the history of earlier chats; it is kept on leaving, for this user's eyes only."""
    try:
        import readline
    except ImportError:  # Python was built without it: lines are read all the same
        yield
        return
    path = state_file("chat_history")
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(2000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            beside = path.with_name(f".{path.name}.{os.getpid()}")
            beside.touch(mode=0o600)
            readline.write_history_file(beside)
            os.replace(beside, path)
