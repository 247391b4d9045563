"""Which chat template a model has: from the files of its folder, by name, or Mistral's own.

Of several, "tool_use" renders conversations with tools and "default" all others, as in transformers.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from ..checkpoint.chat_templates import Source, chat_templates
from ..checkpoint.gguf import transformers_templates
from ..checkpoint.json_files import read_text
from ..errors import TokenizerError
from .chat_template import ChatTemplate
from .template_library import MISTRAL, TEMPLATES
from .vocabularies.folder import release_of

MARKERS = re.compile(r"\s*(<s>|</s>|\[/?INST\])\s*")


@dataclass(frozen=True)
class Choice:
    """The chosen template. `mistral` is the version of mistral-common's templates, in place of a text."""

    default: Source | None = None
    tool_use: Source | None = None
    mistral: str | None = None

    def load(self, special: Mapping[str, str], controls: Collection[str]) -> ChatTemplate:
        """Compile the template for a vocabulary. Raises TokenizerError for one that is invalid."""
        assert self.default is not None, "mistral-common's templates are not loaded here"
        tool_use = None
        if self.tool_use is not None:
            tool_use = ChatTemplate(
                self.tool_use.text, name=self.tool_use.name, special=special, controls=controls
            )
        return ChatTemplate(
            self.default.text, name=self.default.name, special=special, controls=controls, tool_use=tool_use
        )


def find_template(folder: str | os.PathLike[str] | None, name: str | None = None) -> Choice | None:
    """Return the template of a folder, or the one that `name` says; None if the folder brings none.

    `name` is one of the folder's named templates, a name of template_library, or a file. Raises TokenizerError for
    files that cannot be read, for several templates without a default, and for an unknown name.
    """
    found = chat_templates(pathlib.Path(folder)) if folder is not None else {}
    if name is None:
        if not found:
            return None
        if "default" not in found:
            raise TokenizerError(
                f"brings the chat templates {', '.join(sorted(found))}, and none is the default",
                field="chat_template",
                place=folder,
                hint="name one with --chat-template",
            )
        return Choice(found["default"], found.get("tool_use"))
    if name in found:
        return Choice(found[name])
    if name in MISTRAL:
        return Choice(mistral=MISTRAL[name])
    if name in TEMPLATES:
        return Choice(Source(TEMPLATES[name], name))
    path = pathlib.Path(name)
    if path.is_file():
        return Choice(Source(read_text(path, TokenizerError), str(path)))
    names = sorted((*found, *TEMPLATES, *MISTRAL))
    raise TokenizerError(
        f"there is no chat template {name!r}: neither a file nor one of {', '.join(names)}", field="chat_template"
    )


def no_template(place: str | os.PathLike[str]) -> TokenizerError:
    """Return the error for a conversation with a model that brings no chat template."""
    return TokenizerError(
        "this model brings no chat template, so that it is not known how it was trained to converse",
        field="messages",
        place=place,
        hint=f"name one with --chat-template: a Jinja file, or one of {', '.join((*TEMPLATES, *MISTRAL))}",
    )


# Mistral's own releases: their templates mean what mistral-common encodes, whose ids are exact.

PROBES = (("user",), ("user", "assistant", "user"), ("system", "user"), ("system", "user", "assistant", "user"))
KINDS = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


def mistral_version(
    pieces: Sequence[str], template: ChatTemplate | None, folder: str | os.PathLike[str]
) -> str | None:
    """Return the version of mistral-common's template that a model has, None if it is another's.

    `pieces` are all pieces of the vocabulary, in order: they must be those of one of Mistral's own. `template` is
    the folder's own; it must write what mistral-common encodes, but for blanks at the markers. Without one, the
    folder must be in Mistral's layout. With the template that this package writes for v3, any pieces do.
    """
    if template is not None and template.source == transformers_templates.V3:
        return "v3"
    version = release_of(tuple(pieces))
    if version is None:
        return None
    if template is None:
        return version if (pathlib.Path(folder) / "params.json").is_file() else None
    return version if all(_writes(template, version, roles) for roles in PROBES) else None


def _writes(template: ChatTemplate, version: str, roles: Sequence[str]) -> bool:
    """Return whether a template writes a conversation as mistral-common does, or refuses a system message."""
    messages = [{"role": role, "content": f"Probe{i}"} for i, role in enumerate(roles)]
    try:
        text = template.render(messages).text
    except TokenizerError:
        return roles[0] == "system"  # as those of early releases
    return MARKERS.sub(r"\1", text) == _encoded(version, tuple(roles))


@functools.lru_cache
def _encoded(version: str, roles: tuple[str, ...]) -> str:
    """Return the text that mistral-common encodes for a conversation of `_writes`, without blanks at markers."""
    messages = [KINDS[role](content=f"Probe{i}") for i, role in enumerate(roles)]
    tokenizer = _mistral_tokenizer(version)
    ids = tokenizer.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    text = tokenizer.decode(ids, special_token_policy=SpecialTokenPolicy.KEEP)
    return MARKERS.sub(r"\1", text.replace("\u2581", " ").replace("<0x0A>", "\n"))


def _mistral_tokenizer(version: str) -> MistralTokenizer:
    tokenizer: MistralTokenizer = getattr(MistralTokenizer, version)()
    return tokenizer
