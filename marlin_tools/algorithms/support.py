"""The best weights on given positions, and better positions for given weights: exact, from the Hessian alone.

A pruned row v costs (w - v) H (w - v)ᵀ. With its positions S fixed, the best v solves the normal equations H_SS v_S = (w H)_S.
Every row has positions of its own, so these are N different systems of K/2 unknowns; `fit` solves all of them at once by
conjugate gradients, in which a step is one matrix product for all rows: with the masks applied to residuals, H itself plays
the part of every H_SS. Its diagonal is the preconditioner: the masked inverse of H would need half the steps, and two products
for each.

`reselect` is coordinate descent over quads: with all other quads of its row fixed, each of the six pairs of positions has a
best pair of values and an exact loss, in closed form. It takes the best pair, moves on, and never raises the loss of a row.
A block of columns is walked along several times before the next one is told, which saves products between blocks.
"""

import torch
from torch import Tensor

from marlin_tools.algorithms.masks import PAIRS, of_pair, pair_of
from marlin_tools.algorithms.sweep import WIDE
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.ops.solver.kernels import BLOCK
from marlin_tools.ops.solver.products import Parts, product

_ITERATIONS = 64
_TOLERANCE = 3e-5
"""Of a row's loss: a step that gains less is a row's last. What later ones would have gained is a few times as much."""

_WALKS = 4
"""How often `reselect` walks along a block before it goes on to the next."""

_PREFERENCE = 1e-5
"""By how much another pair must gain more than the present one, relatively: rounding alone moves nothing."""


def fit(weight_nk: Tensor, start_nk: Tensor, mask_nk: Tensor, hessian_kk: Tensor, tolerance: float = _TOLERANCE) -> Tensor:
    """The least-squares weights on the mask, from `start_nk` (zero outside the mask); no row ends worse than it began."""
    value_nk, energy_k = start_nk.clone(), hessian_kk.diagonal()
    error_nk = weight_nk - value_nk
    residual_nk = product(error_nk, hessian_kk)
    loss_n = error_nk.mul_(residual_nk).sum(dim=1, keepdim=True)
    residual_nk *= mask_nk
    direction_nk, before_n = torch.zeros_like(value_nk), torch.ones_like(loss_n)
    open_n = torch.ones_like(loss_n, dtype=torch.bool)
    for _ in range(_ITERATIONS):
        conditioned_nk = residual_nk / energy_k
        size_n = (residual_nk * conditioned_nk).sum(dim=1, keepdim=True)
        direction_nk = torch.addcmul(conditioned_nk, direction_nk, size_n / before_n)
        response_nk = product(direction_nk, hessian_kk).mul_(mask_nk)
        length_n = size_n / (direction_nk * response_nk).sum(dim=1, keepdim=True)
        gain_n = length_n * size_n
        open_n &= gain_n > tolerance * loss_n
        if not bool(open_n.any()):
            break
        length_n = torch.where(open_n, length_n, 0.0)
        loss_n -= torch.where(open_n, gain_n, 0.0)
        value_nk.addcmul_(length_n, direction_nk)
        residual_nk.addcmul_(length_n, response_nk, value=-1)
        before_n = size_n.clamp(min=torch.finfo(torch.float32).tiny)
    return value_nk


