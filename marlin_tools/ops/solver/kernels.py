"""The solver's kernels: what happens inside one block of columns, for all rows at once and without asking the host anything.

Between the blocks there are matrix products, which torch does. `algorithms/` holds the same steps in plain torch, and those
define what is right. All matrices are float32 and contiguous, codes are uint8.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import Arguments, Kernel
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import LEVELS, ZERO

BLOCK = 128
"""Columns per block."""

GROUP_SIZES = (32, 64, 128)
"""Group sizes for which the kernels search and refit scales; wider groups span blocks."""

_ROWS, _THREADS = 32, 256
_SQUARE_BYTES = 4 * BLOCK * BLOCK
_COARSE = torch.linspace(1.10, 0.50, 31).tolist()
_FINE = torch.linspace(-0.018, 0.018, 9).tolist()
_CLIPS = [1 - step / 100 for step in range(76)]


_SWEEP = Arguments(
    "SweepArguments",
    "weight:P owed:P feedback:P scales:P group_of:P kept:P codes:P errors:P "
    "stride:q owed_stride:q feedback_stride:q rows:i width:i groups:i",
)
_DESCEND = Arguments(
    "DescendArguments",
    "weight:P gradient:P hessian:P kept:P scales:P codes:P errors:P change:P "
    "stride:q gradient_stride:q change_stride:q rows:i width:i groups:i bfloat16:i",
)
_SEARCH = Arguments(
    "SearchArguments",
    f"weight:P energy:P scales:P stride:q rows:i groups:i is_signed:i bfloat16:i coarse:{len(_COARSE)}f fine:{len(_FINE)}f",
)
_CLIP = Arguments(
    "ClipArguments",
    f"weight:P factor:P scales:P stride:q rows:i groups:i bfloat16:i ratios:{len(_CLIPS)}f",
)
_CHOOSE = Arguments(
    "ChooseArguments",
    "weight:P owed:P feedback:P diagonal:P kept:P values:P errors:P stride:q owed_stride:q feedback_stride:q rows:i width:i",
)
_RESELECT = Arguments(
    "ReselectArguments",
    "gradient:P hessian:P inverses:P values:P kept:P change:P "
    "stride:q gradient_stride:q change_stride:q rows:i width:i walks:i preference:f",
)
_CUT = Arguments(
    "CutArguments",
    "matrix:P row_factor:P column_factor:P high:P low:P stride:q out_stride:q rows:i columns:i",
)


@cache
def _kernel(target: str, what: str, arguments: Arguments, *template: object, shared_bytes: int = 0) -> Kernel:
    """`what` is the file, and the kernel's name."""
    parameters = [str(parameter).lower() for parameter in template]
    expression = f"{what}_kernel" + (f"<{', '.join(parameters)}>" if parameters else "")
    grid = (("kColumns", BLOCK), ("kRows", _ROWS), ("kZero", ZERO), ("kLevels", LEVELS))
    return Kernel(
        "-".join(["solver", what, *parameters]),
        target,
        f"solver/{what}.cu",
        expression,
        _THREADS,
        arguments,
        shared_bytes,
        mirrors=(("kThreads", _THREADS), *(() if what == "cut" else grid)),
    )


def _sweep(target: str, *, masked: bool) -> Kernel:
    return _kernel(target, "sweep", _SWEEP, masked, shared_bytes=_SQUARE_BYTES)


def _descend(target: str, group_size: int, *, masked: bool) -> Kernel:
    inside = group_size if group_size in GROUP_SIZES else 0
    return _kernel(target, "descend", _DESCEND, inside, masked, shared_bytes=_SQUARE_BYTES)


def _search(target: str, group_size: int) -> Kernel:
    return _kernel(target, "search", _SEARCH, group_size)


def _clip(target: str) -> Kernel:
    return _kernel(target, "clip", _CLIP, shared_bytes=_SQUARE_BYTES + 4 * (BLOCK * (_ROWS + 4) + 8 * _ROWS))


def _choose(target: str) -> Kernel:
    return _kernel(target, "choose", _CHOOSE, shared_bytes=_SQUARE_BYTES)


def _reselect(target: str) -> Kernel:
    return _kernel(target, "reselect", _RESELECT, shared_bytes=_SQUARE_BYTES + 4 * 6 * BLOCK)


