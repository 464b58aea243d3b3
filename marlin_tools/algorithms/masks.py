"""2:4 masks: of every four neighbouring inputs of an output (a quad), at most two are kept.

A mask is bool [N, K], True where the weight is kept. Two ways to choose one before any weight has been changed; SparseGPT, in
`pruning.py`, chooses while it changes them.

    magnitude   the two largest weights
    wanda       the two largest |w| · ‖x‖, the norm taken over the calibration tokens
"""

import torch
from torch import Tensor

from marlin_tools.quantized import quads

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
"""The six ways to keep two of four."""


def two_largest(score_nk: Tensor) -> Tensor:
    """The mask that keeps the two best of every quad; equal scores keep the earlier column."""
    a, b, c, d = quads(score_nk).unbind(dim=2)
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    kept = [_most(ab, ac, ad), _most(~ab, bc, bd), _most(~ac, ~bc, cd), _most(~ad, ~bd, ~cd)]
    return torch.stack(kept, dim=2).view(score_nk.shape)


def _most(one: Tensor, another: Tensor, third: Tensor) -> Tensor:
    """Where two of three are true: with two games of three won, a column is among the best two."""
    return (one & another) | (third & (one | another))


def magnitude(weight_nk: Tensor) -> Tensor:
    """Keep the largest weights."""
    return two_largest(weight_nk.abs())


def wanda(weight_nk: Tensor, energy_k: Tensor) -> Tensor:
    """Keep the largest weights, each times the norm of its input."""
    return two_largest(weight_nk.square() * energy_k)


def of_pair(pair: Tensor) -> Tensor:
    """Indices into `PAIRS` [...] -> the kept positions, bool [..., 4]."""
    return _table(pair.device)[pair]


def pair_of(mask_nk: Tensor) -> Tensor:
    """[N, K/4]: the index into `PAIRS` of each quad of a mask that keeps exactly two."""
    return (quads(mask_nk)[:, :, None] == _table(mask_nk.device)).all(dim=3).int().argmax(dim=2)


def _table(device: torch.device) -> Tensor:
    """What each of `PAIRS` keeps, bool [6, 4]."""
    kept = torch.zeros(len(PAIRS), 4, dtype=torch.bool)
    for index, pair in enumerate(PAIRS):
        kept[index, list(pair)] = True
    return kept.to(device)