def reselect(weight_nk: Tensor, value_nk: Tensor, mask_nk: Tensor, hessian_kk: Tensor) -> tuple[Tensor, Tensor]:
    """One pass over all quads; returns the new values and the new mask. The mask keeps exactly two of every quad."""
    inverses_q64 = pair_inverses(hessian_kk)
    if solver.runs_on(value_nk):
        state = solver.Quads(value_nk.clone(), mask_nk.clone(), inverses_q64, _PREFERENCE)
        _fused_reselect(weight_nk, state, hessian_kk)
        return state.values, state.mask
    value_kn, pair_qn = value_nk.T.contiguous(), pair_of(mask_nk).T.contiguous()
    gradient_kn = hessian_kk @ (weight_nk.T - value_kn)
    for start in range(0, len(value_kn), BLOCK):
        block = slice(start, min(start + BLOCK, len(value_kn)))
        quads = slice(block.start // 4, block.stop // 4)
        change_bn = reselect_block(
            value_kn[block], pair_qn[quads], gradient_kn[block].clone(), hessian_kk[block, block], inverses_q64[quads]
        )
        gradient_kn.addmm_(hessian_kk[:, block], change_bn)
    return value_kn.T.contiguous(), of_pair(pair_qn.T).reshape(mask_nk.shape)


def reselect_block(value_bn: Tensor, pair_qn: Tensor, gradient_bn: Tensor, hessian_bb: Tensor, inverses_q64: Tensor) -> Tensor:
    """Choose every quad of a block again, in place, `_WALKS` times over; returns by how much the errors changed.

    Outputs lie side by side, so that a quad is four whole rows and all steps are dense.
    """
    old_bn, bonus_66 = value_bn.clone(), 1 + _PREFERENCE * torch.eye(len(PAIRS))
    best_of, values, gradients = _best_values(inverses_q64), value_bn.split(4), gradient_bn.split(4)
    columns = [column_b4.contiguous() for column_b4 in hessian_bb.split(4, dim=1)]
    for index in list(range(len(best_of))) * _WALKS:
        present_4n = values[index]
        wanted_4n = torch.addmm(gradients[index], columns[index][4 * index : 4 * index + 4], present_4n)
        best_64n = torch.mm(best_of[index], wanted_4n).view(len(PAIRS), 4, -1)
        gain_6n = (best_64n * wanted_4n).sum(dim=1).mul_(bonus_66.index_select(1, pair_qn[index]))
        pair_n = gain_6n.argmax(dim=0)
        best_4n = best_64n.gather(0, pair_n.expand(1, 4, -1)).squeeze(0)
        gradient_bn.addmm_(columns[index], present_4n - best_4n)
        present_4n.copy_(best_4n)
        pair_qn[index] = pair_n
    return old_bn.sub_(value_bn)


def _best_values(inverses_q64: Tensor) -> Tensor:
    """[B/4, 6·4, 4]: the inverses as matrices to multiply c with, which gives the v of all pairs with their zeros."""
    first, both, second = inverses_q64[:, :, :3].unbind(dim=2)
    one, other = torch.tensor(PAIRS, device=inverses_q64.device).T
    pair = torch.arange(len(PAIRS), device=inverses_q64.device)
    result = inverses_q64.new_zeros(len(inverses_q64), len(PAIRS), 4, 4)
    for row, column, part in ((one, one, first), (one, other, both), (other, one, both), (other, other, second)):
        result[:, pair, column, row] = part
    return result.view(len(inverses_q64), -1, 4)


def _fused_reselect(weight_nk: Tensor, state: solver.Quads, hessian_kk: Tensor) -> None:
    """The same by kernels: gradients come from one large product for many columns, corrected by a small one for each block."""
    k = weight_nk.shape[1]
    errors = Parts.of(weight_nk - state.values)
    for first in range(0, k, WIDE):
        last = min(first + WIDE, k)
        gradient_nw = product(errors, hessian_kk[:, first:last])
        change_nw = torch.empty_like(gradient_nw)
        for start in range(first, last, BLOCK):
            done, block = slice(0, start - first), slice(start - first, min(start + BLOCK, last) - first)
            gradient_nb = torch.addmm(gradient_nw[:, block], change_nw[:, done], hessian_kk[first:start, first:last][:, block])
            solver.reselect_block(state, gradient_nb, hessian_kk, change_nw[:, block], start, _WALKS)
        errors.put(slice(first, last), weight_nk[:, first:last] - state.values[:, first:last])


def pair_inverses(hessian_kk: Tensor) -> Tensor:
    """[K/4, 6, 4]: for each pair P of each quad the inverse of H_PP as (aa, ab, bb), and a zero.

    The v_P that maximises 2 cᵀv - vᵀHv is that inverse times c_P, and what it gains is c_P v_P.
    """
    quads = len(hessian_kk) // 4
    diagonal = torch.arange(quads, device=hessian_kk.device)
    inner_q44 = hessian_kk.view(quads, 4, quads, 4)[diagonal, :, diagonal].double()
    one, other = torch.tensor(PAIRS, device=hessian_kk.device).T
    first, both, second = inner_q44[:, one, one], inner_q44[:, one, other], inner_q44[:, other, other]
    parts = torch.stack([second, -both, first, torch.zeros_like(both)], dim=2)
    return (parts / (first * second - both * both)[:, :, None]).float().contiguous()
