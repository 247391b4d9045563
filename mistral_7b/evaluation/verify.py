"""What is wrong with the files of a model: configuration, weights, tokenizer, chat template, hashes.

Weights are read one tensor at a time, in any format that `from_pretrained` opens, without building the model.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..checkpoint import hub, others, read_args, read_record, starter
from ..checkpoint.gguf.reading import StoredBlocks
from ..checkpoint.reading import CONFIGS, open_checkpoint
from ..errors import CheckpointError, Mistral7BError, TokenizerError
from ..lora import read_adapter
from ..lora.bases import open_base
from ..model import ModelArgs
from ..text.tokenizer import Tokenizer
from ..text.vocabularies.folder import release_of

PART = 1 << 22  # values that are looked at together
OUTLIER = 1000.0  # times the root mean square: no weight of a released model is so large
TEXT = "Hello, world! Ünïcödé 日本 😀\n\tdef f(x):\n        return x\n"
SEEN = 3  # tensors that are named

Mark = Literal["ok", "bad", "note"]
Progress = Callable[[str], object]  # called with what is looked at


class Known(NamedTuple):
    """A weight file whose hash is known."""

    model: str
    size: int  # bytes
    sha256: str


KNOWN = {  # by file name
    "model.safetensors": Known(
        "demo", 15_906_880, "c433e2fbcfb6bf0c3599cb9807246b23b55f722badcb35ed4f7016a670c06a90"
    ),
    starter.WHEEL.weights_name: Known("starter", starter.WHEEL.weights_size, starter.WHEEL.weights_sha256),
}

# A conversation and its ids in the vocabularies of Mistral's releases, recorded from mistral-common 1.13.1. A
# template of another version has other markers, or other blanks beside them.
TURNS = (("user", "Hello"), ("assistant", "Hi there"), ("user", "Who are you?"))
_V3 = [1, 3, 23325, 4, 16127, 1504, 2, 3, 7294, 1228, 1136, 29572, 4]
GOLDEN = {
    "v1": [
        1, 733, 16289, 28793, 22557, 733, 28748, 16289, 28793, 15359, 736, 2, 733, 16289, 28793, 6526, 460, 368,
        28804, 733, 28748, 16289, 28793,
    ],
    "v2": _V3,
    "v3": _V3,
}  # fmt: skip

RELEASED = {  # theta, window and vocabulary of the releases, all of one shape
    (1e4, 4096, 32000): "Mistral 7B v0.1",
    (1e6, None, 32000): "Mistral 7B v0.2",
    (1e6, None, 32768): "Mistral 7B v0.3",
}


@dataclass(frozen=True)
class Finding:
    """The result of one check: "ok", "bad", or a "note" about what is unusual and may be meant."""

    check: str
    mark: Mark
    text: str
    field: str | None = None  # the tensor, key or file at fault


@dataclass
class Report:
    """The findings on a model's files, in the order of the checks."""

    path: str
    format: str = ""
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return all(finding.mark != "bad" for finding in self.findings)

    def add(self, check: str, mark: Mark, text: str, field: str | None = None) -> None:
        self.findings.append(Finding(check, mark, text, field))

    def failed(self, check: str, error: Mistral7BError) -> None:
        """Add an error as a failed check."""
        self.add(check, "bad", str(error), error.field)

    def to_dict(self) -> dict[str, Any]:
        """Return all that it says, for JSON."""
        return {"ok": self.ok, **asdict(self)}


def verify_model(
    source: str | os.PathLike[str] = "demo",
    progress: Progress = lambda what: None,
    adapter: str | os.PathLike[str] | None = None,
) -> Report:
    """Check the files of a model: a folder, a file, a hub id, or a bundled name; and of a LoRA adapter for it.

    Raises HubError or CheckpointError only if there is no checkpoint: what is damaged is a finding.
    """
    path = others.check(hub.resolve(source))
    own = None if adapter is None else hub.resolve_adapter(adapter)
    folder = path if path.is_dir() else path.parent
    gguf = path.suffix == ".gguf" or any(folder.glob("*.gguf"))
    if not gguf and not any((folder / name).is_file() for name in CONFIGS.values()):
        raise others.folder_error(folder)
    report = Report(str(path))
    args = _configuration(path, report)
    _hashes(path, report, progress)
    if args is not None:
        _weights(path, report, progress)
    if args is not None and own is not None:
        progress("adapter")
        path, args = _adapter(own, path, args, report)
    progress("tokenizer")
    _tokenizer(path, args, report)
    return report


