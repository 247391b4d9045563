"""A model divided among 1, 2 and 4 processes on loopback: its logits, caches and engine, beside one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from processes import run
from refusals import refused
from tiny import tiny_args, tiny_model, tokens_of

from mistral_7b import LLM, SamplingParams
from mistral_7b.distributed import ranks
from mistral_7b.distributed.tensor_parallel import parallelize
from mistral_7b.engine.parallel import check_alone
from mistral_7b.errors import ConfigError, EngineError
from mistral_7b.quantization import quantize

ARGS = tiny_args(dim=64, n_heads=8, n_kv_heads=4, head_dim=16, hidden_dim=96, vocab_size=70)
TOKENS = tokens_of((2, 20), ARGS)
PROMPTS = [[1, 2, 3], list(range(1, 21))]
SCHEMES = ("int8", "int4", "q4_k_m", None)


def outputs(scheme: str | None) -> dict[str, Any]:
    """Logits of a whole prompt and by a ring in three parts, what the engine generates, the shape of its pages."""
    model = tiny_model(ARGS, torch.bfloat16 if scheme else torch.float32)
    if scheme:
        quantize(model, scheme)
    torch.manual_seed(100 * (1 + ranks.rank()))  # a request without a seed draws one, which ranks must agree on
    parallelize(model)
    with torch.no_grad():
        whole, cache = model(TOKENS)[0], model.rolling_cache(2)
        parts = [model(TOKENS[:, i:j], cache)[0] for i, j in ((0, 17), (17, 18), (18, 20))]
    llm = LLM(model)
    sampled = llm.generate(PROMPTS, SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True))
    return {
        "logits": torch.stack([whole, torch.cat(parts, 1)]).numpy(),
        "tokens": [o.outputs[0].token_ids for o in sampled],
        "heads": llm.engine.pool.layers[0][0].shape[2],
    }


def all_outputs() -> list[dict[str, Any]]:
    return [outputs(scheme) for scheme in SCHEMES]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Any]]:
    """What each rank found, by the number of ranks."""
    import torch.distributed.tensor.parallel  # once, before processes fork  # noqa: F401

    folder = tmp_path_factory.mktemp("ranks")
    return {size: run(size, all_outputs, folder) for size in (1, 2, 4)}


@pytest.mark.parametrize("place", range(len(SCHEMES)), ids=str)
def test_logits_of_every_world_size(found: dict[int, list[Any]], place: int) -> None:
    """Bit-equal in block formats, within the contract's tolerance in float32."""
    wanted = torch.tensor(found[1][0][place]["logits"])
    for size in (2, 4):
        for rank in found[size]:
            logits = torch.tensor(rank[place]["logits"])
            if SCHEMES[place]:
                assert torch.equal(logits, wanted)
            else:
                torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


def test_all_ranks_generate_the_same_and_cache_their_own_heads(found: dict[int, list[Any]]) -> None:
    for size, of_ranks in found.items():
        for place in range(len(SCHEMES)):
            assert {rank[place]["heads"] for rank in of_ranks} == {4 // size}
            assert all(rank[place]["tokens"] == found[1][0][place]["tokens"] for rank in of_ranks)


def test_what_does_not_divide_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ConfigError, field="tensor_parallel"):
        LLM(tiny_model(), tensor_parallel=2)  # not under torchrun
    for number in (0, -1, 1.5, "2"):
        with refused(ConfigError, field="tensor_parallel"):
            LLM(tiny_model(), tensor_parallel=number)  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "3")
    with refused(ConfigError, field="tensor_parallel"):
        parallelize(tiny_model(ARGS))
    with refused(EngineError, field="adapters"):
        check_alone("adapters")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused(ConfigError, field="tensor_parallel"):  # no whole tiles
        parallelize(quantize(tiny_model(tiny_args(n_kv_heads=2, n_heads=4)), "int8"))
