"""Whatever the package writes is there whole or not at all, and a disk that is full is one sentence."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from full_disk import below, full_at_every_write
from refusals import refused
from tiny import TINY, tiny_model, tokens_of

from mistral_7b import WriteError
from mistral_7b.bench.records import write_json
from mistral_7b.checkpoint import convert, hub, quantize
from mistral_7b.cli.conversation import Conversation
from mistral_7b.files import atomic_write
from mistral_7b.lora import merge
from mistral_7b.lora.files import Adapter, Factors, save_adapter
from mistral_7b.training.curve import draw_curve
from mistral_7b.training.vocabulary import train_vocabulary


def adapter() -> Adapter:
    return Adapter({"layers.0.attention.wo": Factors(torch.ones(2, 60), torch.ones(40, 2), 2.0)})


def conversation(path: Path) -> None:
    one = Conversation("be brief")
    one.add_turn("1 + 1?", "2")
    one.save(str(path))


def picture(path: Path) -> None:
    assert draw_curve([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], path)


def vocabulary(path: Path) -> None:
    train_vocabulary(["def f(x):\n    return x\n" * 40], 290, path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in Hugging Face's format, with a tokenizer's file beside it that is taken along."""
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_model().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


WORKS: dict[str, Callable[[Path, Path], object]] = {
    "huggingface": lambda source, out: tiny_model().save_pretrained(out, max_shard_size="20KB"),
    "mistral": lambda source, out: tiny_model().save_pretrained(out, format="mistral"),
    "gguf": lambda source, out: tiny_model().save_pretrained(out / "made.gguf", format="gguf"),
    "convert": lambda source, out: convert(source, out, to="mistral"),
    "convert to gguf": lambda source, out: convert(source, out, to="gguf", type="bf16"),
    "quantize": lambda source, out: quantize(source, out, "int4", tokens_of((1, 9)), "random tokens"),
    "merge": lambda source, out: merge(source, adapter(), out, tokens_of((1, 9)), max_shard_size="20KB"),
    "adapter": lambda source, out: save_adapter(adapter(), out, TINY),
    "adapter of mistral-finetune": lambda source, out: save_adapter(adapter(), out, TINY, format="mistral"),
    "adapter in gguf": lambda source, out: save_adapter(adapter(), out / "made.gguf", TINY, format="gguf"),
    "conversation": lambda source, out: conversation(out),
    "records": lambda source, out: write_json(out, []),
    "picture": lambda source, out: picture(out.with_suffix(".png")),
    "vocabulary": lambda source, out: vocabulary(out),
}


@pytest.mark.filterwarnings("ignore:no tokenizer.model")
@pytest.mark.parametrize("name", WORKS)
def test_a_disk_that_is_full_at_any_write_leaves_nothing(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_text("of another")
    writes = full_at_every_write(tmp_path, lambda: WORKS[name](source, tmp_path / "out"), monkeypatch, "out")
    assert writes >= 2, "something was written, and closed"
    assert any(path.startswith("out") for path in below(tmp_path))


@pytest.mark.parametrize("name", ["conversation", "records", "vocabulary"])
def test_what_is_written_over_stays_until_the_new_is_whole(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> object:
        return WORKS[name](source, tmp_path / "out")

    work()
    assert full_at_every_write(tmp_path, work, monkeypatch, "out") >= 2


def archived(path: Path, refusal: OSError, error: Exception) -> None:
    """What torch does: it closes its archive while the system's refusal is raised, and that fails by itself."""
    with atomic_write(path):
        try:
            raise refusal
        finally:
            raise error


def test_a_library_that_hides_the_refusal_is_seen_through(tmp_path: Path) -> None:
    error = RuntimeError("unexpected pos 64 vs 0")
    with refused(WriteError, place=tmp_path / "out") as caught:
        archived(tmp_path / "out", OSError(errno.EDQUOT, "Disk quota exceeded"), error)
    assert caught.value.hint
    with pytest.raises(RuntimeError, match="unexpected pos"):
        archived(tmp_path / "out", OSError(errno.ESRCH, "No such process"), error)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:no tokenizer.model")
@pytest.mark.parametrize("to", ["mistral", "gguf"])
def test_a_source_that_cannot_be_read_is_not_said_to_be_the_place(
    to: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs" / "tokenizer.model"

    def unreadable(*where: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(theirs))

    monkeypatch.setattr("mistral_7b.checkpoint.writing.TokenizerFiles.write", unreadable)
    monkeypatch.setattr("mistral_7b.checkpoint.gguf.writing._metadata", unreadable)
    with pytest.raises(PermissionError) as caught:
        convert(source, tmp_path / "out", to=to)
    assert caught.value.filename == str(theirs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.wording
def test_a_download_onto_a_full_disk_is_no_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*where: object, **named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", full)
    with pytest.raises(
        WriteError, match=r"some/model could not be written to .* \(No space left on device\); free"
    ):
        hub.pull("some/model")


LIMITED = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
from mistral_7b.cli import main
raise SystemExit(main({argv!r}))
"""


def command(*argv: str, size: int = resource.RLIM_INFINITY, **options: object) -> subprocess.CompletedProcess:
    """The command in a process that may write no file larger than `size` bytes."""
    code = LIMITED.format(size=size, argv=list(argv))
    return subprocess.run(
        [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **options
    )  # type: ignore[call-overload]


def test_convert_under_a_limit_of_the_system_is_one_sentence(source: Path, tmp_path: Path) -> None:
    done = command("convert", str(source), str(tmp_path / "out"), "--to", "mistral", size=20_000)
    said = done.stderr.strip()
    assert (done.returncode, said.count("\n")) == (1, 0)
    assert said.startswith(f"mistral-7b: {tmp_path / 'out'}: cannot be written (File too large)")
    assert "ulimit -f" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_an_output_that_is_full_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        done = command("info", "demo", "--json", stdout=full)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr == (
        "mistral-7b: the output: No space left on device; free some space there, or name another place\n"
    )
