"""Flags from dataclasses by tyro, with its errors as one sentence each."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from typing import TypeVar

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from ..errors import Mistral7BError

T = TypeVar("T")
NUMBERS = {
    r"could not convert string to float: (.+)": r"\1 is not a number",
    r"invalid literal for int\(\) with base 10: (.+)": r"\1 is not a whole number",
}


class UsageError(Mistral7BError):
    """An invalid command line."""


def read_flags(kind: type[T], command: str, argv: list[str], default: T | None = None) -> T:
    """Parse the flags of a command into `kind`; SystemExit(0) after --help, UsageError for bad flags.

    Flags that are not given have the values of `default`, or of `kind`.
    """
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.AvoidSubcommands)  # a group whose default is None stays None
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(  # type: ignore[return-value]
                kind, prog=f"mistral-7b {command}", args=argv, config=config, registry=REGISTRY, default=default
            )
    except SystemExit as exit:
        if not exit.code:
            raise
    raise UsageError(sentence(said.getvalue()), hint=f"`mistral-7b {command} --help` lists all flags")


def flag_of(field: str) -> str:
    """Return the flag of a field: --prompt-tokens of prompt_tokens."""
    return f"--{field.replace('_', '-')}"


def changed(args: object, usual: object) -> list[str]:
    """Return the flags whose values in the dataclass `args` differ from those in `usual`."""
    names = [f.name for f in dataclasses.fields(args)]  # type: ignore[arg-type]
    return [flag_of(name) for name in names if getattr(args, name) != getattr(usual, name)]


def sentence(box: str) -> str:
    """Return what tyro says in a box of several lines, drawn in Unicode or with spaces, as one sentence."""
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()  # without colors
    title = re.sub(r"[╭╮─]", "", drawn[0]).strip() if drawn else ""
    body = drawn[2:] if drawn[1:] and re.match(r" -{3}", drawn[1]) else drawn[1:]
    lines = ["", *(re.sub(r"^(│ |  )|\s*│$", "", line).rstrip() for line in body)]
    rule = next((i for i, line in enumerate(lines) if re.match(r"╰?[─-]{3}", line)), len(lines))
    text = " ".join(line.strip() for line in lines[1:rule]).strip()
    if title == "Required options":
        names = [found[1] for line in lines[1:rule] if (found := re.match(r" {4}(\S+)", line))]
        wrong = re.search(r"Unrecognized options:\s*(--?[A-Za-z][\w-]*)", " ".join(lines[rule:]))
        what = f"{_listed(names, 'and')} {'is' if len(names) == 1 else 'are'} missing"
        return f"there is no flag {wrong[1]}, and {what}" if wrong else what
    if found := re.match(r"Unrecognized options: (.*)", text):
        words: list[str] = re.findall(r"(?<!\S)--?[A-Za-z]\S*", found[1])
        if not words:
            return f"there is one argument too many: {found[1]}"
        near = re.search(r"Perhaps you meant:.*?(--[\w-]+)", " ".join(lines[rule:]))
        unknown = _listed([word.rstrip(",").partition("=")[0] for word in words], "and")
        return f"there is no flag {unknown}" + (f"; did you mean {near[1]}?" if near else "")
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", text):
        choices = sorted(choice for choice in re.findall(r"'([^']*)'", found[3]) if choice != "None")
        return f"{found[2]} must be {_listed(choices, 'or')}, not {found[1]!r}"
    if found := re.match(r"Missing value for argument '(.*?)'", text):
        return f"{found[1]} needs a value" if found[1].startswith("-") else "an argument is missing"
    text = text.removeprefix("Error parsing ")
    text = re.sub(r"no type matching .*- <class '\w+'>: ", "", text)  # the alternatives before the last
    for pattern, meaning in NUMBERS.items():
        text = re.sub(pattern, meaning, text)
    return text or title


def _listed(words: list[str], last: str) -> str:
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


REGISTRY = ConstructorRegistry()


@REGISTRY.primitive_rule
def none_or_none(type_info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """No value is written `none`, or as in Python."""
    if type_info.type is not type(None):
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="{none}", choices=("none", "None"), instance_from_str=lambda args: None,
        is_instance=lambda value: value is None, str_from_instance=lambda value: ["none"],
    )  # fmt: skip
