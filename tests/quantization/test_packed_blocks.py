"""Packed weights of the deterministic engine: a row has equal bits beside any number of other rows."""

from __future__ import annotations

import pytest
import torch

from mistral_7b.kernels.backend import PACKED_LINEAR, Backend, uses
from mistral_7b.quantization import linear
from mistral_7b.quantization.linear import BLOCKS, ROWS, PackedLinear, equal_blocks

CPU = torch.device("cpu")

COUNTS = (1, 2, 3, 15, 16, 17, 63, 300, 512, 561)


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
    assert product(x[0]).shape == (200,)
    assert product(x[:0]).shape == (0, 200)
    near = x.double() @ product.dense().double().T
    torch.testing.assert_close(wanted.double(), near, rtol=0.01, atol=0.01 * inputs**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_other_blocks_are_used_only_where_their_bits_are_equal(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    product, x = layer(dtype, 48)
    rows, used = ROWS[dtype], []
    multiply = linear._product
    monkeypatch.setattr(linear, "_product", lambda x, *more: used.append(len(x)) or multiply(x, *more))

    def blocks(allowed: set[int], n: int) -> list[int]:
        monkeypatch.setattr(linear, "equal_blocks", lambda *key: {s for s in key[5] if s == rows or s in allowed})
        used.clear()
        assert torch.equal(product(x[:n]), wanted[:n])
        return list(used)

    wanted = torch.cat([product(part) for part in x.split(rows)])
    assert blocks(set(), 2 * rows + 1) == [rows] * 3
    assert blocks({2, 64, 256}, 321) == [256, 64, 2]
    assert blocks({8, 32}, 7) == [8]
    assert blocks({8, 32}, 31) == [32]
    assert blocks({2, 4, 8}, 1) == [2]


def test_the_check_tells_other_orders_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x: torch.Tensor, weight: torch.Tensor, packs: bool) -> torch.Tensor:
        """Sums of blocks below 4 and of 64 rows in one order, those of others in another."""
        if 4 <= len(x) < 64:
            return x @ weight.T
        return x[:, :24] @ weight.T[:24] + x[:, 24:] @ weight.T[24:]

    monkeypatch.setattr(linear, "_product", product)
    check = equal_blocks.__wrapped__
    assert check(torch.float32, CPU, False, 200, 48, BLOCKS[0], 1) >= {16}
    assert 2 not in check(torch.float32, CPU, False, 200, 48, BLOCKS[0], 1)
    assert 64 not in check(torch.float32, CPU, False, 200, 48, BLOCKS[1], 1)


def test_other_blocks_are_equal_on_a_machine_that_packs() -> None:
    """Or steps would take the time of blocks of ROWS rows."""
    if not uses(Backend.ONEDNN, PACKED_LINEAR, torch.empty(0)):
        pytest.skip("float32 weights are not packed on this machine")
    shape, threads = (1536, 576), torch.get_num_threads()
    found = [equal_blocks(torch.float32, CPU, True, *shape, sizes, threads) for sizes in BLOCKS]
    assert {8, 128, 512} <= frozenset().union(*found)
