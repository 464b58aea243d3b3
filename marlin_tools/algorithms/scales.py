"""How a row's group of columns gets its scale. Value = (code - 8) · scale, codes 0..15, so levels -8 .. +7 times the scale.

Every candidate is rounded to the 16-bit types that will store it *before* it is judged, so the scale that was chosen is the
scale that is stored. A negative scale turns the grid around: levels +8 .. -7 times |scale|. Letting the search choose the sign
gives the larger side of a group the extra level, for free.

    absmax        2·max|w|/15, the plain symmetric grid
    conditional   76 shrunken candidates judged by ‖δ·R_bb‖², the output error if later columns compensate perfectly
                  (MARLIN's search)
    diagonal      candidates of both signs judged by Σ h_j δ_j², h = mean energy of the input channels
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from marlin_tools.errors import NumericalError
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.quantized import LEVELS, ZERO

_SMALLEST = 2.0**-24
_LARGEST = 65504.0
_SYMMETRIC = 2 / (LEVELS - 1)
"""The scale, in largest weights, of the grid that is as wide on either side."""


def encode(target: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes 0..15 (as floats) of `target` on the grid of `scale`."""
    return torch.clamp(torch.round(target / scale) + ZERO, 0, LEVELS - 1)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The values that codes stand for."""
    return (codes - ZERO) * scale


def storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` rounded to a value that float16 and the model's own `dtype` both hold exactly, never zero."""
    rounded = nearest_storable(scale, dtype)
    if bool((rounded.abs() > _LARGEST).any()):
        raise too_large()
    return rounded


def nearest_storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The same without waiting for the device: infinite where float16 cannot hold it."""
    magnitude = scale.abs().clamp(min=_SMALLEST)
    if dtype == torch.bfloat16:
        magnitude = magnitude.to(torch.bfloat16).to(torch.float32)
    rounded = magnitude.to(torch.float16).to(torch.float32)  # where float16 is coarser, below 2^-14, bfloat16 holds its values
    return torch.where(scale < 0, -rounded, rounded)


class ScaleError(NumericalError):
    """A scale that float16 cannot hold. Whose it is, nobody knows here: `compress/naming.py` says it."""


def too_large() -> ScaleError:
    """What to raise when float16 cannot hold a scale."""
    return ScaleError(
        f"weights need a scale beyond float16, which ends at {_LARGEST:g}",
        hint="check the checkpoint for corrupt weights, or leave the layer out with `--ignore`",
    )


def absmax(weight_ngb: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, groups] from [N, groups, G]: the symmetric grid that just holds the largest weight."""
    return storable(weight_ngb.abs().amax(dim=-1) * _SYMMETRIC, dtype)


def conditional(weight_nb: Tensor, factor_bb: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] for one group: clip to 1.00, 0.99 … 0.25 of the largest weight and keep what costs the least output error."""
    if solver.runs_on(weight_nb):
        if missing := solver.BLOCK - weight_nb.shape[1]:  # zeros cost nothing
            weight_nb, factor_bb = F.pad(weight_nb, (0, missing)), F.pad(factor_bb, (0, missing, 0, missing))
        return solver.clip_scales(weight_nb, factor_bb, dtype)
    widest = weight_nb.abs().amax(dim=1) * _SYMMETRIC
    best_cost = torch.full_like(widest, torch.inf)
    best = storable(widest, dtype)
    for step in range(76):
        scale = storable(widest * (1 - step / 100), dtype)
        error = decode(encode(weight_nb, scale[:, None]), scale[:, None]) - weight_nb
        cost = (error @ factor_bb).square().sum(dim=1)
        best = torch.where(cost < best_cost, scale, best)
        best_cost = torch.minimum(cost, best_cost)
    return best


def diagonal(weight_ngb: Tensor, energy_gb: Tensor, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """[N, groups]: coarse-to-fine search over |scale|, in both signs if `signed`, weighing each column by its energy."""
    if solver.runs_on(weight_ngb) and weight_ngb.shape[2] in solver.GROUP_SIZES:
        return solver.search_scales(weight_ngb, energy_gb, dtype, signed=signed)
    widest = weight_ngb.abs().amax(dim=-1) / ZERO
    best_cost = torch.full_like(widest, torch.inf)
    best = storable(widest, dtype)
    best_ratio = torch.ones_like(widest)

    def consider(ratio: Tensor, sign: float) -> None:
        nonlocal best_cost, best, best_ratio
        scale = storable(widest * ratio * sign, dtype)
        error = decode(encode(weight_ngb, scale[..., None]), scale[..., None]) - weight_ngb
        cost = torch.einsum("ngb,gb->ng", error.square_(), energy_gb)
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best = torch.where(better, scale, best)
        best_ratio = torch.where(better, ratio, best_ratio)

    for ratio in torch.linspace(1.10, 0.50, 31).tolist():
        for sign in (1.0, -1.0) if signed else (1.0,):
            consider(torch.full_like(widest, ratio), sign)
    center, side = best_ratio.clone(), torch.where(best < 0, -1.0, 1.0)
    for offset in torch.linspace(-0.018, 0.018, 9).tolist():
        consider((center + offset) * side, 1.0)
    return best.contiguous()
