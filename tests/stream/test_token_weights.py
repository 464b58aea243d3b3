"""What tokens count for: alike, but for those that are far longer than most."""

import pytest
import torch

from marlin_tools.stream.token_weights import LONGEST, token_weights


def tokens(lengths: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    direction = torch.randn(len(lengths), 64, generator=torch.Generator().manual_seed(0)).to(torch.float64)
    direction /= direction.norm(dim=-1, keepdim=True)
    return (direction * torch.tensor(lengths, dtype=torch.float64)[:, None]).to(dtype)[None]


def test_tokens_of_like_length_count_alike_to_the_last_bit() -> None:
    weights = token_weights(tokens([0.3, 1.0, 2.0, 3.9, 1.0, 0.0]))
    assert (1, 6, 1) == tuple(weights.shape)
    assert torch.equal(torch.ones(1, 6, 1), weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_long_token_counts_as_if_it_were_as_long_as_the_longest_may_be(dtype: torch.dtype) -> None:
    hidden = tokens([500.0, 1.0, 1.0, 1.0, 5.0, 1.0, 0.5], dtype)
    weights = token_weights(hidden)
    assert weights.dtype == torch.float32
    lengths = (hidden.float() * weights).norm(dim=-1)[0]
    torch.testing.assert_close(lengths[[0, 4]], torch.tensor([LONGEST, LONGEST]), rtol=1e-2, atol=0)
    assert torch.equal(torch.ones(5), weights[0, [1, 2, 3, 5, 6], 0])


def test_lengths_that_16_bits_do_not_hold_are_lengths() -> None:
    hidden = torch.full((1, 3, 64), 2.0, dtype=torch.float16)
    hidden[0, 0] = 60000.0  # its square is infinite
    weight = float(token_weights(hidden)[0, 0, 0])
    assert weight == pytest.approx(LONGEST * 2 / 60000, rel=1e-3)


def test_where_most_tokens_are_nothing_all_count() -> None:
    assert torch.equal(torch.ones(1, 4, 1), token_weights(tokens([0.0, 0.0, 0.0, 7.0])))
