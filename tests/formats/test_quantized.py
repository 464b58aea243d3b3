"""The type in the middle: what it is made of, what it stands for, and what is none."""

import pytest
import torch
from torch import Tensor

from marlin_tools.quantized import QuantizedLinear


def codes(*shape: int) -> Tensor:
    return torch.full(shape, 9, dtype=torch.uint8)


def scales(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("linear", "rule"),
    [
        ((codes(4, 64).int(), scales(4, 2), 32), r"codes must be uint8 \[N, K\], got torch\.int32 \(4, 64\)"),
        ((codes(64), scales(4, 2), 32), r"codes must be uint8 \[N, K\], got torch\.uint8 \(64,\)"),
        ((codes(2, 4, 64), scales(4, 2), 32), r"codes must be uint8 \[N, K\]"),
        ((codes(4, 64), scales(4, 2), 0), "group_size 0 does not divide K = 64"),
        ((codes(4, 64), scales(4, 64), -1), "group_size -1 does not divide K = 64"),
        ((codes(4, 64), scales(4, 2), 24), "group_size 24 does not divide K = 64"),
        ((codes(4, 64), scales(4, 2).float(), 32), r"scales must be float16 \[4, 2\], got torch\.float32 \(4, 2\)"),
        ((codes(4, 64), scales(4, 2).bfloat16(), 32), r"scales must be float16 \[4, 2\], got torch\.bfloat16"),
        ((codes(4, 64), scales(4, 1), 32), r"scales must be float16 \[4, 2\], got torch\.float16 \(4, 1\)"),
        ((codes(4, 64), scales(2, 4), 32), r"scales must be float16 \[4, 2\]"),
    ],
)
def test_what_does_not_fit_together_is_no_linear(linear: tuple[Tensor, Tensor, int], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        QuantizedLinear(*linear)


def test_rows_are_a_linear_with_the_same_numbers() -> None:
    whole = QuantizedLinear(
        torch.arange(4 * 64, dtype=torch.uint8).view(4, 64) % 16, torch.arange(8).view(4, 2).half() / 8 - 0.5, 32
    )
    some = whole[1:3]

    assert some.shape == (2, 64)
    assert torch.equal(some.dequantize(), whole.dequantize()[1:3])
    assert float(whole.dequantize()[3, 33]) == (1 - 8) * 0.375
