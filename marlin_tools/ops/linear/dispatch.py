"""Which kernel multiplies, for a shape on a GPU: read from tables that were measured, not computed.

`kernels/dispatch.json` holds one table per GPU (`gpu_of`): for some weight shapes and some numbers of rows, the fastest choice.
`bench.kernels.tune` makes one for the GPU at hand, which then lies beside the compiled kernels; its shapes win over the shipped
ones. A shape takes the row of the nearest measured shape (in log N and log K), and M the nearest measured number of rows that
is not smaller; where its choice has no room for a shape, that of the next number. A choice is a name of a tile, or `cublas`:
dequantise, then call cuBLAS; the table names it wherever it is fastest, so nothing falls below it.

The functions of this module are about the dense kernels; `sparse_dispatch.py` has the same for the sparse ones.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import torch

from marlin_tools.ops.linear.tiles import TILES, Tile
from marlin_tools.ops.runtime.cubin_cache import default_dir
from marlin_tools.ops.runtime.target import capability_of, target_of
from marlin_tools.resources import kernels_dir

_log = logging.getLogger(__name__)

CUBLAS = "cublas"
"""The choice that is not a kernel of ours: dequantise and multiply with cuBLAS."""

_MODELS = ("H200",)
"""GPUs whose tables are others than those of their target: faster memory, and other kernels are the fastest."""


@cache
def gpu_of(device: torch.device) -> str:
    """Whose table a device has: its target, such as `sm_90a`, and for some models their name as well."""
    name = torch.cuda.get_device_name(device)
    return " ".join([target_of(device), *(model for model in _MODELS if model in name.split())])


def _capability(gpu: str) -> int:
    return capability_of(gpu.split(maxsplit=1)[0])


@dataclass(frozen=True)
class TableRow:
    """The winners for one weight shape: `choices[i]` for up to `rows[i]` rows; the last one holds from there on."""

    n: int
    k: int
    rows: tuple[int, ...]
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.choices) or not self.rows or list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"rows {self.rows} and choices {self.choices} do not match")


class Tables:
    """The tables of one family of kernels. `by_design` serves GPUs that nobody has measured: what the tiles are made for. The
    first one counts of which all choices run on the GPU.
    """

    def __init__(self, file: str, tiles: Mapping[str, Tile], *by_design: TableRow) -> None:
        self._file, self.tiles, self._by_design = file, tiles, by_design
        self.table = lru_cache(maxsize=None)(self._table)
        self.choose = lru_cache(maxsize=4096)(self._choose)

    def choices_on(self, gpu: str) -> tuple[str, ...]:
        """Everything that can run on a GPU."""
        return (*(name for name, tile in self.tiles.items() if tile.runs_on(_capability(gpu))), CUBLAS)

    def has_room(self, gpu: str, choice: str, m: int, k: int) -> bool:
        """Whether a choice can multiply so many rows of so many inputs."""
        return choice == CUBLAS or self.tiles[choice].fits(m, k, _capability(gpu))

    def tuned_path(self) -> Path:
        """Where the table measured on this machine lies."""
        return default_dir() / self._file

    def check(self, rows: Sequence[TableRow]) -> None:
        """Raise ValueError if a table names what does not exist."""
        unknown = {choice for row in rows for choice in row.choices} - set(self.tiles) - {CUBLAS}
        if unknown:
            raise ValueError(f"unknown choices {sorted(unknown)}")

    def _table(self, gpu: str) -> tuple[TableRow, ...]:
        """The shipped rows for a GPU, those that were tuned here in their place; by design if there are none."""
        path = kernels_dir() / self._file
        shipped = self._read(path, gpu) or self._read(path, gpu.split(maxsplit=1)[0])
        try:
            tuned = self._read(self.tuned_path(), gpu)
        except (ValueError, KeyError, TypeError) as error:
            _log.warning("`%s` is ignored, tune again: %s", self.tuned_path(), error)
            tuned = ()
        rows = {(row.n, row.k): row for row in (*shipped, *tuned)}
        return tuple(rows.values()) or (self._designed_for(gpu),)

    def _designed_for(self, gpu: str) -> TableRow:
        known = self.choices_on(gpu)
        return next((row for row in self._by_design if set(row.choices) <= set(known)), self._by_design[0])

    def _read(self, path: Path, gpu: str) -> tuple[TableRow, ...]:
        if not path.is_file():
            return ()
        found = json.loads(path.read_text(encoding="utf-8")).get(gpu, [])
        rows = tuple(TableRow(r["n"], r["k"], tuple(r["rows"]), tuple(r["choices"])) for r in found)
        self.check(rows)
        return rows

    def tuned_with(self, gpu: str, measured: Sequence[TableRow]) -> str:
        """The file of this machine's tables with these rows in it; earlier ones of other shapes and GPUs stay."""
        path = self.tuned_path()
        try:
            tables = {known: {(r.n, r.k): r for r in self._read(path, known)} for known in json.loads(path.read_text("utf-8"))}
        except (OSError, ValueError, KeyError, TypeError):  # none yet, or of a version with other kernels
            tables = {}
        tables.setdefault(gpu, {}).update({(row.n, row.k): row for row in measured})
        return to_json({known: list(rows.values()) for known, rows in tables.items()})

    def _choose(self, gpu: str, m: int, n: int, k: int) -> str:
        """The name of a tile, or `CUBLAS`."""
        nearest = self._nearest(gpu, n, k)
        for rows, choice in zip(nearest.rows, nearest.choices, strict=True):
            if m <= rows and self.has_room(gpu, choice, m, k):
                return choice
        return nearest.choices[-1]

    def possible(self, gpu: str, n: int, k: int) -> tuple[str, ...]:
        """Everything that `choose` may return for a weight, over all M."""
        return tuple(dict.fromkeys(self._nearest(gpu, n, k).choices))

    def named_on(self, gpu: str) -> tuple[str, ...]:
        """Everything that `choose` may return on a GPU, whatever the weight."""
        return tuple(dict.fromkeys(choice for row in self.table(gpu) for choice in row.choices))

    def _nearest(self, gpu: str, n: int, k: int) -> TableRow:
        return min(self.table(gpu), key=lambda row: abs(math.log(row.n / n)) + abs(math.log(row.k / k)))

    def forget(self) -> None:
        """Read the tables anew: a new one was written."""
        self.table.cache_clear()
        self.choose.cache_clear()


def to_json(tables: Mapping[str, Sequence[TableRow]]) -> str:
    """A file of tables by GPU, as `Tables` read it: a line for each shape."""
    lines = {
        gpu: ",\n".join(
            f'  {{"n": {m.n}, "k": {m.k}, "rows": {json.dumps(m.rows)}, "choices": {json.dumps(m.choices)}}}' for m in rows
        )
        for gpu, rows in tables.items()
    }
    return "{\n" + ",\n".join(f' "{gpu}": [\n{rows}\n ]' for gpu, rows in lines.items()) + "\n}\n"


DENSE = Tables(
    "dispatch.json",
    TILES,
    TableRow(4096, 4096, (8, 16, 32, 256, 257), ("8x64", "16x64", "32x128", "64x128", CUBLAS)),
)

choices_on, tuned_path, table, choose, possible, forget = (
    DENSE.choices_on,
    DENSE.tuned_path,
    DENSE.table,
    DENSE.choose,
    DENSE.possible,
    DENSE.forget,
)
