"""How the Hopper kernel's work is dealt to its blocks: `Stretch` in `kernels/linear/stretch.cuh`, seen from the host.

The product is cut into output tiles, each of as many steps as there are groups of 128 inputs. Three ways:

    whole    every block takes whole tiles in turn: nothing to add up, but the last round may leave blocks idle
    shared   the steps of some tiles form a line that is cut into equal runs ("stream-K"): nobody idles, cut tiles are summed
             through global memory
    split    one tile per cluster of blocks, which split its inputs and sum through each other's shared memory

The first goes together with the second.

`best` weighs them by an estimate of the time, in steps of one block.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_SPLITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Deal:
    """Of `tiles`, the first `shared_tiles` are shared, each by a cluster of `split` blocks if that is above 1."""

    units: int
    split: int
    tiles: int
    shared_tiles: int = 0

    @property
    def name(self) -> str:
        """For people who measure."""
        how = f"split {self.split}" if self.split > 1 else "shared"
        return f"{self.shared_tiles} {how}, {self.tiles - self.shared_tiles} whole"


@dataclass(frozen=True)
class Costs:
    """What sums over blocks cost besides the steps, in steps: through global memory; through a cluster's shared memory, at all
    and for each block of it. And what a shared step costs: blocks at different inputs do not read the same activations.
    """

    shared: float
    split: float
    split_each: float = 0.0
    shared_step: float = 1.0


def deals(tiles: int, groups: int, places: int, clusters: Mapping[int, int]) -> list[Deal]:
    """All that make sense on a GPU with room for so many blocks, or so many clusters of each size."""
    found = [Deal(min(tiles, places), 1, tiles)]
    if tiles % places:
        shared = tiles - max(0, tiles // places - 1) * places
        found.append(Deal(min(places, shared * groups), 1, tiles, shared))
    for split in _SPLITS:
        room = clusters.get(split, 0)
        if split > groups or not room:
            continue
        if tiles <= room:
            found.append(Deal(tiles * split, split, tiles, tiles))
    return found


def estimate(deal: Deal, groups: int, costs: Costs) -> float:
    """Steps of the busiest block, and what it adds up besides."""
    whole = -(-(deal.tiles - deal.shared_tiles) // deal.units) * groups
    if deal.split > 1:
        return whole + -(-groups // deal.split) + costs.split + costs.split_each * deal.split
    shared = -(-deal.shared_tiles * groups // deal.units)
    return whole + shared * costs.shared_step + (costs.shared if deal.shared_tiles else 0.0)


def best(choices: Iterable[Deal], groups: int, costs: Costs) -> Deal:
    """The one that should be fastest."""
    return min(choices, key=lambda choice: estimate(choice, groups, costs))
