"""Compile and render chat templates: Jinja as transformers offers it to them, sandboxed and limited.

    environment   trim_blocks, lstrip_blocks, break and continue, {% generation %}, raise_exception,
                  strftime_now, tojson without HTML escapes; no access to what Python keeps in underscores
    limits        every block, call, filter, test, comparison and container of the compiled template counts
                  against the budget of its rendering (template_budget.py, template_filters.py)

Left out, since no chat template needs them: loading other templates, `lipsum`, autoescape, and some filters.
"""

# ruff: noqa: N802  (Jinja calls visitors by the names of its nodes)

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace, pass_context

from . import template_budget as budget
from .template_budget import LimitError, current
from .template_filters import items, offered_filters, offered_tests

SOURCE = 100_000  # characters of a template
TOKENS = 12_000  # of Jinja, in a template; compiling takes about 0.1 ms for each
COUNTED = (budget.step, budget.taken, budget.compared, budget.tilde)


class RefusalError(TemplateError):
    """What a template says with raise_exception."""


class _Code(CodeGenerator):
    """Jinja's compiler, which also writes the calls that count."""

    def blockvisit(self, nodes_: Iterable[nodes.Node], frame: Frame) -> None:
        statements = list(nodes_)
        text = sum(
            len(part.data)
            for s in statements
            if isinstance(s, nodes.Output)
            for part in s.nodes
            if isinstance(part, nodes.TemplateData)
        )
        self.writeline(f"environment.step({text})")
        super().blockvisit(statements, frame)

    def _counted(self, name: str, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write(f"environment.{name}(")
        visit(node, frame)
        self.write(")")

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.tilde((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: nodes.Compare, frame: Frame) -> None:
        self._counted("compared", super().visit_Compare, node, frame)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._counted("taken", super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._counted("taken", super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._counted("taken", super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._counted("taken", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:
        self.fail("autoescape is not offered to chat templates", node.lineno)


class _Generation(Extension):
    """{% generation %}: marks what the assistant wrote, for training; here its body alone."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Macro) -> str:
        text: str = caller()
        return text


class _Size(Extension):
    """Ends the compilation of a template with too many tokens."""

    def filter_stream(self, stream: TokenStream) -> Iterator[Token]:
        for count, token in enumerate(stream):
            if count > TOKENS:
                raise TemplateSyntaxError(f"it has more than {TOKENS:,} tokens", token.lineno)
            yield token


class _Namespace(Namespace):
    """Jinja's namespace without underscored names. Its text does not show what it holds, which may be anything."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja, so that an attribute may be named self
        self, args = args[0], args[1:]
        given = _DICT(*args, **kwargs)
        for name in given:
            _check_name(name)
        Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot have the attribute {name!r}")


class _Dict:
    """dict() and dict.fromkeys()."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        if args and not isinstance(args[0], Mapping):
            pairs = [tuple(pair) for pair in items(args[0])]
            budget.check_keys(pair[0] for pair in pairs if pair)
            args = (pairs, *args[1:])
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        keys = list(items(keys))
        budget.check_keys(keys)
        return dict.fromkeys(keys, value)


_DICT = _Dict()


class _Cycler(Cycler):
    """Jinja's cycler. Its items are counted: tuples could nest so deep that hashing one overflows the stack."""

    def __init__(self, *items: Any) -> None:
        current().measured(items)
        super().__init__(*items)


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of chat templates."""

    code_generator_class = _Code
    intercepted_binops = frozenset(budget.BINARY)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, optimized=False, finalize=_shown,
            extensions=[_Generation, _Size, loopcontrols],
        )  # fmt: skip
        for function in COUNTED:
            setattr(self, function.__name__, function)
        self.filters = offered_filters(self.filters)
        self.tests = offered_tests(self.tests)  # type: ignore[assignment]  # Jinja's type leaves built-ins out
        del self.globals["lipsum"]
        self.globals |= {
            "raise_exception": _raise, "strftime_now": _now, "dict": _DICT, "namespace": _Namespace,
            "cycler": _Cycler,
        }  # fmt: skip

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget.BINARY[operator](left, right)
        return current().measured(super().call_binop(context, operator, left, right))

    def getitem(self, obj: Any, argument: Any) -> Any:
        if isinstance(argument, tuple):
            current().size(argument)  # the time to hash it
        return super().getitem(obj, argument)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # The odd names leave all others to the arguments of macros, as in Jinja.
        if budget.collects_arguments(__obj):
            current().size((args, kwargs))
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, (str, int, float, list, tuple, dict, range)):
            for name in ("_loop_vars", "_block_vars"):
                kwargs.pop(name, None)
            if __obj.__name__ == "join" and args:
                args = (items(args[0]), *args[1:])
            budget.check_method(__obj.__name__, owner, args, kwargs)
        if isinstance(__obj, (Macro, LoopContext, BlockReference)):
            with current().call():
                return current().measured(super().call(__context, __obj, *args, **kwargs))
        return current().measured(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        call = super().wrap_str_format(value)
        if call is None:
            return None

        def run(*args: Any, **kwargs: Any) -> str:
            for name in ("_loop_vars", "_block_vars"):
                kwargs.pop(name, None)
            budget.formatted(value.__self__, (args, kwargs))
            return call(*args, **kwargs)

        return run


@pass_context  # keeps Jinja from calling it for constants while it compiles
def _shown(context: Context, value: Any) -> str:
    """Return the text of a value that is written, counted."""
    text = value if isinstance(value, str) else str(value)
    current().spend(text.__sizeof__())
    return text


def _raise(message: str) -> None:
    raise RefusalError(str(message))


def _now(format: str) -> str:
    if len(format) > 200 or re.search(r"\d{3}", format):
        raise LimitError("it formats the time with a very long format")
    return datetime.now().strftime(format)


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    return _Environment()


class InvalidTemplateError(Exception):
    """A template that cannot be compiled: what is wrong, and the line, where it is known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@functools.lru_cache(maxsize=64)
def compiled(source: str) -> jinja2.Template:
    """Compile a template once. Raises InvalidTemplateError."""
    if len(source) > SOURCE:
        raise InvalidTemplateError(f"it has {len(source):,} characters, and at most {SOURCE:,} are read")
    try:
        with budget.limited():
            return _environment().from_string(source)
    except TemplateSyntaxError as e:
        raise InvalidTemplateError(e.message or "invalid syntax", e.lineno) from e
    except RecursionError as e:
        raise InvalidTemplateError("it is nested too deeply") from e
    except (SyntaxError, ValueError, MemoryError, LimitError) as e:  # Python's own, for what Jinja wrote
        raise InvalidTemplateError(f"it cannot be compiled ({e})") from e


@functools.lru_cache(maxsize=64)
def strings_in(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Return the strings in the expressions of a template that compiles, and the attributes that it reads."""
    tree = _environment().parse(source)
    literals = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(literals), frozenset(node.attr for node in tree.find_all(nodes.Getattr))


def rendered(template: jinja2.Template, values: Mapping[str, Any], size: int, probe: bool = False) -> str:
    """Render a compiled template. Raises what the template raises, LimitError, or any error of its expressions."""
    with budget.limited(size, probe):
        return "".join(template.generate(**values))