def _configuration(path: pathlib.Path, report: Report) -> ModelArgs | None:
    """Read the configuration; theta and the window must make sense together."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            args, report.format = read_args(path)
        except Mistral7BError as error:
            report.failed("configuration", error)
            return None
    report.add("configuration", "ok", f"{report.format}: {args.n_layers} layers, width {args.dim}")
    for warning in said:
        report.add("theta and window", "bad", str(warning.message), "sliding_window")
    window, theta = args.sliding_window, args.rope_theta
    seven = ModelArgs(
        rope_theta=theta, sliding_window=window, vocab_size=args.vocab_size, max_seq_len=args.max_seq_len
    )
    words = f"theta {theta:g}, {'no window' if window is None else f'window {window}'}"
    if said:
        return args
    if args == seven and (theta, window, args.vocab_size) in RELEASED:
        report.add("theta and window", "ok", f"{words}: {RELEASED[theta, window, args.vocab_size]}")
    elif args == seven and theta == 1e4:
        report.add("theta and window", "note", f"{words}: v0.1 has theta 10000 and window 4096", "sliding_window")
    elif window is not None and window >= args.max_seq_len:
        report.add("theta and window", "note", f"{words}: never less than the context", "sliding_window")
    else:
        report.add("theta and window", "ok", words)
    return args


def _hashes(path: pathlib.Path, report: Report, progress: Progress) -> None:
    """Compare the files whose hashes are known."""
    files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
    known = [(f, k) for f in files if (k := KNOWN.get(f.name)) and f.stat().st_size == k.size]
    for file, expected in known:
        progress(f"hash of {file.name}")
        with file.open("rb") as content:
            same = hashlib.file_digest(content, "sha256").hexdigest() == expected.sha256
        text = f"{file.name} is {'' if same else 'not '}that of {expected.model!r}"
        report.add("hash", "ok" if same else "bad", text, None if same else file.name)
    if not known:
        report.add("hash", "note", "none of the files is one whose hash is known")


def _adapter(
    own: pathlib.Path, base: pathlib.Path, args: ModelArgs, report: Report
) -> tuple[pathlib.Path, ModelArgs]:
    """Whether an adapter fits its base, with sound values. Returns the tokenizer's place and the arguments."""
    try:
        adapter = read_adapter(own, args)
    except Mistral7BError as error:
        report.failed("adapter", error)
        return base, args
    of = f", made for {adapter.base_model}" if adapter.base_model else ""
    words = f"rank {adapter.rank} on {len(adapter.targets)} modules{of}" if adapter.targets else f"no factors{of}"
    report.add("adapter", "ok", words)
    tensors = {
        f"{name} ({part})": t for name, f in adapter.targets.items() for part, t in zip("AB", f[:2], strict=True)
    }
    for more in (adapter.magnitudes, adapter.biases, adapter.weights):
        tensors |= more
    looked = [_Values.of(name, "", tensor) for name, tensor in tensors.items()]
    _finding(report, "adapter's values", "bad", "NaN or infinity", [v for v in looked if v.broken])
    if not any(v.largest or v.broken for v in looked if not v.name.endswith("(A)")):
        report.add("adapter's effect", "bad", "every B is zero: it changes nothing", "B")
    return adapter.tokenizer or base, adapter.args(args)


def _finding(report: Report, check: str, mark: Mark, what: str, found: list[_Values]) -> None:
    """Add what is wrong with some tensors, or that it is so with none."""
    if not found:
        report.add(check, "ok", f"no {what}")
        return
    names = ", ".join(v.words for v in found[:SEEN]) + (f" and {len(found) - SEEN} more" if found[SEEN:] else "")
    report.add(check, mark, f"{what}: {names}", found[0].name)


def _weights(path: pathlib.Path, report: Report, progress: Progress) -> None:
    """Names, shapes and types of all tensors, then their values."""
    looked: list[_Values] = []
    try:
        with warnings.catch_warnings(action="ignore"):  # of the configuration, which has been read
            for name, stored, tensor in _tensors(path):
                progress(name)
                looked.append(_Values.of(name, stored, tensor))
    except CheckpointError as error:
        report.failed("tensors", error)
        return
    types = sorted({v.dtype for v in looked})
    report.add(
        "tensors", "ok", f"{len(looked)} tensors with the shapes of the configuration, in {', '.join(types)}"
    )
    checks: tuple[tuple[str, Mark, str, Callable[[_Values], bool]], ...] = (
        ("finite values", "bad", "NaN or infinity", lambda v: v.broken > 0),
        ("zeros", "bad", "tensor of zeros alone", lambda v: not v.broken and v.largest == 0),
        ("outliers", "note", f"value above {OUTLIER:g} times the root mean square", lambda v: v.outlier > OUTLIER),
    )
    for check, mark, what, wrong in checks:
        _finding(report, check, mark, what, [v for v in looked if wrong(v)])


