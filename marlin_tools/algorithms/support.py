"""The best weights on given positions, and better positions for given weights: exact, from the Hessian alone.

A pruned row q costs (w - q) H (w - q)ᵀ. With its positions S fixed, the best q solves the normal equations H_SS q_S = (w H)_S.
Every row has positions of its own, so these are N different systems of K/2 unknowns; `fit` solves all of them at once by
conjugate gradients, in which a step is one matrix product for all rows: with the masks applied to directions and residuals, H
itself plays the part of every H_SS. H⁻¹, masked likewise, is the preconditioner.

`reselect` is coordinate descent over quads: with all other quads of its row fixed, each of the six pairs of positions has a
best pair of values and an exact loss, in closed form. It takes the best pair, moves on, and never raises the loss of a row.
"""

import torch
from torch import Tensor

from marlin_tools.algorithms.masks import PAIRS, of_pair, pair_of
from marlin_tools.algorithms.polish import row_losses
from marlin_tools.ops.solver.kernels import BLOCK

_ITERATIONS = 64
_TOLERANCE = 3e-3
"""Of the residual, relative to that of the first step, in the preconditioner's norm; the loss then lacks its square, 1e-5."""

_PREFERENCE = 1e-5
"""By how much another pair must gain more than the present one, relatively: rounding alone moves nothing."""


def fit(
    weight_nk: Tensor,
    start_nk: Tensor,
    mask_nk: Tensor,
    hessian_kk: Tensor,
    inverse_kk: Tensor,
    tolerance: float = _TOLERANCE,
) -> Tensor:
    """The least-squares weights on the mask, from `start_nk` (zero outside the mask); no row ends worse than it began."""
    value_nk = start_nk.clone()
    residual_nk = ((weight_nk - value_nk) @ hessian_kk) * mask_nk
    goal_n = torch.full((len(weight_nk), 1), torch.inf, device=weight_nk.device)
    direction_nk, before_n = torch.zeros_like(value_nk), torch.ones_like(goal_n)
    for step in range(_ITERATIONS):
        conditioned_nk = (residual_nk @ inverse_kk) * mask_nk
        size_n = (residual_nk * conditioned_nk).sum(dim=1, keepdim=True)
        if step == 0:
            goal_n = size_n * tolerance**2
        open_n = size_n > goal_n
        if not bool(open_n.any()):
            break
        direction_nk = conditioned_nk + direction_nk * (size_n / before_n)
        response_nk = (direction_nk @ hessian_kk) * mask_nk
        length_n = torch.where(open_n, size_n / (direction_nk * response_nk).sum(dim=1, keepdim=True), 0.0)
        value_nk += length_n * direction_nk
        residual_nk -= length_n * response_nk
        before_n = size_n.clamp(min=torch.finfo(torch.float32).tiny)
    better_n = row_losses(weight_nk, value_nk, hessian_kk) < row_losses(weight_nk, start_nk, hessian_kk)
    return torch.where(better_n[:, None], value_nk, start_nk)


def reselect(weight_nk: Tensor, value_nk: Tensor, mask_nk: Tensor, hessian_kk: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over all quads; returns the new values and the new mask. The mask keeps exactly two of every quad."""
    value_nk, pair_nq = value_nk.clone(), pair_of(mask_nk)
    bonus_66 = 1 + _PREFERENCE * torch.eye(len(PAIRS), device=weight_nk.device)
    gradient_nk = (weight_nk - value_nk) @ hessian_kk
    for start in range(0, weight_nk.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight_nk.shape[1]))
        local_bb, local_nb = hessian_kk[block, block], gradient_nk[:, block].clone()
        old_nb, value_nb = value_nk[:, block].clone(), value_nk[:, block]
        best_of = _best_values(local_bb)
        for index in range(len(best_of)):
            quad, bonus_n6 = slice(4 * index, 4 * index + 4), bonus_66[pair_nq[:, start // 4 + index]]
            present_n4 = value_nb[:, quad].clone()
            wanted_n4 = torch.addmm(local_nb[:, quad], present_n4, local_bb[quad, quad])
            best_n64 = (wanted_n4 @ best_of[index]).view(-1, len(PAIRS), 4)
            pair_n = ((best_n64 * wanted_n4[:, None]).sum(dim=2) * bonus_n6).argmax(dim=1)
            best_n4 = best_n64.gather(1, pair_n[:, None, None].expand(-1, 1, 4)).squeeze(1)
            local_nb.addmm_(present_n4 - best_n4, local_bb[quad])
            value_nb[:, quad], pair_nq[:, start // 4 + index] = best_n4, pair_n
        gradient_nk += (old_nb - value_nb) @ hessian_kk[block]
    return value_nk, of_pair(pair_nq).view(mask_nk.shape)


def _best_values(hessian_bb: Tensor) -> Tensor:
    """[B/4, 4, 6·4]: for each quad and pair P the v_P = H_PP⁻¹ c_P that maximises 2 cᵀv - vᵀHv, as a matrix to multiply c with.

    What that gains is cᵀv.
    """
    quads = hessian_bb.shape[0] // 4
    diagonal = torch.arange(quads, device=hessian_bb.device)
    inner_q44 = hessian_bb.reshape(quads, 4, quads, 4)[diagonal, :, diagonal].double()
    result = torch.zeros(quads, 4, len(PAIRS), 4, dtype=torch.float64, device=hessian_bb.device)
    for index, pair in enumerate(PAIRS):
        rows, columns = torch.tensor(pair)[:, None], torch.tensor(pair)[None]
        result[:, rows, index, columns] = torch.linalg.inv(inner_q44[:, rows, columns])
    return result.view(quads, 4, -1).to(hessian_bb.dtype)
