"""The triangular factor that the column sweep needs: R *upper* with R Rᵀ = H, in float64, block by block from the last column.

    upper, corners, info = reversed_cholesky(matrix)

`corners` are the inverses of R's diagonal blocks as far as they were needed on the way, `info` is 0 if there is an R.
"""

import torch
from torch import Tensor

_FACTOR_BLOCK = 1024


def reversed_cholesky(matrix_kk: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """R upper with R Rᵀ = matrix, the inverses of its diagonal blocks as far as they were needed, and 0 if there is an R.

    On a GPU in place and block by block from the last column back. The plain way is the Cholesky factor of the matrix with its
    indices reversed; a GPU would need three more copies for it.
    """
    if not matrix_kk.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrix_kk.flip(0, 1))
        return lower.flip(0, 1), [], info
    k = matrix_kk.shape[0]
    failed, inverses = torch.zeros((), dtype=torch.int32, device=matrix_kk.device), []
    for block in reversed(blocks_of(k)):
        start, before = block.start, slice(0, block.start)
        lower, info = torch.linalg.cholesky_ex(matrix_kk[block, block].flip(0, 1))
        failed |= info
        corner = lower.flip(0, 1)
        matrix_kk[block, block] = corner
        inverses.append(inverse_of(corner))
        panel = matrix_kk[before, block] @ inverses[-1].T
        matrix_kk[before, block] = panel
        for left in range(0, start, 4 * _FACTOR_BLOCK):  # only what lies on or above the diagonal
            part = slice(left, min(left + 4 * _FACTOR_BLOCK, start))
            matrix_kk[: part.stop, part].addmm_(panel[: part.stop], panel[part].T, alpha=-1)
    return matrix_kk.triu_(), inverses[::-1], failed


def blocks_of(k: int) -> list[slice]:
    """The blocks of columns in which a factorisation proceeds."""
    return [slice(start, min(start + _FACTOR_BLOCK, k)) for start in range(0, k, _FACTOR_BLOCK)]


def inverse_of(upper_bb: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix."""
    unit = torch.eye(len(upper_bb), dtype=upper_bb.dtype, device=upper_bb.device)
    return torch.linalg.solve_triangular(upper_bb, unit, upper=True)
