"""How linears are stored while a model is worked on: as codes and scales in a format, or as they were."""

from dataclasses import dataclass

from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.solved import Solved
from marlin_tools.formats import Format
from marlin_tools.stream.inventory import Inventory


@dataclass(frozen=True)
class CodeStore:
    """Linears as codes and scales in a format."""

    format: Format
    checkpoint: Checkpoint
    joins: bool = False

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Those of the format."""
        return self.format.suffixes

    def tensors(self, solved: Solved) -> dict[str, Tensor]:
        """Packed."""
        return {
            f"{name}.{suffix}": tensor
            for piece, places in solved.pieces()
            for name, packed in self.format.pack_all(piece.linear, places, self.checkpoint.dtype).items()
            for suffix, tensor in packed.items()
        }

    def weight(self, stored: dict[str, Tensor], like: Tensor) -> Tensor:
        """The values of the codes and scales."""
        n, k = like.shape
        return self.format.unpack(stored, (n, k)).dequantize(like.dtype)


@dataclass(frozen=True)
class DenseStore:
    """Linears as the original stores them, so that what reads the one reads the other."""

    inventory: Inventory
    suffixes: tuple[str, ...] = ("weight",)
    joins: bool = True

    def tensors(self, solved: Solved) -> dict[str, Tensor]:
        """In the type that the original has here."""
        return {f"{name}.weight": each.dense.to(self.inventory.dtype(name)) for name, each in solved.each()}

    def weight(self, stored: dict[str, Tensor], like: Tensor) -> Tensor:
        """As it was written."""
        return stored["weight"]
