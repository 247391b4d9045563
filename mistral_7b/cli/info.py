"""`mistral-7b info`: describe a checkpoint and its memory requirements."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import pathlib
from typing import TYPE_CHECKING, Any

from .inputs import DType, ModelName, UsageError, read_flags

if TYPE_CHECKING:
    from rich.table import Table

    from ..model import ModelArgs

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True)
class Info:
    """Show a checkpoint's release, shape, tokenizer, sizes and memory requirements; loads no weights."""

    model: ModelName = "demo"
    """A folder, a file, a hub id, "starter" or "demo"."""
    context: int | None = None
    """Context length for the size of the KV cache; None: the model's maximum."""
    dtype: DType = "bfloat16"
    """Type of weights and cache."""
    json: bool = False
    """Print one JSON object."""


def run(argv: list[str]) -> int:
    args = read_flags(Info, "info", argv)
    if args.context is not None and args.context < 1:
        raise UsageError(f"--context must be at least 1, not {args.context}", field="--context")
    from ..checkpoint import hub

    hub.find(args.model)  # before PyTorch is imported
    from ..checkpoint import read_args, read_record

    path = configuration(args.model)
    model_args, form = read_args(path)
    facts = describe(model_args, args.context or model_args.max_seq_len, args.dtype)
    facts = {"model": args.model, "path": str(path), "format": form, "disk_bytes": disk_bytes(path), **facts}
    facts |= card(path)
    if (record := read_record(path)) is not None:
        facts |= {"weights_bytes": record.nbytes, "quantization": record.config()}
    facts["tokenizer"] = tokenizer_of(path)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console

    Console().print(table(facts))
    return 0


def configuration(source: str) -> pathlib.Path:
    """Return the path of a model; for one on the hub, download only its configuration and tokenizer."""
    from ..checkpoint import hub

    if source != "demo" and not pathlib.Path(source).expanduser().exists() and hub.REPO_ID.fullmatch(source):
        import huggingface_hub

        with contextlib.suppress(Exception):  # `resolve` fails in the same way, with a clear error
            wanted = [*hub.CONFIG_FILES, *hub.TOKENIZER_NAMES]
            return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=wanted))
    return hub.resolve(source)


def tokenizer_of(path: pathlib.Path) -> dict[str, Any]:
    """Return the facts of a model's tokenizer; {"error": ...} if it has none that can be opened."""
    from ..errors import Mistral7BError
    from ..text.facts import tokenizer_facts
    from ..text.tokenizer import Tokenizer
    from ..text.vocabularies.files import stop_ids_of

    try:
        return dict(tokenizer_facts(Tokenizer.from_pretrained(path), stop_ids_of(path)))
    except Mistral7BError as error:
        return {"error": str(error)}


def tokenizer_rows(facts: dict[str, Any]) -> dict[str, str]:
    """Return table rows on a tokenizer and its chat template."""
    from ..text.facts import NO_TEMPLATE

    if "error" in facts:
        return {"tokenizer": facts["error"]}
    added = f", {facts['added_tokens']} of them added" if facts["added_tokens"] else ""
    chat, words = facts["chat"], NO_TEMPLATE
    if chat is not None:
        tools, system = ("" if chat[name] else "no " for name in ("tools", "system"))
        words = f"{chat['name']}; {tools}tools, {system}system messages"
    return {
        "tokenizer": f"{facts['kind']} ({facts['file']}), {facts['vocab_size']:,} tokens{added}",
        "chat template": words,
        "generation ends at": ", ".join(f"{end['token']} ({end['id']})" for end in facts["ends"]) or "no token",
    }


def release(args: ModelArgs) -> str:
    """Return the release that has this shape, or "custom"."""
    from ..model import ModelArgs

    for name in ("v0_1", "v0_2", "v0_3"):
        known: ModelArgs = getattr(ModelArgs, name)()
        if dataclasses.replace(args, max_seq_len=known.max_seq_len) == known:
            return f"Mistral 7B {name.replace('_', '.')}"
    return "custom"


