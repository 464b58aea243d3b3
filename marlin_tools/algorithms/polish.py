"""After the sweep: exact coordinate descent, block by block, on the scales and then on the codes.

The sweep never looks back: a column that was rounded early is not told what happened later. With E = W - Q and the gradient
E·H, the best value of one column given all others is q_j + (E H)_j / H_jj; rounding that to the grid can only lower the row's
loss. The best scale of a group given everything else is found the same way: moving it by δ changes the loss by
δ² (c H c) - 2 δ (c · E H), where c are the group's codes as signed numbers. A scale is moved only where that is negative once
the new scale is rounded as it will be stored, so the loss falls monotonically.
"""

import torch
from torch import Tensor

from marlin_tools.algorithms.scales import decode, encode, storable
from marlin_tools.algorithms.sweep import WIDE
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.ops.solver.kernels import BLOCK
from marlin_tools.ops.solver.products import Parts, product
from marlin_tools.quantized import ZERO


def row_losses(weight_nk: Tensor, value_nk: Tensor, hessian_kk: Tensor) -> Tensor:
    """(w - q) H (w - q)ᵀ for every row [N]."""
    error = weight_nk - value_nk
    return ((error @ hessian_kk) * error).sum(dim=1)


def descend(state: solver.PolishState, gradient_nb: Tensor, hessian_bb: Tensor, start: int) -> None:
    """One pass of coordinate descent over the codes of the block at `start`, in place."""
    size = state.weight.shape[1] // state.scales.shape[1]
    for i in range(gradient_nb.shape[1]):
        j = start + i
        scale_n, old_n = state.scales[:, j // size], state.codes[:, j].clone()
        new_n = encode(decode(old_n, scale_n) + gradient_nb[:, i] / hessian_bb[i, i], scale_n)
        state.codes[:, j] = new_n if state.mask is None else torch.where(state.mask[:, j], new_n, old_n)
        state.errors[:, j] = state.weight[:, j] - decode(state.codes[:, j], scale_n)
        gradient_nb.addr_((old_n - state.codes[:, j]) * scale_n, hessian_bb[i])


def refit(scale_n: Tensor, codes_nb: Tensor, gradient_nb: Tensor, hessian_bb: Tensor, dtype: torch.dtype) -> Tensor:
    """The least-squares scale of one group for its codes, everything else as it is; the old one where that is no gain."""
    signed_nb = codes_nb - ZERO
    slope_n = (signed_nb * gradient_nb).sum(dim=1)
    curvature_n = (signed_nb * (signed_nb @ hessian_bb)).sum(dim=1)
    fitted_n = storable(scale_n + slope_n / curvature_n.clamp(min=1e-30), dtype)
    step_n = fitted_n - scale_n
    better = (
        (step_n * step_n * curvature_n < 2 * step_n * slope_n) & (fitted_n * scale_n > 0) & (fitted_n.abs() < 2 * scale_n.abs())
    )
    return torch.where(better, fitted_n, scale_n)


def polish(
    weight_nk: Tensor,
    codes_nk: Tensor,
    scales_ng: Tensor,
    hessian_kk: Tensor,
    dtype: torch.dtype,
    rounds: int,
    mask_nk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`rounds` walks over all blocks. The last word on a block is the descent's, so its codes fit the scales that are stored.

    Codes change only where `mask` is True.
    """
    size = weight_nk.shape[1] // scales_ng.shape[1]
    fused = solver.runs_on(weight_nk) and (size in solver.GROUP_SIZES or size % BLOCK == 0)
    codes_nk = codes_nk.float()
    errors_nk = weight_nk - decode(codes_nk, scales_ng.repeat_interleave(size, dim=1))
    state = solver.PolishState(
        weight_nk.contiguous(),
        codes_nk.to(torch.uint8) if fused else codes_nk.clone(),
        scales_ng.clone(memory_format=torch.contiguous_format),
        errors_nk,
        mask_nk,
    )
    if fused:
        _fused_rounds(state, hessian_kk, dtype, rounds)
    else:
        for _ in range(rounds):
            _round(state, hessian_kk, dtype)
    return state.codes, state.scales


def _round(state: solver.PolishState, hessian_kk: Tensor, dtype: torch.dtype) -> None:
    k = state.weight.shape[1]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        _refit_groups(state, hessian_kk, dtype, start, stop)
        descend(state, state.errors @ hessian_kk[:, start:stop], hessian_kk[start:stop, start:stop], start)


def _refit_groups(state: solver.PolishState, hessian_kk: Tensor, dtype: torch.dtype, start: int, stop: int) -> None:
    """Refit the scales of the groups that begin between two columns."""
    size = state.weight.shape[1] // state.scales.shape[1]
    for group in range(-(-start // size), -(-stop // size)):
        columns = slice(group * size, (group + 1) * size)
        codes_nb = state.codes[:, columns].float()
        gradient_nb = product(state.errors, hessian_kk[:, columns])
        scale_n = refit(state.scales[:, group], codes_nb, gradient_nb, hessian_kk[columns, columns], dtype)
        state.scales[:, group] = scale_n
        state.errors[:, columns] = state.weight[:, columns] - decode(codes_nb, scale_n[:, None])


def _fused_rounds(state: solver.PolishState, hessian_kk: Tensor, dtype: torch.dtype, rounds: int) -> None:
    """The same by kernels: gradients come from one large product for many columns, corrected by a small one for each block."""
    k = state.weight.shape[1]
    size = k // state.scales.shape[1]
    wide = WIDE if size <= BLOCK else min(size, WIDE)  # a group that spans blocks is refitted before gradients are taken
    errors = Parts.of(state.errors)
    for first in list(range(0, k, wide)) * rounds:
        last = min(first + wide, k)
        if size > BLOCK:
            _refit_groups(state, hessian_kk, dtype, first, last)
            errors = Parts.of(state.errors)
        gradient_nw = product(errors, hessian_kk[:, first:last])
        change_nw = torch.empty_like(gradient_nw)
        for start in range(first, last, BLOCK):
            done, block = slice(0, start - first), slice(start - first, min(start + BLOCK, last) - first)
            gradient_nb = torch.addmm(gradient_nw[:, block], change_nw[:, done], hessian_kk[first:start, first:last][:, block])
            change_nw[:, block] = solver.descend_block(state, gradient_nb, hessian_kk, start, dtype)
        errors.put(slice(first, last), state.errors[:, first:last])
