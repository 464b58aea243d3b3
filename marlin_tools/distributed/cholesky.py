"""The factor of a large Hessian, by all processes together; read `ops/solver/cholesky.py` first."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from marlin_tools.ops.solver.cholesky import blocks_of, inverse_of

if TYPE_CHECKING:
    from marlin_tools.distributed.team import Team


def shared_cholesky(matrix_kk: Tensor, team: "Team") -> tuple[Tensor, list[Tensor], Tensor]:
    """The same by all processes together, with the same bits however many they are: each keeps every so-manyth block of columns
    up to date, and tells the others when it is done."""
    failed, inverses = torch.zeros(1, device=matrix_kk.device), []
    blocks, late = blocks_of(len(matrix_kk)), matrix_kk[:, :0]

    def update(parts: Sequence[slice]) -> None:
        """What the last column that was done means for others."""
        for part in parts:
            matrix_kk[: part.stop, part].addmm_(late[: part.stop], late[part].T, alpha=-1)

    for number, block in reversed(list(enumerate(blocks))):
        before, width, mine = slice(0, block.start), block.stop - block.start, blocks[team.rank : number : team.size]
        column_kb, inverse_bb = matrix_kk.new_empty(block.stop, width), matrix_kk.new_empty(width, width)
        owner = number % team.size
        if owner == team.rank:
            update([block])  # first of all: the others wait for it, and have their own to update meanwhile
            lower, info = torch.linalg.cholesky_ex(matrix_kk[block, block].flip(0, 1))
            failed += info.abs()
            column_kb[block] = lower.flip(0, 1)
            inverse_bb.copy_(inverse_of(column_kb[block]))
            column_kb[before] = matrix_kk[before, block] @ inverse_bb.T
        else:
            update(mine)
        for tensor in (column_kb, inverse_bb):
            team.tell(tensor, owner)
        if owner == team.rank:
            update(mine)
        inverses.append(inverse_bb)
        matrix_kk[: block.stop, block] = late = column_kb
    team.add_up([failed])
    return matrix_kk.triu_(), inverses[::-1], failed
