"""Packed weights of the deterministic engine: a row has equal bits beside any number of other rows."""

from __future__ import annotations

import pytest
import torch

from mistral_7b.kernels.backend import PACKED_LINEAR, Backend, uses
from mistral_7b.quantization import linear
from mistral_7b.quantization.linear import LARGEST, ROWS, PackedLinear, equal_blocks

COUNTS = (1, 15, 16, 17, 63, 300, LARGEST, LARGEST + 49)


def layer(dtype: torch.dtype, inputs: int) -> tuple[PackedLinear, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(200, inputs, generator=draw).to(dtype)
    return PackedLinear(weight, deterministic=True), torch.randn(max(COUNTS), inputs, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("inputs", [48, 576, 4096])
def test_a_row_has_equal_bits_beside_any_number_of_others(dtype: torch.dtype, inputs: int) -> None:
    product, x = layer(dtype, inputs)
    wanted = torch.cat([product(row[None]) for row in x])
    for n in COUNTS:
        assert torch.equal(product(x[-n:]), wanted[-n:])
        assert product(x[-n:].view(n, 1, inputs)).shape == (n, 1, 200)
    near = x.double() @ product.dense().double().T
    torch.testing.assert_close(wanted.double(), near, rtol=0.01, atol=0.01 * inputs**0.5)


@pytest.mark.parametrize("dtype", ROWS)
def test_large_blocks_are_used_only_where_their_bits_are_equal(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, x = layer(dtype, 48)
    least, sizes = ROWS[dtype], []
    multiply = linear._product
    monkeypatch.setattr(linear, "_product", lambda x, *more: sizes.append(len(x)) or multiply(x, *more))
    monkeypatch.setattr(linear, "equal_blocks", lambda *key: key[4] <= 64)
    out = product(x[: 128 + least + 1])
    assert sizes == ([64, 64, 32] if least == 16 else [64, 64, 64])
    sizes.clear()
    monkeypatch.setattr(linear, "equal_blocks", lambda *key: False)
    assert torch.equal(product(x[: 128 + least + 1]), out)
    assert set(sizes) == {least}


def test_the_check_tells_other_orders_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_halves(x: torch.Tensor, weight: torch.Tensor, packs: bool) -> torch.Tensor:
        """Sums of few rows in one order, those of many in another."""
        if len(x) < 64:
            return x @ weight.T
        return x[:, :24] @ weight.T[:24] + x[:, 24:] @ weight.T[24:]

    monkeypatch.setattr(linear, "_product", by_halves)
    check = equal_blocks.__wrapped__
    assert check(torch.float32, 200, 48, False, 16, 1)
    assert not check(torch.float32, 200, 48, False, 64, 1)


def test_large_blocks_are_equal_on_this_machine() -> None:
    if not uses(Backend.ONEDNN, PACKED_LINEAR, torch.empty(0)):
        pytest.skip("float32 weights are not packed on this machine")
    assert equal_blocks(torch.float32, 1536, 576, True, 256, torch.get_num_threads())
