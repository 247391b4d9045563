"""Hub ids, with a hub server on loopback. Each download runs in its own process."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from hub_server import SHA, Hub, serving
from refusals import refused
from tiny import tiny_args, tiny_model

from mistral_7b import CheckpointError, HubError, Mistral7B
from mistral_7b.checkpoint import hub as names
from mistral_7b.lora.files import Adapter, Factors, read_adapter, save_adapter

REPO, GATED = "someone/Tiny-7B", "someone/gated"
PULL = """
import sys
from mistral_7b.checkpoint import hub
from mistral_7b.errors import HubError
try:
    adapter = sys.argv[-1] == "--adapter"
    print(hub.pull(*(word for word in sys.argv[1:] if word != "--adapter"), adapter=adapter))
except HubError as error:
    print("HubError:", error)
assert "torch" not in sys.modules
"""
V0_3 = [
    ".gitattributes", "README.md", "config.json", "consolidated.safetensors", "generation_config.json",
    "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
    "model.safetensors.index.json", "params.json", "special_tokens_map.json", "tokenizer.json", "tokenizer.model",
    "tokenizer.model.v3", "tokenizer_config.json",
]  # fmt: skip
V0_1 = [
    ".gitattributes", "README.md", "config.json", "generation_config.json", "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors", "model.safetensors.index.json", "pytorch_model-00001-of-00002.bin",
    "pytorch_model-00002-of-00002.bin", "pytorch_model.bin.index.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
]  # fmt: skip


def test_only_the_needed_files_are_selected() -> None:
    unneeded = {".gitattributes", "README.md", "consolidated.safetensors"}
    assert set(names.needed_files(V0_3)) == set(V0_3) - unneeded
    assert set(V0_1) - set(names.needed_files(V0_1)) == {
        ".gitattributes", "README.md", "pytorch_model.bin.index.json",
        "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin",
    }  # fmt: skip
    own = ["params.json", "consolidated.00.pth", "tokenizer.model", "README.md"]
    assert names.needed_files(own) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    assert names.needed_files(["config.json", "x.Q4_K_M.gguf", "README.md"]) == ["config.json", "x.Q4_K_M.gguf"]
    assert names.needed_files(["x.Q4_K_M.gguf", "x.Q8_0.gguf", "README.md"]) == []
    assert names.needed_files(["model.safetensors", "x.Q8_0.gguf"]) == ["model.safetensors"]
    assert names.needed_files(["config.json", "one.safetensors"]) == ["config.json", "one.safetensors"]
    assert names.needed_files(["config.json", "one.safetensors", "two.safetensors"]) == []


def test_local_names_need_no_hub(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names.resolve() == names.resolve("demo") == names.DEMO
    assert names.resolve(tmp_path) == names.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert names.resolve("owner/name") == pathlib.Path("owner/name")
    for wrong in (
        "no-such-folder",
        "/no/such/folder",
        "./nobody",
        "../nobody",
        "a/b/c",
        tmp_path / "x",
        "owner/näme",
        "",
    ):
        with refused(CheckpointError, place=wrong):
            names.resolve(wrong)
    with refused(HubError, field="repo_id"):
        names.pull("just-a-name")


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """A small model in both layouts, as in v0.3's repositories. Its first shard has 14 MB."""
    folder = tmp_path_factory.mktemp("repos")
    model = tiny_model(tiny_args(vocab_size=90_001), torch.float32)
    both = folder / "both"
    model.save_pretrained(both, max_shard_size="16MB")
    model.save_pretrained(folder / "own", format="mistral")
    for path in (folder / "own").iterdir():
        shutil.copy(path, both)
    (both / "tokenizer.model.v3").write_bytes(b"a tokenizer")
    (both / "README.md").write_text("hello")
    (folder / "gguf").mkdir()
    narrow = tiny_model(tiny_args(dim=64, head_dim=32, hidden_dim=96))
    for type in ("f16", "q8_0"):
        with pytest.warns(UserWarning, match="has no tokenizer"):
            narrow.save_pretrained(folder / "gguf" / f"x.{type}.gguf", format="gguf", type=type)
    return {REPO: both, GATED: both, "someone/own": folder / "own", "someone/gguf": folder / "gguf"}


