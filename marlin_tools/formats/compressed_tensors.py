"""`compressed-tensors`: the `pack-quantized` layout of the compressed-tensors library, for 4-bit symmetric weights.

    weight_packed  int32        [N, ceil(K/8)]  nibble k mod 8 of word [n, k div 8] is the code 0..15 of (n, k)
    weight_scale   model dtype  [N, K/G]        [N, 1] when per column
    weight_shape   int64        [2]             (N, K)

The library counts codes from -8 and adds 8 when it packs, so the nibbles are our codes. It is the one format that stores scales
in the model's dtype: a float16 scale that bfloat16 cannot hold is an error, not a rounding.

Loaded by vLLM, SGLang and, with compressed-tensors installed, transformers. K need not be a multiple of anything.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from marlin_tools.errors import FormatError
from marlin_tools.formats.config import Spelling
from marlin_tools.formats.format import Format, cast_exactly, expect, group_size_of, matrix_size, ungroupable
from marlin_tools.quantized import ActivationType, QuantizedLinear, pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class CompressedTensors(Format):
    """`pack-quantized`, symmetric, W4A16 or W4A8 with FP8 activations: the tensors are the same."""

    name: str = "compressed-tensors"
    suffixes: tuple[str, ...] = ("weight_packed", "weight_scale", "weight_shape")
    spellings: tuple[Spelling, ...] = (("compressed-tensors", "pack-quantized"),)
    says: tuple[ActivationType, ...] = ("16bit", "fp8")
    mixes: bool = True

    def limits(self, n: int, k: int, group_size: int, *, sparse: bool | None = None) -> str | None:
        """Only that groups divide K."""
        return ungroupable(k, group_size)

    def pack(self, linear: QuantizedLinear, model_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """See the layout above; scales are cast to `model_dtype`, which must not change them."""
        n, k = linear.shape
        return {
            "weight_packed": pack_nibbles(pad(linear.codes, (0, -k % 8))),
            "weight_scale": cast_exactly("weight_scale", linear.scales, model_dtype).contiguous(),
            "weight_shape": torch.tensor((n, k), dtype=torch.int64, device=linear.codes.device),
        }

    def pack_all(
        self, linear: QuantizedLinear, rows: Mapping[str, slice], model_dtype: torch.dtype = torch.float16
    ) -> dict[str, dict[str, Tensor]]:
        """All at once: a row is stored by itself."""
        whole, k = self.pack(linear, model_dtype), linear.shape[1]
        shapes = {n: whole["weight_shape"].new_tensor((n, k)) for n in {own.stop - own.start for own in rows.values()}}
        return {
            name: {
                "weight_packed": whole["weight_packed"][own],
                "weight_scale": whole["weight_scale"][own],
                "weight_shape": shapes[own.stop - own.start],
            }
            for name, own in rows.items()
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> QuantizedLinear:
        """Scales may be in any floating-point type that is exact in float16."""
        n, k = shape
        packed, scales, stored_shape = self.take(tensors)
        _, groups = matrix_size("weight_scale", scales)
        group_size = group_size_of(k, groups)
        expect("weight_packed", packed, (n, -(-k // 8)), torch.int32)
        expect("weight_scale", scales, (n, groups))
        if self.shape_of(tensors) != (n, k):
            raise FormatError(
                f"`weight_shape` holds {stored_shape.tolist()}, not {[n, k]}", hint="download the checkpoint again"
            )
        codes = unpack_nibbles(packed)[:, :k].contiguous()
        return QuantizedLinear(codes, cast_exactly("weight_scale", scales, torch.float16).contiguous(), group_size)

    def shape_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """`weight_shape` itself."""
        expect("weight_shape", tensors["weight_shape"], (2,), torch.int64)
        n, k = tensors["weight_shape"].tolist()
        return n, k


COMPRESSED_TENSORS = CompressedTensors()
