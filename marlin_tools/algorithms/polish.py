"""After the sweep: exact coordinate descent on the codes, and exact least squares on the scales, by turns.

The sweep never looks back: a column that was rounded early is not told what happened later. With E = W - Q and the gradient
E·H, the best value of one column given all others is q_j + (E H)_j / H_jj; rounding that to the grid can only lower the row's
loss. The best scales for given codes solve one small linear system per row, [groups x groups]. Each step is accepted only where
it lowers the loss of its row, so the loss falls monotonically.
"""

import torch
from torch import Tensor

from marlin_tools.algorithms.scales import decode, encode, storable
from marlin_tools.algorithms.sweep import BLOCK
from marlin_tools.quantized import ZERO


def row_losses(weight_nk: Tensor, value_nk: Tensor, hessian_kk: Tensor) -> Tensor:
    """(w - q) H (w - q)ᵀ for every row [N]."""
    error = weight_nk - value_nk
    return ((error @ hessian_kk) * error).sum(dim=1)


def descend(weight_nk: Tensor, codes_nk: Tensor, scales_nk: Tensor, hessian_kk: Tensor) -> Tensor:
    """One pass of coordinate descent over all columns; returns the new codes. `scales_nk` holds each column's scale."""
    codes_nk = codes_nk.clone()
    error_nk = weight_nk - decode(codes_nk, scales_nk)
    gradient_nk = error_nk @ hessian_kk
    for start in range(0, weight_nk.shape[1], BLOCK):
        stop = min(start + BLOCK, weight_nk.shape[1])
        local_bb = hessian_kk[start:stop, start:stop]
        local_nb = gradient_nk[:, start:stop].clone()
        change_nb = torch.zeros_like(local_nb)
        for j in range(start, stop):
            i = j - start
            scale_n, old_n = scales_nk[:, j], codes_nk[:, j].clone()
            target_n = decode(old_n, scale_n) + local_nb[:, i] / local_bb[i, i]
            codes_nk[:, j] = encode(target_n, scale_n)
            change_nb[:, i] = (old_n - codes_nk[:, j]) * scale_n
            local_nb.addr_(change_nb[:, i], local_bb[i])
        gradient_nk.addmm_(change_nb, hessian_kk[start:stop])
    return codes_nk


def refit(weight_nk: Tensor, codes_nk: Tensor, scales_ng: Tensor, hessian_kk: Tensor, dtype: torch.dtype) -> Tensor:
    """The least-squares scales for these codes, kept only in rows where they still lower the loss once rounded."""
    n, groups = scales_ng.shape
    size = weight_nk.shape[1] // groups
    signed_ngb = (codes_nk - ZERO).view(n, groups, size)
    goal_ngb = (weight_nk @ hessian_kk).view(n, groups, size)
    right_ng = (signed_ngb * goal_ngb).sum(dim=-1)
    left_ngg = torch.empty(n, groups, groups, dtype=weight_nk.dtype, device=weight_nk.device)
    for g in range(groups):
        response = signed_ngb[:, g] @ hessian_kk[g * size : (g + 1) * size]
        left_ngg[:, g] = (response.view(n, groups, size) * signed_ngb).sum(dim=-1)
    trace = left_ngg.diagonal(dim1=1, dim2=2).mean(dim=1)
    left_ngg.diagonal(dim1=1, dim2=2).add_((1e-6 * trace).clamp(min=1e-30)[:, None])
    fitted, info = torch.linalg.solve_ex(left_ngg, right_ng)
    usable = (info == 0)[:, None] & torch.isfinite(fitted) & (fitted.abs() < 2 * scales_ng.abs()) & (fitted * scales_ng > 0)
    fitted = storable(torch.where(usable, fitted, scales_ng), dtype)
    before = row_losses(weight_nk, decode(codes_nk, scales_ng.repeat_interleave(size, dim=1)), hessian_kk)
    after = row_losses(weight_nk, decode(codes_nk, fitted.repeat_interleave(size, dim=1)), hessian_kk)
    return torch.where((after < before)[:, None], fitted, scales_ng)


def polish(
    weight_nk: Tensor, codes_nk: Tensor, scales_ng: Tensor, hessian_kk: Tensor, dtype: torch.dtype, cycles: int
) -> tuple[Tensor, Tensor]:
    """`cycles` rounds of refit and descent; the last word is the descent's, so codes are optimal for the stored scales."""
    size = weight_nk.shape[1] // scales_ng.shape[1]
    codes_nk = descend(weight_nk, codes_nk, scales_ng.repeat_interleave(size, dim=1), hessian_kk)
    for _ in range(cycles - 1):
        scales_ng = refit(weight_nk, codes_nk, scales_ng, hessian_kk, dtype)
        codes_nk = descend(weight_nk, codes_nk, scales_ng.repeat_interleave(size, dim=1), hessian_kk)
    return codes_nk, scales_ng
