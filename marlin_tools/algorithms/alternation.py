"""2:4 masks by alternating directions: all quads of a row are chosen together, and not one after the other.

Two weights stand for one: a free one, which answers for the outputs, and a sparse one. By turns the free one is drawn to the
sparse one, the sparse one becomes what is nearest to it, and what still keeps them apart is remembered (ADMM, which ALPS,
arXiv 2406.07831, prunes with). The pull grows, so that in the end no position changes any more.

Columns are scaled so that the Hessian has ones on its diagonal; then the same pulls suit every linear.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from marlin_tools.algorithms.masks import magnitude
from marlin_tools.ops.solver.cholesky import inverse_of
from marlin_tools.ops.solver.products import product

_PULLS = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
_TURNS = 6
"""With each pull."""

_KEPT = 1 << 31
"""Bytes of inverses that are kept for the next rows; larger ones are computed again."""


class Alternation:
    """Chooses masks under one Hessian, damped as it is to be solved with."""

    def __init__(self, hessian_kk: Tensor) -> None:
        self._size_k = hessian_kk.diagonal().sqrt()
        self._scaled_kk = hessian_kk / self._size_k / self._size_k[:, None]
        self._kept: list[Tensor] = []

    def choose(self, weight_nk: Tensor) -> tuple[Tensor, Tensor]:
        """Sparse values and their mask; the values are near the best on this mask, and not yet those."""
        scaled_nk = weight_nk * self._size_k
        wanted_nk = product(scaled_nk, self._scaled_kk)
        mask_nk = magnitude(scaled_nk)
        sparse_nk, apart_nk = scaled_nk * mask_nk, torch.zeros_like(scaled_nk)
        for pull, inverse_kk in zip(_PULLS, self._inverses(), strict=True):
            for _ in range(_TURNS):
                free_nk = product(torch.add(wanted_nk - apart_nk, sparse_nk, alpha=pull), inverse_kk)
                nearest_nk = torch.add(free_nk, apart_nk, alpha=1 / pull)
                mask_nk = magnitude(nearest_nk)
                sparse_nk = nearest_nk * mask_nk
                apart_nk.add_(free_nk - sparse_nk, alpha=pull)
        return sparse_nk / self._size_k, mask_nk

    def _inverses(self) -> Iterable[Tensor]:
        """Of the scaled Hessian with each pull on its diagonal."""
        if self._scaled_kk.nbytes * len(_PULLS) > _KEPT:
            return (self._inverse(pull) for pull in _PULLS)
        self._kept = self._kept or [self._inverse(pull) for pull in _PULLS]
        return self._kept

    def _inverse(self, pull: float) -> Tensor:
        pulled_kk = self._scaled_kk.clone()
        pulled_kk.diagonal().add_(pull)
        half_kk = inverse_of(torch.linalg.cholesky(pulled_kk, upper=True))
        return product(half_kk.contiguous(), half_kk.T)
