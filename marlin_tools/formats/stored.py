"""The quantised linears of a checkpoint, whatever format they are stored in."""

import shlex
from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import FormatError
from marlin_tools.formats import find_format
from marlin_tools.quantized import QuantizedLinear


class StoredLinears:
    """Reads the quantised linears of `checkpoint` one at a time; `format` is how they lie there."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        if checkpoint.quantization is None:
            raise FormatError(
                f"`{checkpoint.origin}` is not quantised: config.json has no quantization_config",
                hint=f"run `marlin-tools quantize {shlex.quote(checkpoint.origin)}` first",
            )
        self.checkpoint = checkpoint
        self.format = find_format(checkpoint.quantization)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of all quantised linears, sorted."""
        marker = f".{self.format.suffixes[0]}"
        return tuple(name.removesuffix(marker) for name in self.checkpoint.names() if name.endswith(marker))

    @cached_property
    def tensors(self) -> frozenset[str]:
        """The names of all tensors that belong to quantised linears."""
        return frozenset(f"{name}.{suffix}" for name in self.names for suffix in self.format.suffixes)

    def raw(self, name: str) -> Mapping[str, Tensor]:
        """The stored tensors of one linear by suffix."""
        return {suffix: self.checkpoint.read(full) for suffix, full in self.places(name).items()}

    def places(self, name: str) -> dict[str, str]:
        """The names of the stored tensors of one linear, by suffix; an error if some tools leave out what we need."""
        for suffix in self.format.left_out:
            if f"{name}.{suffix}" not in self.checkpoint:
                raise FormatError(
                    f"`{name}` is stored without `{suffix}`, which readers of `{self.format.name}` go by",
                    hint="some tools leave it out: quantise the original again with one that does not, or with `marlin-tools`",
                )
        return {suffix: f"{name}.{suffix}" for suffix in self.format.suffixes}

    def read(self, name: str) -> QuantizedLinear:
        """One linear in the neutral form; an error in it names it."""
        raw = self.raw(name)
        try:
            return self.format.unpack(raw, self.format.shape_of(raw))
        except FormatError as error:
            raise FormatError(f"`{name}`: {error.message}", hint=error.hint) from error