def describe(args: ModelArgs, context: int, dtype: str) -> dict[str, Any]:
    """Return the sizes in bytes of the weights and of one sequence's cache at `context` tokens."""
    from ..checkpoint.names import OUTPUT, expected  # a model on the device "meta" would take a second of imports

    size = BYTES[dtype]
    parameters = sum(
        math.prod(shape) for name, shape in expected(args) if not (args.tie_embeddings and name == OUTPUT)
    )
    per_token = 2 * args.n_layers * args.n_kv_heads * args.head_dim * size  # a key and a value
    ring = context if args.sliding_window is None else min(context, args.sliding_window)
    return {
        "release": release(args),
        "args": dataclasses.asdict(args),
        "parameters": parameters,
        "dtype": dtype,
        "weights_bytes": parameters * size,
        "context": context,
        "cache_bytes_per_token": per_token,
        "cache_tokens": ring,
        "cache_bytes": per_token * ring,
        "cache_bytes_without_window": per_token * context,
    }


def disk_bytes(path: pathlib.Path) -> int:
    """Return the size of a file, or of the files in a folder (following links), in bytes."""
    files = [path] if path.is_file() else [f for f in path.iterdir() if f.is_file()]
    return sum(f.stat().st_size for f in files)


def card(path: pathlib.Path) -> dict[str, str]:
    """Return the path of the model card beside the weights and the license that its front matter names, if any."""
    file = (path if path.is_dir() else path.parent) / "README.md"
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    front = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    licenses = [
        line.removeprefix("license:").strip() for line in front.splitlines() if line.startswith("license:")
    ]
    return {"card": str(file), **({"license": licenses[0]} if licenses else {})}


def table(facts: dict[str, Any]) -> Table:
    """Return the facts as a table."""
    from rich.table import Table
    from rich.text import Text

    a, quantization = facts["args"], facts.get("quantization")
    stored = quantization["scheme"] if quantization else facts["dtype"]
    window = a["sliding_window"]
    rows = {
        "release": facts["release"],
        "path": facts["path"],
        "format": facts["format"],
        "on disk": readable(facts["disk_bytes"]),
        **{name: facts[name] for name in ("license", "card") if name in facts},
        "parameters": f"{facts['parameters']:,}",
        "window": f"{window:,} tokens a layer" if window else "none: full causal attention",
        **{name: f"{value:,}" if isinstance(value, int) else f"{value:g}" for name, value in a.items()
           if name not in ("sliding_window", "tie_embeddings", "rope_scaling")},
        "tie_embeddings": "yes" if a["tie_embeddings"] else "no",
        **({"rope_scaling": scaling_text(a["rope_scaling"])} if a["rope_scaling"] else {}),
        **tokenizer_rows(facts["tokenizer"]),
        **(quantization_rows(quantization) if quantization else {}),
        f"weights in {stored}": readable(facts["weights_bytes"]),
        f"cache at {facts['context']:,} tokens": f"{readable(facts['cache_bytes'])}"
        f" ({facts['cache_tokens']:,} x {readable(facts['cache_bytes_per_token'])})",
    }  # fmt: skip
    if window and facts["cache_bytes_without_window"] > facts["cache_bytes"]:
        rows["    without the window"] = readable(facts["cache_bytes_without_window"])
    rows["weights and cache"] = readable(facts["weights_bytes"] + facts["cache_bytes"])
    out = Table(title=Text(facts["model"]), show_header=False, title_justify="left")
    out.add_column(style="bold", no_wrap=True)
    out.add_column(overflow="fold")
    for name, value in rows.items():
        out.add_row(name, Text(value))
    return out


def scaling_text(scaling: dict[str, Any]) -> str:
    """Return a scaled rotary embedding in words."""
    original = f", from {scaling['original_max_seq_len']:,} tokens" if scaling["original_max_seq_len"] else ""
    return f"{scaling['type']}, factor {scaling['factor']:g}{original}"


def quantization_rows(quantization: dict[str, Any]) -> dict[str, str]:
    """Return table rows on a checkpoint's quantization, from its `quantization_config`."""
    d, kind = quantization["distance"], quantization["scheme"]
    calibration = quantization["calibration"] or {"none": "rounded to nearest"}
    return {
        "quantization": kind,
        "calibration": ", ".join(f"{name}: {value}" for name, value in calibration.items()),
        "distance": f"KL {d['kl']:.4g}, top-1 agreement {d['top1_agreement']:.1%}, perplexity "
        f"{d['perplexity_original']:.4g} -> {d['perplexity']:.4g}",
        "    measured on": f"{d['tokens']:,} tokens of {d['text']}",
    }


def readable(n: int) -> str:
    """Format a number of bytes with a decimal unit: 14.5 GB is 14.5e9."""
    size = float(n)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
