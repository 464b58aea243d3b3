"""How a product is decomposed over CTAs: `WorkRange` in `kernels/linear/`, seen from the host.

The product is cut into output tiles, each of as many steps as there are packed tiles along the inputs. Three ways:

    whole     every CTA takes whole tiles in turn: nothing to add up, but the last wave may leave SMs idle
    stream-K  the steps of some tiles form a line that is cut into equal ranges: nobody idles, cut tiles are summed through
              global memory
    split-K   one tile per cluster of CTAs, which split its inputs and sum through each other's shared memory

The first goes together with the second.

`best` weighs them by an estimate of the time, in steps of one CTA.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_SPLITS = (2, 3, 4, 5, 6, 7, 8)


@dataclass(frozen=True)
class Decomposition:
    """Of `tiles`, the first `shared_tiles` have several CTAs each: a cluster of `split` if that is above 1, else stream-K."""

    ctas: int
    split: int
    tiles: int
    shared_tiles: int = 0

    @property
    def stream_k(self) -> bool:
        """Whether sums go through global memory."""
        return self.split == 1 and self.shared_tiles > 0

    @property
    def name(self) -> str:
        """For people who measure."""
        how = f"split-K by {self.split}" if self.split > 1 else "stream-K"
        return f"{self.shared_tiles} {how}, {self.tiles - self.shared_tiles} whole"


@dataclass(frozen=True)
class Costs:
    """What sums over CTAs cost besides the steps, in steps: through global memory; through a cluster's shared memory, at all
    and for each CTA of it. And what a step of stream-K costs: CTAs at different inputs do not read the same activations.
    """

    shared: float
    split: float
    split_each: float = 0.0
    shared_step: float = 1.0


def decompositions(tiles: int, groups: int, sms: int, clusters: Mapping[int, int]) -> list[Decomposition]:
    """All that make sense on a GPU with so many SMs, or room for so many clusters of each size."""
    found = [Decomposition(min(tiles, sms), 1, tiles)]
    if tiles % sms:
        shared = tiles - max(0, tiles // sms - 1) * sms
        found.append(Decomposition(min(sms, shared * groups), 1, tiles, shared))
    for split in _SPLITS:
        room = clusters.get(split, 0)
        if split > groups or not room:
            continue
        if tiles <= room:
            found.append(Decomposition(tiles * split, split, tiles, tiles))
    return found


def estimate(way: Decomposition, groups: int, costs: Costs) -> float:
    """Steps of the busiest CTA, and what it adds up besides."""
    whole = -(-(way.tiles - way.shared_tiles) // way.ctas) * groups
    if way.split > 1:
        return whole + -(-groups // way.split) + costs.split + costs.split_each * way.split
    shared = -(-way.shared_tiles * groups // way.ctas)
    return whole + shared * costs.shared_step + (costs.shared if way.shared_tiles else 0.0)


def best(choices: Iterable[Decomposition], groups: int, costs: Costs) -> Decomposition:
    """The one that should be fastest."""
    return min(choices, key=lambda choice: estimate(choice, groups, costs))