@pytest.fixture
def hub(repos: dict[str, pathlib.Path]) -> Iterator[Hub]:
    with serving(repos) as server:
        yield server


def pull(home: pathlib.Path, endpoint: str, *what: str, **env: str) -> str:
    """Return the output of a process that pulls `what` with HF_HOME and HF_ENDPOINT set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    run = subprocess.run(
        [sys.executable, "-c", PULL, *what], capture_output=True, text=True, timeout=120,
        env={**clean, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **env},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def weights(path: str | pathlib.Path) -> dict[str, torch.Tensor]:
    return dict(Mistral7B.from_pretrained(path, dtype=torch.float32).state_dict())


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_pull_downloads_one_copy_of_the_weights_and_resumes(
    tmp_path: pathlib.Path, hub: Hub, repos: dict[str, pathlib.Path]
) -> None:
    hub.cut_after["model-00001-of-00002.safetensors"] = 12_000_000
    folder = pathlib.Path(pull(tmp_path, hub.url, REPO))
    assert folder.is_relative_to(tmp_path)
    assert folder.name == SHA
    wanted = sorted(names.needed_files(path.name for path in repos[REPO].iterdir()))
    assert "consolidated.safetensors" not in wanted
    assert hub.downloads() == sorted(p.name for p in folder.iterdir()) == wanted
    # The client keeps received chunks of 10 MiB, and requests the rest.
    resumed = [(path.rsplit("/", 1)[1], range) for _, path, range in hub.asked if range]
    assert resumed == [("model-00001-of-00002.safetensors", f"bytes={10 * 2**20}-")]
    for name in wanted:
        assert (folder / name).read_bytes() == (repos[REPO] / name).read_bytes()
    assert same(weights(folder), weights(repos[REPO]))

    hub.asked.clear()
    assert pull(tmp_path, hub.url, REPO) == str(folder)  # again, without a second download
    assert hub.downloads() == []
    assert pull(tmp_path, hub.url, REPO, HF_HUB_OFFLINE="1") == str(folder)
    assert pull(tmp_path, "http://127.0.0.1:9", REPO) == str(folder)  # and with the hub unreachable


def test_mistrals_layout_is_downloaded(tmp_path: pathlib.Path, hub: Hub, repos: dict[str, pathlib.Path]) -> None:
    folder = pull(tmp_path, hub.url, "someone/own")
    assert hub.downloads() == ["consolidated.safetensors", "params.json"]
    assert same(weights(folder), weights(repos[REPO]))


def test_a_gated_model_raises_with_a_hint(tmp_path: pathlib.Path, hub: Hub) -> None:
    hub.gated[GATED] = "secret"
    for token in ({}, {"HF_TOKEN": "wrong"}):
        said = pull(tmp_path, hub.url, GATED, **token)
        assert said.startswith(f"HubError: {GATED} is gated; accept its terms at {hub.url}/{GATED}")
        assert "hf auth login" in said
    assert pull(tmp_path, hub.url, GATED, HF_TOKEN="secret").endswith(SHA)


def test_missing_models_and_files_raise(tmp_path: pathlib.Path, hub: Hub) -> None:
    assert "no such model" in pull(tmp_path, hub.url, "someone/nothing")
    assert f"{REPO} has no revision 'v9'" in pull(tmp_path, hub.url, REPO, "v9")
    said = pull(tmp_path, hub.url, "someone/gguf")
    assert said == "HubError: someone/gguf has 2 GGUF files; name one, such as someone/gguf/x.f16.gguf"
    said = pull(tmp_path, hub.url, "someone/gguf", "main", "y.gguf")
    assert "someone/gguf has no file y.gguf; it has x.f16.gguf, x.q8_0.gguf" in said


def test_an_adapter_is_downloaded_without_a_model(
    tmp_path: pathlib.Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, lora = tiny_args(), tmp_path / "lora"
    factors = Factors(torch.ones(4, args.dim), torch.ones(args.n_heads * args.head_dim, 4), 2.0)
    save_adapter(Adapter({"layers.0.attention.wq": factors}), lora, args)
    for name in ("adapter_model.bin", "optimizer.pt", "README.md", "model.safetensors", "tokenizer.model"):
        (lora / name).write_bytes(b"x")
    hub.repos["someone/lora"] = lora
    said = pull(tmp_path / "home", hub.url, "someone/lora", "--adapter", HF_HUB_OFFLINE="1")
    assert said.startswith("HubError: someone/lora is not completely in the cache")
    assert "`mistral-7b pull someone/lora --adapter`" in said
    folder = pathlib.Path(pull(tmp_path / "home", hub.url, "someone/lora", "--adapter"))
    assert hub.downloads() == ["adapter_config.json", "adapter_model.safetensors", "tokenizer.model"]
    assert pull(tmp_path / "home", hub.url, "someone/lora", "--adapter", HF_HUB_OFFLINE="1") == str(folder)
    assert "someone/own is a model, not a LoRA adapter" in pull(tmp_path, hub.url, "someone/own", "--adapter")
    (lora / "model.safetensors").unlink()
    assert "someone/lora is a LoRA adapter, not a model" in pull(tmp_path, hub.url, "someone/lora")
    asked = []
    monkeypatch.setattr(names, "pull", lambda repo, adapter: asked.append((repo, adapter)) or folder)
    assert read_adapter("someone/lora", args).targets.keys() == {"layers.0.attention.wq"}
    assert asked == [("someone/lora", True)]
    for wrong in ("./someone/lora", "lora", pathlib.Path("someone/lora")):
        with refused(CheckpointError, place=wrong):
            read_adapter(wrong, args)


def test_one_gguf_file_is_downloaded_by_name(
    tmp_path: pathlib.Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pathlib.Path(pull(tmp_path, hub.url, "someone/gguf", "main", "x.q8_0.gguf"))
    assert found.read_bytes() == (hub.repos["someone/gguf"] / "x.q8_0.gguf").read_bytes()
    assert hub.downloads() == ["x.q8_0.gguf"]
    assert pull(tmp_path, hub.url, "someone/gguf", "main", "x.q8_0.gguf", HF_HUB_OFFLINE="1") == str(found)
    asked = []
    monkeypatch.setattr(names, "pull", lambda repo, file: asked.append((repo, file)) or found)
    assert Mistral7B.from_pretrained("someone/gguf/deep/x.gguf").args.dim == 64
    assert asked == [("someone/gguf", "deep/x.gguf")]


def test_offline_and_unreachable_raise_with_a_hint(tmp_path: pathlib.Path, hub: Hub) -> None:
    said = pull(tmp_path, hub.url, REPO, HF_HUB_OFFLINE="1")
    assert said.startswith(f"HubError: {REPO} is not completely in the cache at {tmp_path}")
    assert f"mistral-7b pull {REPO}" in said
    assert hub.asked == []
    said = pull(tmp_path, "http://127.0.0.1:9", REPO)
    assert said.startswith(f"HubError: {REPO} could not be downloaded from http://127.0.0.1:9: ")
    assert "run it again" in said


def test_an_incomplete_snapshot_is_not_a_model(tmp_path: pathlib.Path, hub: Hub) -> None:
    folder = pathlib.Path(pull(tmp_path, hub.url, REPO))
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert pull(tmp_path, hub.url, REPO, HF_HUB_OFFLINE="1").startswith(f"HubError: {REPO} is not completely")
    assert pull(tmp_path, hub.url, REPO) == str(folder)
    assert (folder / "model-00002-of-00002.safetensors").exists()
