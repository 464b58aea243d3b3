"""`marlin-24`: 2:4-sparse INT4 in the order in which the Sparse-Marlin kernel reads it (IST-DASLab/Sparse-Marlin, `Layer_2_4`).

    weight_packed  int32    [K/32, 2N]  the two kept codes of every quad (four neighbouring inputs of one output)
    meta           int16    [K/32, 2N]  where in its quad each kept code stands: K N / 16 elements
    scale_packed   float16  [K/G, N]    G counts original inputs; [1, N] when per column

These names are compressed-tensors'. vLLM's `gptq_marlin_24` calls the same tensors `B_24`, `B_meta`, `s`, and is read as well.

Kept codes. Only a code 8, which is the value 0, is ever dropped: a bare code says nothing about magnitude. A quad that keeps
positions i0 < i1 has the metadata nibble i0 + 4 i1; with fewer than two nonzeros it keeps zeros as well, by the rule of `KEPT`.
The kept codes form a dense matrix [N, K/2] and lie as in `marlin.py`, nibbles in the order (kt, nc, c, kp, j, kb, h, kh), but
the 64 outputs of a tile are dealt out as mma.sp wants them:  n = 64 nc + 8 c + 4 h + j.

Metadata. One int16 covers 16 inputs, one nibble for each quad, which makes a matrix [N, K/16]. Let
n = 64 b + 8 c + 4 n2 + 2 n1 + n0  and the column be  2 m1 + m0;  it is stored as (m1, b, n1, c, n0, m0, n2). That is CUTLASS's
interleaved column-major order over rows in Marlin's order. Torch's semi-structured tensors order rows differently.

Scales. In groups, 8 columns n = 8 b + 4 d + a are stored as (b, a, d); per column they stay as they are.

Read by vLLM up to 0.15 and by our runtime. N % 64, K % 32, groups of 128 or per column, float16, and 2:4 throughout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.errors import FormatError
from marlin_tools.formats.bits import Shuffle
from marlin_tools.formats.config import Spelling
from marlin_tools.formats.format import Format, expect, group_size_of, indivisible, matrix_size, ungroupable
from marlin_tools.quantized import ZERO, QuantizedLinear, pack_nibbles, unpack_nibbles

WEIGHTS = Shuffle(rows=(8, 2, 4), columns=(2, 4, 2), order=(4, 0, 1, 6, 3, 7, 2, 5))
META = Shuffle(rows=(8, 2, 2, 2), columns=(2,), order=(5, 0, 3, 1, 4, 6, 2))
GROUP_SCALES = Shuffle(rows=(), columns=(2, 4), order=(0, 1, 3, 2))

KEPT = (0xE, 0x8, 0x9, 0x4, 0xE, 0x8, 0x9, 0, 0xE, 0xC, 0xD, 0, 0xE, 0, 0, 0)
"""Metadata nibble by which positions are nonzero (bit i for position i); 0 for three or four, which 2:4 forbids."""


@dataclass(frozen=True)
class Marlin24(Format):
    """The sparse kernel's own layout; other spellings differ in the names of the tensors only."""

    name: str = "marlin-24"
    suffixes: tuple[str, ...] = ("weight_packed", "meta", "scale_packed")
    spellings: tuple[Spelling, ...] = (("compressed-tensors", "marlin-24"),)

    def limits(self, n: int, k: int, group_size: int, *, sparse: bool | None = None) -> str | None:
        """What the layout can address; 2:4 is needed as soon as it can be known."""
        dense = "weights are not 2:4 sparse" if sparse is False else None
        return dense or indivisible(n, "outputs", 64) or indivisible(k, "inputs", 32) or ungroupable(k, group_size, only=128)

    def pack(self, linear: QuantizedLinear, model_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """See the layout above; scales are float16 for every model."""
        n, k = linear.shape
        self.admit(n, k, linear.group_size)
        quads = linear.codes.reshape(n, k // 4, 4)
        positions = _kept_positions(quads)
        kept = quads.gather(2, _indices(positions)).view(n, k // 2)
        scales = linear.scales.t()
        tensors = (
            pack_nibbles(WEIGHTS.apply(kept)).view(k // 32, 2 * n),
            META.apply(pack_nibbles(positions, torch.int16)).view(k // 32, 2 * n),
            (GROUP_SCALES.apply(scales) if len(scales) > 1 else scales).reshape(-1, n).contiguous(),
        )
        return dict(zip(self.suffixes, tensors, strict=True))

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> QuantizedLinear:
        """Every dropped position gets code 8; one row of scales is per column."""
        n, k = shape
        words, meta, scales = self.take(tensors)
        words_name, meta_name, scales_name = self.suffixes
        groups, _ = matrix_size(scales_name, scales)
        group_size = group_size_of(k, groups)
        self.admit(n, k, group_size)
        expect(words_name, words, (k // 32, 2 * n), torch.int32)
        expect(meta_name, meta, (k // 32, 2 * n), torch.int16)
        expect(scales_name, scales, (groups, n), torch.float16)
        positions = unpack_nibbles(META.undo(meta, (n, k // 16)))
        illegal = positions[(positions & 3) >= positions >> 2]
        if len(illegal):
            raise FormatError(
                f"`{meta_name}`: nibble {int(illegal[0]):#x} does not name two of four inputs in order",
                hint="download the checkpoint again",
            )
        kept = WEIGHTS.undo(unpack_nibbles(words), (n, k // 2)).view(n, k // 4, 2)
        quads = torch.full((n, k // 4, 4), ZERO, dtype=torch.uint8, device=words.device)
        codes = quads.scatter_(2, _indices(positions), kept).view(n, k)
        scales_gn = GROUP_SCALES.undo(scales, (groups, n)) if groups > 1 else scales
        return QuantizedLinear(codes, scales_gn.t().contiguous(), group_size)

    def shape_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """From the packed weights."""
        words_name = self.suffixes[0]
        rows, columns = matrix_size(words_name, tensors[words_name])
        return columns // 2, 32 * rows


def _kept_positions(quads: Tensor) -> Tensor:
    """The metadata nibble of each quad, uint8 [N, K/4]."""
    places = torch.tensor((1, 2, 4, 8), dtype=torch.uint8, device=quads.device)
    nonzero = ((quads != ZERO) * places).sum(dim=2, dtype=torch.uint8)
    nibbles = torch.tensor(KEPT, dtype=torch.uint8, device=quads.device)[nonzero.int()]
    if bool((full := nibbles == 0).any()):
        n, quad = full.nonzero()[0].tolist()
        raise FormatError(
            f"format `marlin-24`: output {n} has more than two nonzeros in inputs {4 * quad}..{4 * quad + 3}",
            hint="prune first (`--sparsity 2:4`), or use a dense format",
        )
    return nibbles


def _indices(nibbles: Tensor) -> Tensor:
    """Both positions that each nibble names, as gather and scatter want them: int64 [N, K/4, 2]."""
    return torch.stack((nibbles & 3, nibbles >> 2), dim=2).long()


MARLIN_24 = Marlin24()
GPTQ_MARLIN_24 = Marlin24(suffixes=("B_24", "B_meta", "s"), spellings=(("gptq", "marlin_24"),))
