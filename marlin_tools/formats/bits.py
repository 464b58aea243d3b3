"""Reordering of 4-bit codes; with packing (`pack_nibbles`) all that a weight layout is made of.

What a tensor core wants looks wild as an index formula, but every layout here only moves *digits* of the row and
column index: cut both indices into digits, write the digits in another order, and the new place is known. In torch that is
`view`, `permute`, `reshape`, with no index table, and the inverse permutation of the same digits is the exact inverse.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True)
class Shuffle:
    """A fixed reordering of the elements of a matrix, told by the digits of their indices.

    rows     the digits of the row index below its leading one, most significant first; the leading digit has any size
    columns  the same for the column index
    order    the digits, numbered from 0 through the row's and then the column's, from slowest to fastest in the new place
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    order: tuple[int, ...]

    def apply(self, matrix: Tensor) -> Tensor:
        """The elements of the matrix in their new order, as one row."""
        return matrix.reshape(self._digits(matrix.shape)).permute(self.order).reshape(-1)

    def undo(self, elements: Tensor, shape: Sequence[int]) -> Tensor:
        """The matrix of this shape whose elements `apply` put into this order."""
        digits = self._digits(shape)
        places = [self.order.index(digit) for digit in range(len(digits))]
        return elements.reshape([digits[digit] for digit in self.order]).permute(places).reshape(*shape)

    def _digits(self, shape: Sequence[int]) -> list[int]:
        n_rows, n_columns = shape
        return [n_rows // prod(self.rows), *self.rows, n_columns // prod(self.columns), *self.columns]
