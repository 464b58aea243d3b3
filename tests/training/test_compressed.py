"""A 2:4 linear that holds its kept values only: the same function, the same gradients, and zeros that cannot come back."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marlin_tools.algorithms.masks import two_largest
from marlin_tools.training.compressed import CompressedLinear, compress, expand, positions_of, with_mask_of

N, K = 12, 32


@pytest.fixture
def mask() -> Tensor:
    """Every pair of positions, and quads that keep one weight or none."""
    kept = two_largest(torch.randn(N, K, generator=torch.Generator().manual_seed(0)))
    kept[0, :4] = torch.tensor([False, False, True, False])
    kept[1, 4:8] = torch.tensor([True, False, False, False])
    kept[2, 8:12] = False
    return kept


def test_expanding_undoes_compressing(mask: Tensor) -> None:
    weight = torch.randn(N, K) * mask
    assert torch.equal(expand(compress(weight, positions_of(mask)), positions_of(mask)), weight)


def test_whatever_the_values_are_the_mask_holds(mask: Tensor) -> None:
    assert not bool(expand(torch.ones(N, K // 2), positions_of(mask))[~mask].any())
    assert bool((expand(torch.ones(N, K // 2), positions_of(mask))[mask] == 1).all())


def test_a_mask_that_keeps_three_is_refused() -> None:
    with pytest.raises(ValueError, match="more than two"):
        positions_of(torch.tensor([[True, True, True, False]]))


def test_output_and_gradient_are_those_of_the_masked_linear(mask: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(N, K, generator=generator), torch.randn(5, K, generator=generator)
    bias, goal = torch.nn.Parameter(torch.randn(N, generator=generator)), torch.randn(5, N, generator=generator)
    plain = (weight * mask).requires_grad_()
    F.mse_loss(F.linear(x, plain * mask, bias), goal).backward()
    linear = CompressedLinear.of(weight * mask, mask, bias)
    F.mse_loss(linear(x), goal).backward()
    torch.testing.assert_close(linear(x), F.linear(x, plain, bias))
    torch.testing.assert_close(expand(linear.values.grad, positions_of(mask)), plain.grad)


def test_steps_with_decay_bring_no_zero_back(mask: Tensor) -> None:
    linear = CompressedLinear.of(torch.randn(N, K) * mask, mask)
    adam = torch.optim.AdamW(linear.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(5):
        linear(torch.randn(7, K)).square().sum().backward()
        adam.step()
        adam.zero_grad()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert not bool(linear.weight(dtype)[~mask].any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_rounds_to_zero_stays_visible(dtype: torch.dtype) -> None:
    old = torch.tensor([[0.5, 0.0, -0.5, 0.0]], dtype=dtype)
    new = with_mask_of(old, torch.tensor([[1e-40, 0.0, -0.25, 0.0]]))
    assert torch.equal(new != 0, old != 0)
    assert new[0, 2] == -0.25
    assert 0 < float(new[0, 0]) < 1e-7


def test_half_of_the_weights_are_parameters(mask: Tensor) -> None:
    linear = CompressedLinear.of(torch.randn(N, K), mask)
    assert [parameter.numel() for parameter in linear.parameters()] == [N * K // 2]
    assert linear.positions.nbytes == N * K // 4
