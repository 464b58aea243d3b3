"""`marlin`: dense INT4 in the order in which the Marlin kernel reads it (IST-DASLab/marlin, `Layer`).

    B  int32    [K/16, 2N]  the codes, in tensor-core fragments
    s  float16  [K/G, N]    the scales, reordered; [1, N] when per column

Weights. The matrix is cut into tiles of 16 inputs by 64 outputs. A tile is 512 bytes without a gap, 16 for each of the 32
threads of a warp: four words, one for each of the 16 x 16 blocks side by side, with the eight codes that mma.m16n8k16 wants in
this thread. Let  k = 16 kt + 8 kh + 2 kp + kb  and  n = 64 nc + 16 j + 8 h + c.  The code of (n, k) then lies

    in tile (kt, nc),  for thread 4 c + kp,  in word j,  in nibble 4 kb + 2 h + kh

so that the nibbles of B, one after the other, have the digits (kt, nc, c, kp, j, kb, h, kh). With kb on top, the two codes of
an fp16 pair (k, k + 1) are sixteen bits apart, and one masked `lop3` extracts both.

Scales. Those that one thread needs lie side by side. In groups they multiply the weights, and a thread has one output in each
of eight 8-wide blocks:  n = 64 b + 8 m + i  is stored as (b, i, m). Per column they multiply the accumulators, where a thread
has two neighbours in each of four blocks:  n = 32 b + 8 m + 2 i + l  is stored as (b, i, m, l). One group that spans all of K
counts as per column.

Read by IST-DASLab/marlin and by vLLM up to 0.10.1, and by our runtime. N % 256, K % 128, groups of 128 or per column, float16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.formats.bits import Shuffle
from marlin_tools.formats.config import Spelling
from marlin_tools.formats.format import Format, expect, group_size_of, indivisible, matrix_size, ungroupable
from marlin_tools.quantized import QuantizedLinear, pack_nibbles, unpack_nibbles

WEIGHTS = Shuffle(rows=(4, 2, 8), columns=(2, 4, 2), order=(4, 0, 3, 6, 1, 7, 2, 5))
GROUP_SCALES = Shuffle(rows=(), columns=(8, 8), order=(0, 1, 3, 2))
COLUMN_SCALES = Shuffle(rows=(), columns=(4, 4, 2), order=(0, 1, 3, 2, 4))


@dataclass(frozen=True)
class Marlin(Format):
    """The dense kernel's own layout."""

    name: str = "marlin"
    suffixes: tuple[str, ...] = ("B", "s")
    spellings: tuple[Spelling, ...] = (("marlin", "marlin"), ("gptq", "marlin"))

    def limits(self, n: int, k: int, group_size: int, *, sparse: bool | None = None) -> str | None:
        """What IST's layer accepts."""
        return indivisible(n, "outputs", 256) or indivisible(k, "inputs", 128) or ungroupable(k, group_size, only=128)

    def pack(self, linear: QuantizedLinear, model_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """See the layout above; scales are float16 for every model."""
        n, k = linear.shape
        self.admit(n, k, linear.group_size)
        scales_gn = linear.scales.t()
        return {
            "B": pack_nibbles(WEIGHTS.apply(linear.codes)).view(k // 16, 2 * n),
            "s": _scale_order(len(scales_gn)).apply(scales_gn).view(-1, n),
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> QuantizedLinear:
        """One row of scales is per column."""
        n, k = shape
        words, scales = self.take(tensors)
        groups, _ = matrix_size("s", scales)
        group_size = group_size_of(k, groups)
        self.admit(n, k, group_size)
        expect("B", words, (k // 16, 2 * n), torch.int32)
        expect("s", scales, (groups, n), torch.float16)
        codes = WEIGHTS.undo(unpack_nibbles(words), (n, k))
        scales_gn = _scale_order(groups).undo(scales, (groups, n))
        return QuantizedLinear(codes, scales_gn.t().contiguous(), group_size)

    def shape_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """From `B`."""
        rows, columns = matrix_size("B", tensors["B"])
        return columns // 2, 16 * rows


def _scale_order(groups: int) -> Shuffle:
    return COLUMN_SCALES if groups == 1 else GROUP_SCALES


MARLIN = Marlin()
