"""The one neutral type in the middle: algorithms produce it, formats store it, kernels multiply with it.

Beside it stands what the other operand of a product can be: activations in 16 bits, or rounded to FP8.

Shape letters used throughout the project:  N outputs, K inputs, G columns that share a scale, so K/G groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

LEVELS = 16
"""Codes of the grid, 0 .. LEVELS - 1. Kernels are given both numbers; only how many codes fit a word is bound to four bits."""
ZERO = LEVELS // 2
"""The code of the value 0: value = (code - ZERO) * scale."""

ActivationType = Literal["16bit", "fp8"]
"""What a linear multiplies its weight with: its input as it is, or `rounded`."""
_LARGEST = torch.finfo(torch.float8_e4m3fn).max
_FIRST_ROWS = 16


def rounded(x: Tensor) -> Tensor:
    """What FP8 holds of activations [..., K]: e4m3 numbers times one float32 scale for each token, its absmax / 448.

    The product is rounded to the type of `x`, so in float32 it is exact. A token of zeros stays zeros; one that holds an
    infinity or a NaN becomes NaN as a whole.
    """
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True) / _LARGEST
    codes = (wide / scale.where(scale > 0, 1.0)).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def round_inputs(module: nn.Module) -> nn.Module:
    """Let a linear read `rounded` inputs from now on; the same module. Gradients pass the rounding as if there were none."""
    if not rounds_inputs(module):
        module.register_forward_pre_hook(_rounding)
    return module


@contextmanager
def rounding_inputs(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within, these linears read `rounded` inputs."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(_rounding).remove)
        yield


def rounds_inputs(module: nn.Module) -> bool:
    """Whether it does."""
    return _rounding in module._forward_pre_hooks.values()  # noqa: SLF001  (torch has no public way to ask)


def _rounding(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    x = args[0]
    read = rounded(x.detach())
    return (x + (read - x).detach() if x.requires_grad else read, *args[1:])


def pack_nibbles(codes: Tensor, dtype: torch.dtype = torch.int32) -> Tensor:
    """uint8 codes 0..15 [..., C] to words [..., C / codes per word], the first code of a word in its lowest four bits.

    Built as bytes and then viewed, so that no sign bit is computed with (hosts and files are both little-endian).
    """
    return (codes[..., 0::2] | codes[..., 1::2] << 4).contiguous().view(dtype)


def unpack_nibbles(words: Tensor) -> Tensor:
    """Words of any integer type back to uint8 codes, as many along the last axis as the words hold."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(-2)


def quads(matrix_nk: Tensor) -> Tensor:
    """[N, K] as [N, K/4, 4], a view: of 2:4 sparsity, every four neighbouring inputs of an output."""
    n, k = matrix_nk.shape
    return matrix_nk.view(n, k // 4, 4)


def is_2_4(matrix_nk: Tensor) -> bool:
    """At most two nonzeros (or trues) in every quad."""
    return matrix_nk.shape[1] % 4 == 0 and bool(((quads(matrix_nk) != 0).sum(dim=2) <= 2).all())


def are_2_4(matrices: Sequence[Tensor]) -> list[bool]:
    """`is_2_4` of each, all with as many inputs. For those whose first rows deny it already a device is asked but once."""
    if not matrices or matrices[0].shape[1] % 4:
        return [False] * len(matrices)
    rows = min(_FIRST_ROWS, *map(len, matrices))
    heads = torch.stack([matrix[:rows] for matrix in matrices])
    kept = (heads.view(len(matrices), -1, 4) != 0).sum(dim=2)
    maybe = (kept <= 2).all(dim=1).tolist()
    return [could and is_2_4(matrix) for could, matrix in zip(maybe, matrices, strict=True)]


def dtype_name(dtype: torch.dtype | None) -> str:
    """`float16`, as config.json and people write it."""
    return str(dtype).removeprefix("torch.")


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
        scales = self.scales.to(torch.float32)[..., None]
        values.unflatten(1, (scales.shape[1], self.group_size)).mul_(scales)  # in place: the values may be large
        return values.to(dtype)

    def __getitem__(self, rows: slice) -> "QuantizedLinear":
        """Some of its outputs."""
        return QuantizedLinear(self.codes[rows], self.scales[rows], self.group_size)

    def is_2_4(self) -> bool:
        """At least two of every four neighbouring inputs are zero."""
        return is_2_4(self.codes != ZERO)

    def to(self, device: torch.device | str) -> "QuantizedLinear":
        """The same weights on another device."""
        return QuantizedLinear(self.codes.to(device), self.scales.to(device), self.group_size)
