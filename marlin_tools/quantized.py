"""The one neutral type in the middle: algorithms produce it, formats store it, kernels multiply with it.

Shape letters used throughout the project:  N outputs, K inputs, G columns that share a scale, so K/G groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ZERO = 8
"""The code of the value 0: value = (code - ZERO) * scale."""


@dataclass(frozen=True)
class QuantizedLinear:
    """The weight of one linear layer on the INT4 grid.

    codes       uint8 [N, K], 0..15
    scales      float16 [N, K/G]; a negative scale is legal and turns the grid around (levels +8 .. -7 times |scale|)
    group_size  G; equal to K when each output column has one scale

    2:4 sparsity is a property of the codes (`is_2_4`), not a field, so that nothing can get out of step.
    """

    codes: Tensor
    scales: Tensor
    group_size: int

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.codes.ndim != 2:
            raise ValueError(f"codes must be uint8 [N, K], got {self.codes.dtype} {tuple(self.codes.shape)}")
        n, k = self.codes.shape
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"group_size {self.group_size} does not divide K = {k}")
        if self.scales.dtype != torch.float16 or self.scales.shape != (n, k // self.group_size):
            raise ValueError(
                f"scales must be float16 [{n}, {k // self.group_size}], got {self.scales.dtype} {tuple(self.scales.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), as in `nn.Linear.weight`."""
        n, k = self.codes.shape
        return n, k

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that this stands for; the product is formed in float32 and rounded once."""
        values = (self.codes.to(torch.int8) - ZERO).to(torch.float32)
        scales = self.scales.to(torch.float32).repeat_interleave(self.group_size, dim=1)
        return (values * scales).to(dtype)

    def is_2_4(self) -> bool:
        """At least two of every four neighbouring inputs are zero."""
        n, k = self.codes.shape
        if k % 4:
            return False
        zeros = (self.codes == ZERO).view(n, k // 4, 4).sum(dim=2)
        return bool((zeros >= 2).all())

    def to(self, device: torch.device | str) -> "QuantizedLinear":
        """The same weights on another device."""
        return QuantizedLinear(self.codes.to(device), self.scales.to(device), self.group_size)
