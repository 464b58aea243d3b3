"""Which sparse kernel multiplies, for a shape on a GPU: as `dispatch.py` does it for the dense ones, with tables of its own."""

from marlin_tools.ops.linear.dispatch import CUBLAS, TableRow, Tables
from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES

SPARSE = Tables(
    "dispatch-24.json",
    SPARSE_TILES,
    TableRow(4096, 4096, (8, 16, 32, 256, 257), ("8x64", "16x128", "32x256", "64x256", CUBLAS)),
)

choices_on, choose, possible = SPARSE.choices_on, SPARSE.choose, SPARSE.possible
