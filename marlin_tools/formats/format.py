"""What a weight format is, and the checks that all of them share.

A format turns a `QuantizedLinear` into the tensors that a checkpoint stores for it, and back, bit for bit, so a loss-free
conversion is `b.pack(a.unpack(tensors, shape))`. Letters: N outputs, K inputs, G columns per scale (`group_size`).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_tools.errors import FormatError
from marlin_tools.formats.config import Spelling, flat_config, grouped_config, spelling_of
from marlin_tools.quantized import ActivationType, QuantizedLinear, dtype_name

_BROKEN = "the tensors do not follow the format that config.json names; download or export the checkpoint again"


@dataclass(frozen=True)
class Format(ABC):
    """One layout of 4-bit weights on disk.

    name       what users call it
    suffixes   names of its tensors, after the name of the linear and a dot
    spellings  the (quant_method, layout) pairs by which checkpoints announce it; the first is the one written
    left_out   those of them that some writers do without
    says       what its config.json can say of the activations
    mixes      whether its config.json can give linears groups of different sizes
    """

    name: str
    suffixes: tuple[str, ...]
    spellings: tuple[Spelling, ...]
    left_out: tuple[str, ...] = ()
    says: tuple[ActivationType, ...] = ("16bit",)
    mixes: bool = False

    @abstractmethod
    def limits(self, n: int, k: int, group_size: int, *, sparse: bool | None = None) -> str | None:
        """Why this format cannot hold such a linear, or None. `group_size` -1 is per column; `sparse` None is not known yet."""

    @abstractmethod
    def pack(self, linear: QuantizedLinear, model_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """The stored tensors by suffix. `model_dtype` matters only to a format that stores scales in it."""

    def pack_all(
        self, linear: QuantizedLinear, rows: Mapping[str, slice], model_dtype: torch.dtype = torch.float16
    ) -> dict[str, dict[str, Tensor]]:
        """The stored tensors of several linears, by name, that lie under each other in one; `rows` are those of each."""
        return {name: self.pack(linear[own], model_dtype) for name, own in rows.items()}

    @abstractmethod
    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> QuantizedLinear:
        """The linear of shape (N, K) that these tensors, by suffix, store. Exact inverse of `pack`."""

    @abstractmethod
    def shape_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """(N, K) of the linear that these tensors store."""

    def quantization_config(self, group_size: int, ignore: Sequence[str]) -> dict[str, Any]:
        """`quantization_config` for config.json. `group_size` -1 is per column, `ignore` names the unquantized linears."""
        method, layout = self.spellings[0]
        grouped = method == "compressed-tensors"
        return grouped_config(layout, group_size, ignore) if grouped else flat_config(method, layout, group_size, ignore)

    def recognize(self, quantization_config: Mapping[str, Any]) -> bool:
        """Whether a checkpoint with this `quantization_config` says that it is laid out like this."""
        return spelling_of(quantization_config) in self.spellings

    def admit(self, n: int, k: int, group_size: int) -> None:
        """Raise FormatError if such a linear is outside the limits."""
        if reason := self.limits(n, k, group_size):
            raise FormatError(
                f"format `{self.name}`: {reason}",
                hint="choose another `--format` or `--group-size`, or leave the linear out with `--ignore`",
            )

    def admit_activations(self, activations: ActivationType) -> None:
        """Raise FormatError if config.json could not say it, so that a reader would take the model for another."""
        if activations not in self.says:
            raise FormatError(
                f"format `{self.name}` cannot say that activations are FP8",
                hint="choose format `compressed-tensors`, or quantise with 16-bit activations",
            )

    def take(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors in the order of `suffixes`; all of them, and no others."""
        if missing := [f"`{suffix}`" for suffix in self.suffixes if suffix not in tensors]:
            raise FormatError(f"format `{self.name}`: no tensor {', '.join(missing)}", hint=_BROKEN)
        if unknown := [f"`{suffix}`" for suffix in tensors if suffix not in self.suffixes]:
            raise FormatError(f"format `{self.name}`: unknown tensor {', '.join(unknown)}", hint=_BROKEN)
        return [tensors[suffix] for suffix in self.suffixes]


def indivisible(count: int, what: str, unit: int) -> str | None:
    """The reason why so many inputs or outputs do not fill whole units, or None."""
    return f"{count} {what} are not a multiple of {unit}" if count % unit else None


def ungroupable(k: int, group_size: int, only: int | None = None) -> str | None:
    """The reason why K inputs cannot share scales by this group_size (`only` this one or per column), or None."""
    if group_size in (-1, k):
        return None
    if group_size < 1 or only not in (None, group_size):
        return f"group_size {group_size} is neither {only or 'positive'} nor -1 (per column)"
    return f"{k} inputs are not a multiple of group_size {group_size}" if k % group_size else None


def matrix_size(name: str, tensor: Tensor) -> tuple[int, int]:
    """Rows and columns; FormatError for a tensor that has no such thing."""
    if tensor.ndim != 2:
        raise FormatError(f"`{name}` has shape {list(tensor.shape)}, not two dimensions", hint=_BROKEN)
    rows, columns = tensor.shape
    return rows, columns


def group_size_of(k: int, groups: int) -> int:
    """G, from the number of scales that each output has."""
    if groups < 1 or k % groups:
        raise FormatError(f"{groups} scales per output do not divide {k} inputs evenly", hint=_BROKEN)
    return k // groups


def expect(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> None:
    """Raise FormatError unless the tensor has this shape and, if one is given, this type."""
    if tuple(tensor.shape) != tuple(shape):
        raise FormatError(f"`{name}` has shape {list(tensor.shape)}, not {list(shape)}", hint=_BROKEN)
    if dtype not in (None, tensor.dtype):
        raise FormatError(f"`{name}` is {dtype_name(tensor.dtype)}, not {dtype_name(dtype)}", hint=_BROKEN)


def cast_exactly(name: str, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The same numbers in another type; FormatError if one of them has no exact place there."""
    if scales.dtype == dtype:
        return scales
    if not scales.is_floating_point():
        raise FormatError(f"`{name}` is {dtype_name(scales.dtype)}, not a floating-point type", hint=_BROKEN)
    cast = scales.to(dtype)
    lost = scales[cast.double() != scales.double()]
    if len(lost):
        raise FormatError(
            f"`{name}`: {len(lost)} of {scales.numel()} scales are not exact in {dtype_name(dtype)}, first {lost[0].item():g}",
            hint="quantize the original model again: scales are chosen among the numbers that float16 and bfloat16 share",
        )
    return cast
