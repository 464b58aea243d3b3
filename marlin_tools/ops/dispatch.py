"""Which kernel multiplies, for a shape on a GPU: read from tables that were measured, not computed.

`kernels/dispatch.json` holds one table per target: for some weight shapes and some numbers of rows, the fastest choice.
`stages.bench.tune` makes one for the GPU at hand, which then lies beside the compiled kernels and wins over
the shipped one. A shape takes the row of the nearest measured shape (in log N and log K), and M the nearest measured number
of rows that is not smaller. A choice is the name of a tile, or `cublas`: dequantise, then call cuBLAS; the table
names it wherever it is fastest, so nothing falls below it.
"""

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

from marlin_tools.ops.cubin_cache import default_dir
from marlin_tools.ops.variants import TILES, capability_of
from marlin_tools.resources import kernels_dir

CUBLAS = "cublas"
"""The choice that is not a kernel of ours: dequantise and multiply with cuBLAS."""

CHOICES = (*TILES, CUBLAS)


def choices_on(target: str) -> tuple[str, ...]:
    """Everything that can run on a target."""
    return (*(name for name, tile in TILES.items() if tile.runs_on(capability_of(target))), CUBLAS)


@dataclass(frozen=True)
class Measured:
    """The winners for one weight shape: `choices[i]` for up to `rows[i]` rows; the last one holds from there on."""

    n: int
    k: int
    rows: tuple[int, ...]
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.choices) or not self.rows or list(self.rows) != sorted(set(self.rows)):
            raise ValueError(f"rows {self.rows} and choices {self.choices} do not match")
        unknown = set(self.choices) - set(CHOICES)
        if unknown:
            raise ValueError(f"unknown choices {sorted(unknown)}")


# For GPUs that nobody has measured: what the tiles are made for.
_BY_DESIGN = (Measured(4096, 4096, (8, 16, 32, 256, 257), ("8x64", "16x64", "32x128", "64x128", CUBLAS)),)


def tuned_path() -> Path:
    """Where the table measured on this machine lies."""
    return default_dir() / "dispatch.json"


@cache
def table(target: str) -> tuple[Measured, ...]:
    """The table for a target: tuned here, shipped, or by design."""
    for path in (tuned_path(), kernels_dir() / "dispatch.json"):
        if path.is_file():
            rows = json.loads(path.read_text(encoding="utf-8")).get(target)
            if rows:
                return tuple(Measured(r["n"], r["k"], tuple(r["rows"]), tuple(r["choices"])) for r in rows)
    return _BY_DESIGN


def to_json(target: str, measured: list[Measured]) -> str:
    """A table file with one target, as `table` reads it."""
    rows = [{"n": m.n, "k": m.k, "rows": m.rows, "choices": m.choices} for m in measured]
    return json.dumps({target: rows}, indent=1) + "\n"


@lru_cache(maxsize=4096)
def choose(target: str, m: int, n: int, k: int) -> str:
    """The name of a tile, or `CUBLAS`."""
    nearest = min(table(target), key=lambda row: abs(math.log(row.n / n)) + abs(math.log(row.k / k)))
    for rows, choice in zip(nearest.rows, nearest.choices, strict=True):
        if m <= rows:
            return choice
    return nearest.choices[-1]


def forget() -> None:
    """Read the tables anew: a new one was written."""
    table.cache_clear()
    choose.cache_clear()


def possible(target: str, n: int, k: int) -> tuple[str, ...]:
    """Everything that `choose` may return for a weight, over all M."""
    nearest = min(table(target), key=lambda row: abs(math.log(row.n / n)) + abs(math.log(row.k / k)))
    return tuple(dict.fromkeys(nearest.choices))