def _cut(target: str, each: int) -> Kernel:
    return _kernel(target, "cut", _CUT, each)


def solver_kernels(target: str) -> list[Kernel]:
    """Every kernel of the solver."""
    return [
        *(_sweep(target, masked=masked) for masked in (False, True)),
        *(_descend(target, group_size, masked=masked) for group_size in (0, *GROUP_SIZES) for masked in (False, True)),
        *(_search(target, group_size) for group_size in GROUP_SIZES),
        _clip(target),
        _choose(target),
        _reselect(target),
        *(_cut(target, each) for each in (1, 4)),
    ]


@dataclass(frozen=True)
class Grid:
    """The grid of every column, in the order in which the columns are walked.

    scales    [N, groups]
    group_of  int32 [K], which scale a column has
    mask      bool [N, K], False where the value must be zero; or None
    """

    scales: Tensor
    group_of: Tensor
    mask: Tensor | None = None


def runs_on(tensor: Tensor) -> bool:
    """Whether the kernels compute with this tensor; otherwise the same steps are done in torch."""
    return tensor.is_cuda and tensor.dtype == torch.float32


def search_scales(weight_ngb: Tensor, energy_gb: Tensor, dtype: torch.dtype, *, signed: bool) -> Tensor:
    """[N, groups]: see `algorithms.scales.diagonal`. A scale beyond float16 comes out infinite."""
    n, groups, size = weight_ngb.shape
    scales_ng = torch.empty(n, groups, device=weight_ngb.device)
    driver.start(
        _search(target_of(weight_ngb.device), size),
        _ctas(n * groups),
        weight_ngb,
        *(_address(weight_ngb), _address(energy_gb.contiguous()), _address(scales_ng)),
        *(groups * size, n, groups, int(signed), int(dtype == torch.bfloat16)),
        *(*_COARSE, *_FINE),
    )
    return scales_ng


def clip_scales(weight_nb: Tensor, factor_bb: Tensor, dtype: torch.dtype) -> Tensor:
    """[N]: see `algorithms.scales.conditional`. A scale beyond float16 comes out infinite."""
    n, width = weight_nb.shape
    assert width == BLOCK, width
    scales_n = torch.empty(n, device=weight_nb.device)
    driver.start(
        _clip(target_of(weight_nb.device)),
        _ctas(n),
        weight_nb,
        *(_address(weight_nb), factor_bb.data_ptr(), _address(scales_n)),
        *(factor_bb.stride(0), n, 1, int(dtype == torch.bfloat16)),
        *_CLIPS,
    )
    return scales_n


def sweep_block(
    weight_nk: Tensor, owed_nb: Tensor, feedback_bb: Tensor, grid: Grid, codes_nk: Tensor, errors_nk: Tensor, start: int
) -> None:
    """Round the columns from `start` on; `owed` is what earlier columns left them to pay. Fills codes and errors."""
    n, k = weight_nk.shape
    width = min(BLOCK, k - start)
    mask = grid.mask
    driver.start(
        _sweep(target_of(weight_nk.device), masked=mask is not None),
        _ctas(n),
        weight_nk,
        *(_address(weight_nk, start), owed_nb.data_ptr(), feedback_bb.data_ptr(), _address(grid.scales)),
        *(_address(grid.group_of, start), 0 if mask is None else _address(mask, start)),
        *(_address(codes_nk, start), _address(errors_nk, start)),
        *(k, owed_nb.stride(0), feedback_bb.stride(0), n, width, grid.scales.shape[1]),
    )


@dataclass(frozen=True)
class PolishState:
    """What a polish works on, changed in place.

    `errors` is weight minus value, `scales` [N, groups]; codes stay where `mask` is False.
    """

    weight: Tensor
    codes: Tensor
    scales: Tensor
    errors: Tensor
    mask: Tensor | None = None


