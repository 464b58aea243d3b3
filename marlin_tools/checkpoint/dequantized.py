"""Checkpoints whose weights are stored in 8 or 4 bits by their makers, read as if they were stored in 16.

    fp8      F8_E4M3 codes `x.weight` and a scale for each block of them, `x.weight_scale_inv`: DeepSeek, Qwen; or one for
             all of them, and one for what they read, `x.activation_scale`, which 16 bits do without: Mistral
    mxfp4    E2M1 codes `x_blocks`, two in a byte, and a power of two for every 32 of them, `x_scales`: GPT-OSS

MXFP4 values are exact in bfloat16. FP8 values are multiplied in float32 and rounded once, as their makers do it.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from marlin_tools.checkpoint.headers import TensorInfo
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import ModelError
from marlin_tools.quantized import dtype_name

_SCALES, _READ = "_scale_inv", ".activation_scale"
_BLOCKS, _EXPONENTS = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127
_REAL = {torch.float32, torch.float16, torch.bfloat16}
_BROKEN = "the tensors do not follow the quantization_config; download the model again"


def dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint in 16 bits, if it is stored in a way that can be undone; else as it is."""
    method = (checkpoint.quantization or {}).get("quant_method")
    return DequantizedView(checkpoint) if method in {"fp8", "mxfp4"} else checkpoint


class DequantizedView(Checkpoint):
    """A view of a checkpoint: names, shapes and values of the 16-bit model that its codes stand for."""

    def __init__(self, source: Checkpoint) -> None:
        self.path, self.origin, self._source = source.path, source.origin, source
        self.config: dict[str, Any] = {key: value for key, value in source.config.items() if key != "quantization_config"}
        self._tensors = {name: source.stored(name) for name in source.names()}  # if config.json does not say in which type
        if self.dtype not in {torch.float16, torch.bfloat16, torch.float32}:
            raise ModelError(f"`{source.origin}`: its weights cannot be expanded to {self.dtype}", hint=_BROKEN)
        self._tensors = dict(self._headers())

    def _headers(self) -> list[tuple[str, TensorInfo]]:
        names = set(self._source.names())
        headers = []
        for name in sorted(names):
            stored = self._source.stored(name)
            if name.endswith(_BLOCKS) and (exponents := name.removesuffix(_BLOCKS) + _EXPONENTS) in names:
                _check_pairs(name.removesuffix(_BLOCKS), stored, self._source.stored(exponents))
                experts, rows, groups, half = stored.shape
                headers.append((name.removesuffix(_BLOCKS), self._as_16_bits(stored, (experts, groups * half * 2, rows))))
            elif name + _SCALES in names:
                if (kind := self._source.stored(name + _SCALES).dtype) not in _REAL:
                    raise ModelError(f"`{name}{_SCALES}` is stored as {dtype_name(kind)}, which is no scale here", hint=_BROKEN)
                if stored.dtype != torch.float8_e4m3fn or math.prod(self._source.shape(name + _SCALES)) != 1:
                    _check_blocks(name, stored.dtype, stored.shape, self._source.shape(name + _SCALES), self._block_size)
                headers.append((name, self._as_16_bits(stored, stored.shape)))
            elif stored.dtype.itemsize == 1 and stored.dtype.is_floating_point:
                raise ModelError(f"`{name}` has FP8 codes, but no `{name}{_SCALES}`", hint=_BROKEN)
            elif not self._belongs(name, names):
                headers.append((name, stored))
        return headers

    def _belongs(self, name: str, names: set[str]) -> bool:
        """Whether a tensor holds scales of another."""
        others = (
            (_SCALES, ""),
            (_EXPONENTS, _BLOCKS),
            (_READ, f".weight{_SCALES}"),
        )
        return any(name.endswith(own) and name.removesuffix(own) + other in names for own, other in others)

    def _as_16_bits(self, stored: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
        return TensorInfo(stored.file, shape, self.dtype, math.prod(shape) * self.dtype.itemsize)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, expanded."""
        if name + _BLOCKS in self._source:
            return _from_mxfp4(self._source.read(name + _BLOCKS), self._source.read(name + _EXPONENTS)).to(self.dtype)
        if name in self._source and name + _SCALES in self._source:
            codes, scales = self._source.read(name), self._source.read(name + _SCALES)
            if scales.numel() == 1:
                return (codes.float() * scales.float().reshape(())).to(self.dtype)
            return _from_fp8(codes, scales, self._block_size).to(self.dtype)
        self.stored(name)
        return self._source.read(name)

    def read_pinned(self, name: str) -> Tensor:
        """The same in pinned memory."""
        return self.read(name).pin_memory()

    @property
    def _block_size(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        size = (self._source.quantization or {}).get("weight_block_size")
        if not isinstance(size, list) or len(size) != 2 or not all(type(each) is int and each > 0 for each in size):
            raise ModelError(f"`{self.path / 'config.json'}`: `weight_block_size` is {size!r}, not two sizes", hint=_BROKEN)
        return size[0], size[1]

    @cached_property
    def fingerprint(self) -> str:
        """That of the files as they are."""
        return self._source.fingerprint


def _check_blocks(name: str, dtype: torch.dtype, shape: Sequence[int], scales: Sequence[int], block: tuple[int, int]) -> None:
    """Refuse codes whose scales are not one for each block."""
    wanted = [*shape[:-2], *(-(-size // each) for size, each in zip(shape[-2:], block, strict=False))]
    if len(shape) not in {2, 3} or dtype != torch.float8_e4m3fn or list(scales) != wanted:
        raise ModelError(f"`{name}` is {list(shape)} with scales {list(scales)}, not {wanted}", hint=_BROKEN)


def _check_pairs(name: str, blocks: TensorInfo, exponents: TensorInfo) -> None:
    """Refuse codes [E, N, K/32, 16] whose exponents are not one byte [E, N, K/32] for each 32 of them."""
    if len(blocks.shape) != 4 or {blocks.dtype, exponents.dtype} != {torch.uint8} or blocks.shape[:-1] != exponents.shape:
        raise ModelError(f"`{name}` is {list(blocks.shape)} with exponents {list(exponents.shape)}", hint=_BROKEN)


def _from_fp8(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Codes [N, K], or those of all experts [E, N, K], times the scale of their block; those at the edges may be smaller."""
    height, width = block
    rows, columns = codes.shape[-2:]
    each = scales.float().repeat_interleave(height, -2)[..., :rows, :].repeat_interleave(width, -1)[..., :columns]
    return codes.float() * each


def _from_mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Codes [E, N, K/32, 16] and exponents [E, N, K/32] -> [E, K, N], as transformers holds experts of this kind."""
    values = torch.tensor((*_E2M1, *(-value for value in _E2M1)), dtype=torch.bfloat16)
    pairs = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1).flatten(-2)
    numbers = torch.ldexp(pairs.float(), exponents.int()[..., None] - _BIAS)
    return numbers.flatten(-2).transpose(1, 2).contiguous()
