"""replace_linears: every Linear that is picked is replaced once, in place, and nothing else."""

from __future__ import annotations

import torch
from tiny import tiny_model, tokens_of
from torch import Tensor, nn

from mistral_7b.cache import Stateless
from mistral_7b.surgery import replace_linears


class Doubled(nn.Module):
    """A replacement that keeps the old Linear inside, as LoRA does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


def test_all_linears_of_a_model_by_their_names() -> None:
    model = tiny_model()
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7 * 2 + 1
    assert replace_linears(model, lambda linear, name: Doubled(linear)) == linears
    assert not isinstance(model.output, nn.Linear)
    assert replace_linears(model, lambda linear, name: linear) == [f"{name}.inner" for name in linears]


def test_only_those_that_are_picked() -> None:
    model, tokens = tiny_model(), tokens_of((19,))
    before = model(tokens, Stateless(8))[0]
    picked = replace_linears(model, lambda linear, name: Doubled(linear), lambda name, m: name == "output")
    assert picked == ["output"]
    torch.testing.assert_close(model(tokens, Stateless(8))[0], 2 * before)


def test_one_is_let_go_before_the_next_is_built() -> None:
    model = tiny_model()
    seen: list[nn.Module] = []

    def build(linear: nn.Module, name: str) -> nn.Module:
        assert all(m not in set(model.modules()) for m in seen)
        seen.append(linear)
        return Doubled(nn.Linear(linear.in_features, linear.out_features))

    replace_linears(model, build)
    assert len(seen) == 15
