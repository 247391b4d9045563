"""The server that the tests of this package share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("llguidance")
sys.path.insert(0, str(Path(__file__).parent))

from serving import Serving, serving

from mistral_7b.lora.files import Adapter, Factors


@pytest.fixture(scope="package")
def server() -> Iterator[Serving]:
    """A server without keys, with an adapter "sql"."""
    import torch

    with serving() as it:
        args, draw = it.llm.engine.model.args, torch.Generator().manual_seed(7)
        a = torch.randn(4, args.dim, generator=draw)
        b = torch.randn(args.n_heads * args.head_dim, 4, generator=draw)
        targets = {"layers.0.attention.wq": Factors(a, b, 2.0)}
        it.llm.engine.adapters.load("sql", Adapter(targets))
        yield it
        it.idle()


@pytest.fixture(scope="module")
def taught() -> Iterator[Serving]:
    """A server whose model was trained to call a tool."""
    from caller import trained

    with serving(trained=trained()) as it:
        yield it
        it.idle()
