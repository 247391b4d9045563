"""Facts about the loaded model that /v1/models reports: the precision of its weights, and its chat template."""

from __future__ import annotations

from pathlib import Path

from ...checkpoint.chat_templates import chat_templates
from ...checkpoint.gguf import file as gguf_file
from ...checkpoint.gguf.vocabulary import TEMPLATE
from ...checkpoint.hub import DEMO
from ...errors import CheckpointError, TokenizerError
from ...model import Mistral7B
from ...quantization.gpu import Fp8Linear, GpuBlockLinear
from ...quantization.linear import BlockLinear
from ...quantization.schemes import scheme_of
from ...text.tokenizer import Tokenizer


def precision(model: Mistral7B) -> str:
    """The weights' quantization, such as "int8", or their type if they are not quantized, such as "bfloat16"."""
    if scheme := scheme_of(model):
        return str(scheme)
    for module in model.modules():
        if isinstance(module, (BlockLinear, GpuBlockLinear)):
            return module.kind
        if isinstance(module, Fp8Linear):
            return "fp8"
    return str(model.norm.weight.dtype).removeprefix("torch.")


def has_chat_template(source: Path | None, tokenizer: Tokenizer | None) -> bool | None:
    """Whether the model has a chat template of its own; False marks a base model, None means unknown.

    Mistral's templates are told by the vocabulary, which base models share: for them the files decide.
    """
    if tokenizer is None or tokenizer.chat is None:
        return False
    if tokenizer.chat.version is None:
        return True
    if source is None:
        return None
    if source.resolve() == DEMO.resolve():
        return False
    try:
        if source.is_file() and gguf_file.is_gguf(source):
            return TEMPLATE in gguf_file.read(source).metadata
        folder = source if source.is_dir() else source.parent
        if chat_templates(folder):
            return True
        return False if (folder / "tokenizer_config.json").is_file() else None
    except (CheckpointError, TokenizerError):
        return None


def calls_tools(tokenizer: Tokenizer | None) -> bool:
    """Whether tools can be offered to the model, and its calls be told from text."""
    chat = None if tokenizer is None or not tokenizer.tool_syntax.known else tokenizer.chat
    return chat is not None and chat.supports_tools
