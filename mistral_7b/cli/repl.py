"""The read-eval-print loop of `mistral-7b chat`: input, commands, display of answers.

It is independent of the model: `answer(messages)` yields pieces of text. If it raises an error after some pieces,
the error is printed and the pieces are kept.
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
/system TEXT    set the system prompt; without TEXT: show it; "/system -" removes it
/reset          delete all turns, keep the system prompt
/save FILE      save the conversation as JSON
/load FILE      load a saved conversation
/exit           exit (also Ctrl-D)

A line that ends with \\ continues on the next one; """ begins and ends a block.
Ctrl-C stops an answer; the partial answer stays in the conversation.
A message that begins with / is sent if a space precedes it.'''


class Repl:
    """One chat session. `render` formats answers for a terminal; None: plain text on stdout.

    `statistics` describes the last answer in a line, which is printed after it.
    """

    def __init__(
        self,
        answer: Answer,
        conversation: Conversation,
        render: Render | None = None,
        statistics: Callable[[], str] | None = None,
    ) -> None:
        self.answer = answer
        self.conversation = conversation
        self.render = render
        self.statistics = statistics
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/reset": self._reset,
            "/save": self._save,
            "/load": self._load,
        }

    def loop(self) -> None:
        """Read and answer messages until /exit or the end of input."""
        while True:
            try:
                message = read_message()
            except UnicodeDecodeError as error:
                raise UsageError("standard input is not UTF-8 text") from error
            except EOFError:
                if sys.stdin.isatty():
                    notice("")
                return
            except KeyboardInterrupt:
                notice("\n(Ctrl-D or /exit exits)")
                continue
            if message.strip() in ("/exit", "/quit"):
                return
            if not message.strip():
                continue
            try:
                self._command(message) if message.startswith("/") else self.ask(message.strip())
            except KeyboardInterrupt:  # between the last piece and the next prompt
                notice("(stopped)")
            except BrokenPipeError:
                raise
            except (Mistral7BError, OSError) as error:
                notice(f"{error}")

    def ask(self, question: str) -> None:
        """Answer one message. A message without an answer is not added to the conversation."""
        pieces: list[str] = []
        stopped = False
        try:
            with showing(self.render) as push:
                try:
                    for piece in self.answer(self.conversation.with_question(question)):
                        pieces.append(piece)
                        push(piece)
                except KeyboardInterrupt:
                    stopped = True
        finally:
            answer = "".join(pieces).strip()
            if answer:
                self.conversation.add_turn(question, answer)
            if answer and self.statistics is not None:
                notice(self.statistics())
        if stopped:
            detail = "" if answer else " before the first token; the message is not added"
            notice(f"(stopped{detail})")
        elif not answer:
            notice("(the model gave an empty answer; the message is not added)")

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
        deleted = len(self.conversation.turns) // 2
        self.conversation.turns = []
        notice(f"({deleted} {'turn' if deleted == 1 else 'turns'} deleted)")

    def _save(self, path: str) -> None:
        if not path:
            raise UsageError("/save needs a file name")
        self.conversation.save(path)
        notice(f"(saved to {path})")

    def _load(self, path: str) -> None:
        if not path:
            raise UsageError("/load needs a file name")
        loaded = Conversation.load(path)
        self.conversation.system, self.conversation.turns = loaded.system, loaded.turns
        notice(f"({len(loaded.turns) // 2} turns loaded from {path})")


def notice(text: str) -> None:
    """Print to stderr, so that stdout contains only the answers."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def showing(render: Render | None) -> Iterator[Callable[[str], None]]:
    """Yield a function that displays a piece of the answer; on exit, print a line break."""
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
    """Read one message: a line, lines joined by a final "\\", or a \"\"\" block. EOFError at the end."""
    line = _read_line("> ")
    if line.strip() == '"""' or (line.startswith('"""') and not line.rstrip().endswith('"""')):
        lines = [line.removeprefix('"""')] if line.strip() != '"""' else []
        with contextlib.suppress(EOFError):  # the end of input ends a block
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
    """Return the path of a file in $XDG_STATE_HOME/mistral-7b, by default in ~/.local/state."""
    home = os.environ.get("XDG_STATE_HOME", "")
    base = pathlib.Path(home) if os.path.isabs(home) else pathlib.Path.home() / ".local" / "state"
    return base / "mistral-7b" / name


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Enable line editing with the history of earlier chats; on exit, save it readable by its owner only."""
    try:
        import readline
    except ImportError:  # Python built without readline: no editing
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
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            temporary.touch(mode=0o600)
            readline.write_history_file(temporary)
            os.replace(temporary, path)
