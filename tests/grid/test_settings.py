"""The grid of settings on a tiny model: each cell works and verifies, or is refused before any work.

preset x group size x format x activations x sparsity x source x ignore is 4,320 cells. `make test` takes every value of every
setting with every value of every other at least once (a covering sample drawn from a seed); `GRID=all` takes all of them.
"""

import os
from collections.abc import Callable, Iterator
from itertools import combinations, product
from pathlib import Path
from random import Random

import pytest
import torch

from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import MarlinToolsError
from marlin_tools.verification.verify import verify

SETTINGS = {
    "preset": ("rtn", "fast", "marlin", "default", "max"),
    "group_size": (128, -1, 64, 100, 32, "auto"),
    "format": ("compressed-tensors", "gptq", "marlin", "marlin-24"),
    "activations": ("16bit", "fp8"),
    "sparsity": (None, "2:4", "keep"),
    "source": ("llama", "qwen2", "pruned"),
    "ignore": ((), ("down_proj",)),
}
Cell = tuple[object, ...]


def pairs(cell: Cell) -> set[tuple[int, object, int, object]]:
    """Every two values that this cell tries together."""
    return {(i, cell[i], j, cell[j]) for i, j in combinations(range(len(cell)), 2)}


def covering(cells: list[Cell]) -> Iterator[Cell]:
    """Cells, in a drawn order, until every pair of values has been tried."""
    Random(0).shuffle(cells)
    seen: set[tuple[int, object, int, object]] = set()
    for least in (15, 12, 9, 6, 3, 1):
        for cell in cells:
            if len(pairs(cell) - seen) >= least:
                seen |= pairs(cell)
                yield cell


ALL: list[Cell] = list(product(*SETTINGS.values()))
CELLS = ALL if os.environ.get("GRID") == "all" else list(covering(list(ALL)))


def test_the_sample_covers_every_pair() -> None:
    assert set().union(*map(pairs, ALL)) == set().union(*map(pairs, CELLS))


@pytest.fixture(scope="module")
def sources(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two dense models, and one that is 2:4 sparse."""
    from marlin_tools.compress.prune import PruneSettings, prune

    small = {"vocab_size": 512, "num_hidden_layers": 1}
    llama = tiny_model("llama", **small)
    out = tmp_path_factory.mktemp("grid") / "pruned"
    pruned = prune(llama, None, PruneSettings(preset="magnitude", device="cpu"), out).path
    return {"llama": llama, "qwen2": tiny_model("qwen2", tie_word_embeddings=True, **small), "pruned": pruned}


@pytest.fixture(scope="module")
def tokens() -> TokenSet:
    generator = torch.Generator().manual_seed(0)
    return TokenSet(tuple(torch.randint(2, 512, (4, 64), generator=generator)), "random", packed=True, documents=1)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: " ".join(map(str, cell)))
def test_a_cell_works_and_verifies_or_is_refused_before_the_work(
    cell: Cell, sources: dict[str, Path], tokens: TokenSet, tmp_path: Path
) -> None:
    chosen = dict(zip(SETTINGS, cell, strict=True))
    source = sources[str(chosen.pop("source"))]
    worked: list[str] = []
    try:
        settings = QuantizeSettings(device="cpu", **chosen)
        result = quantize(source, tokens, settings, tmp_path / "out", emit=lambda event: worked.append(event.kind))
    except MarlinToolsError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert refusal.hint, refusal.message
        assert "progress" not in worked
        assert [] == list(tmp_path.iterdir())
        return
    assert not list(tmp_path.glob("*.partial"))
    found = verify(result)
    assert found.ok, [f"{check.name}: {check.detail}" for check in found.checks if not check.ok]