def descend_block(state: PolishState, gradient_nb: Tensor, hessian_kk: Tensor, start: int, dtype: torch.dtype) -> Tensor:
    """Refit the scales of the groups of one block, then its codes; returns by how much the errors changed [N, B]."""
    n, k = state.weight.shape
    width = min(BLOCK, k - start)
    groups = state.scales.shape[1]
    change_nb = torch.empty(n, width, device=state.weight.device)
    driver.start(
        _descend(target_of(state.weight.device), k // groups, masked=state.mask is not None),
        _ctas(n),
        state.weight,
        *(_address(state.weight, start), gradient_nb.data_ptr(), hessian_kk[start, start:].data_ptr()),
        *(0 if state.mask is None else _address(state.mask, start), _address(state.scales, start * groups // k)),
        *(_address(state.codes, start), _address(state.errors, start), change_nb.data_ptr()),
        *(k, gradient_nb.stride(0), width, n, width, groups, int(dtype == torch.bfloat16)),
    )
    return change_nb


def choose_block(
    weight_nk: Tensor,
    owed_nb: Tensor,
    feedback_bb: Tensor,
    diagonal_k: Tensor,
    filled: tuple[Tensor, Tensor, Tensor],
    start: int,
) -> None:
    """Keep two of every four columns from `start` on, as `algorithms.pruning.TwoOfFour` does.

    Fills masks, values and errors [N, K]. `owed` is what earlier columns left to pay.
    """
    n, k = weight_nk.shape
    mask_nk, value_nk, errors_nk = filled
    driver.start(
        _choose(target_of(weight_nk.device)),
        _ctas(n),
        weight_nk,
        *(_address(weight_nk, start), owed_nb.data_ptr(), feedback_bb.data_ptr(), _address(diagonal_k, start)),
        *(_address(mask_nk, start), _address(value_nk, start), _address(errors_nk, start)),
        *(k, owed_nb.stride(0), feedback_bb.stride(0), n, min(BLOCK, k - start)),
    )


@dataclass(frozen=True)
class Quads:
    """What `reselect_block` works on, changed in place.

    values, mask   [N, K]; two of every four are kept
    inverses       [K/4, 6, 4]: see `algorithms.support.pair_inverses`
    preference     by how much another pair must gain more than the present one, relatively
    """

    values: Tensor
    mask: Tensor
    inverses: Tensor
    preference: float


def reselect_block(state: Quads, gradient_nb: Tensor, hessian_kk: Tensor, change_nb: Tensor, start: int, walks: int) -> None:
    """Choose every quad of one block again, `walks` times over; fills by how much the errors changed."""
    n, k = state.values.shape
    driver.start(
        _reselect(target_of(state.values.device)),
        _ctas(n),
        state.values,
        *(gradient_nb.data_ptr(), hessian_kk[start, start:].data_ptr(), _address(state.inverses, 6 * start)),
        *(_address(state.values, start), _address(state.mask, start), change_nb.data_ptr()),
        *(k, gradient_nb.stride(0), change_nb.stride(0), n, min(BLOCK, k - start), walks, state.preference),
    )


def cut(matrix: Tensor, factors: tuple[Tensor | None, Tensor | None], high: Tensor, low: Tensor | None) -> None:
    """Fill `high` and `low`, float16, with matrix · factors: the upper and the lower half of its bits.

    The factors are for rows and for columns. The memory of all runs along the rows; rows may be parts of longer ones.
    """
    rows, columns = matrix.shape
    tensors = (matrix, high, *(() if low is None else (low,)))
    assert all(x.stride(1) == 1 for x in tensors), [x.stride() for x in tensors]
    assert low is None or low.stride() == high.stride(), (low.stride(), high.stride())
    aligned = all(x.stride(0) % 4 == 0 and x.data_ptr() % (4 * x.element_size()) == 0 for x in tensors)
    each = 4 if aligned and columns % 4 == 0 else 1
    driver.start(
        _cut(target_of(matrix.device), each),
        -(-rows * (columns // each) // _THREADS),
        matrix,
        matrix.data_ptr(),
        *(0 if factor is None else _address(factor) for factor in factors),
        *(high.data_ptr(), 0 if low is None else low.data_ptr()),
        *(matrix.stride(0), high.stride(0), rows, columns),
    )


def _address(tensor: Tensor, offset: int = 0) -> int:
    """Where element `offset` of the first row lies."""
    assert tensor.is_contiguous(), (tensor.shape, tensor.stride())
    return tensor.data_ptr() + offset * tensor.element_size()


def _ctas(rows: int) -> int:
    """CTAs for so many rows, with eight lanes for each."""
    return -(-rows // _ROWS)