def _tensors(path: pathlib.Path) -> Iterator[tuple[str, str, Tensor]]:
    """Yield name, stored type and values of a checkpoint's tensors, dequantized."""
    if (record := read_record(path)) is not None:
        for name, weight in open_base(path).weights.items():
            tensor = weight.fetch()
            kind = record.scheme.name if tensor.dim() > 1 else str(tensor.dtype).removeprefix("torch.")
            yield name, kind, tensor
        return
    checkpoint = open_checkpoint(path)
    for name, stored in checkpoint.tensors.items():
        kind = stored.kind.name if isinstance(stored, StoredBlocks) else str(stored.dtype).removeprefix("torch.")
        yield name, kind, checkpoint.read(name)
        stored.release()


@dataclass(frozen=True)
class _Values:
    """What the values of a tensor are."""

    name: str
    dtype: str
    broken: int  # NaN and infinities
    largest: float  # absolute value
    outlier: float  # the largest relative to the root mean square

    @property
    def words(self) -> str:
        return f"{self.name} ({self.broken} of them)" if self.broken else self.name

    @classmethod
    def of(cls, name: str, dtype: str, tensor: Tensor) -> _Values:
        broken, largest, squares = 0, 0.0, 0.0
        for part in tensor.reshape(-1).split(PART):
            values = part.float()
            finite = values.isfinite()
            count = int(finite.sum())
            broken += len(values) - count
            if count:
                values = values if count == len(values) else values[finite]
                largest = max(largest, float(values.abs().max()))
                squares += float(values.double().square().sum())
        rms = (squares / max(1, tensor.numel() - broken)) ** 0.5
        return cls(name, dtype, broken, largest, largest / rms if rms else 0.0)


def _tokenizer(path: pathlib.Path, args: ModelArgs | None, report: Report) -> None:
    """The tokenizer must fit the vocabulary of the model, and give back the text that it encoded."""
    try:
        tokenizer = Tokenizer.from_pretrained(path)
        back = tokenizer.decode(tokenizer.encode(TEXT))
    except Mistral7BError as error:
        report.failed("tokenizer", error)
        return
    size = tokenizer.vocab_size
    if args is not None and size > args.vocab_size:
        text = f"{size} tokens, and the vocabulary of the model has {args.vocab_size}: it belongs to another model"
        report.add("tokenizer", "bad", text, "vocab_size")
    elif args is not None and size < args.vocab_size:
        report.add("tokenizer", "note", f"{size} tokens; {args.vocab_size - size} ids of the model have no text")
    else:
        report.add("tokenizer", "ok", f"{size} tokens, as many as the model has")
    if back == TEXT:
        report.add("encoding", "ok", "a text in several scripts is decoded as it was")
    else:
        report.add("encoding", "bad", f"{TEXT!r} is decoded as {back!r}", "tokenizer")
    _template(tokenizer, report)


def _template(tokenizer: Tokenizer, report: Report) -> None:
    """With a vocabulary of Mistral's, a template with [INST] must write the ids of that release."""
    if tokenizer.chat is None:
        report.add("chat template", "note", "none: the model is not made for conversations, or its files lack it")
        return
    try:
        ids = tokenizer.encode_chat([{"role": role, "content": text} for role, text in TURNS])
    except TokenizerError as error:
        report.failed("chat template", error)
        return
    name = pathlib.PurePath(tokenizer.chat.name).name
    version = release_of(tuple(tokenizer.vocabulary.names))
    if version is None or "[INST]" not in (tokenizer.chat.source or "[INST]"):
        report.add(
            "chat template", "ok", f"{name}: writes a conversation; there are no recorded ids to compare with"
        )
    elif ids == GOLDEN[version]:
        report.add("chat template", "ok", f"{name}: the recorded ids of {version}")
    else:
        text = f"{name}: not the ids of {version}, to which the vocabulary belongs"
        report.add("chat template", "bad", text, "chat_template")
