"""`gptq`: the layout of AutoGPTQ and GPTQModel, and the widest-read one for dense INT4.

    qweight  int32    [K/8, N]    nibble k mod 8 of word [k div 8, n] is the code 0..15 of (n, k)
    qzeros   int32    [K/G, N/8]  nibble n mod 8 of word [g, n div 8] is the zero point, see below
    scales   float16  [K/G, N]    natural order
    g_idx    int32    [K]         k div G: we neither write nor read permuted inputs ("act-order")

Zero points. Ours are 8 everywhere, but version 1 of the format stores zero - 1 and its loaders add 1 back, so that a file holds
0x77777777. Version 2 (`checkpoint_format: gptq_v2`) stores 8. Kernels for symmetric weights never look, the others produce
garbage from a wrong one, so it is checked on reading. We write version 1, and read both.

Loaded by vLLM, SGLang, GPTQModel and, with gptqmodel installed, transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.errors import FormatError
from marlin_tools.formats.config import Spelling
from marlin_tools.formats.format import Format, cast_exactly, expect, group_size_of, indivisible, matrix_size, ungroupable
from marlin_tools.quantized import ZERO, QuantizedLinear, pack_nibbles, unpack_nibbles


@dataclass(frozen=True)
class Gptq(Format):
    """Version 1 by default; `stored_zero` is what `qzeros` holds for the zero point 8."""

    name: str = "gptq"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    spellings: tuple[Spelling, ...] = (("gptq", "gptq"),)
    left_out: tuple[str, ...] = ("g_idx",)
    stored_zero: int = ZERO - 1

    def limits(self, n: int, k: int, group_size: int, *, sparse: bool | None = None) -> str | None:
        """Words of eight codes along K, and of eight zero points along N."""
        return indivisible(n, "outputs", 8) or indivisible(k, "inputs", 8) or ungroupable(k, group_size)

    def pack(self, linear: QuantizedLinear, model_dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """See the layout above; scales stay float16 for every model."""
        (n, k), group_size, device = linear.shape, linear.group_size, linear.codes.device
        self.admit(n, k, group_size)
        zeros = torch.full((k // group_size, n), self.stored_zero, dtype=torch.uint8, device=device)
        return {
            "qweight": pack_nibbles(linear.codes).t().contiguous(),
            "qzeros": pack_nibbles(zeros),
            "scales": linear.scales.t().contiguous(),
            "g_idx": torch.arange(k, dtype=torch.int32, device=device) // group_size,
        }

    def unpack(self, tensors: Mapping[str, Tensor], shape: Sequence[int]) -> QuantizedLinear:
        """Scales may be bfloat16 or float32 if that is exact in float16."""
        n, k = shape
        qweight, qzeros, scales, g_idx = self.take(tensors)
        groups, _ = matrix_size("scales", scales)
        group_size = group_size_of(k, groups)
        self.admit(n, k, group_size)
        expect("qweight", qweight, (k // 8, n), torch.int32)
        expect("qzeros", qzeros, (groups, n // 8), torch.int32)
        expect("scales", scales, (groups, n))
        expect("g_idx", g_idx, (k,), torch.int32)
        self._check_zeros(unpack_nibbles(qzeros))
        if not torch.equal(g_idx, torch.arange(k, dtype=torch.int32, device=g_idx.device) // group_size):
            raise FormatError(
                "`g_idx` permutes the inputs (act-order), which no format here can hold",
                hint="quantize again with `desc_act` false; static act-order within groups is fine",
            )
        scales_ng = cast_exactly("scales", scales, torch.float16).t().contiguous()
        return QuantizedLinear(unpack_nibbles(qweight.t()), scales_ng, group_size)

    def shape_of(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """From `qweight`."""
        rows, n = matrix_size("qweight", tensors["qweight"])
        return n, 8 * rows

    def _check_zeros(self, zeros: Tensor) -> None:
        wrong = zeros[zeros != self.stored_zero]
        if not len(wrong):
            return
        _, version = self.spellings[0]
        hint = "asymmetric weights cannot be held; quantize again with `sym` true"
        if bool((zeros == ZERO).all()):
            hint = 'these are zero points of version 2: if so, set `"checkpoint_format": "gptq_v2"` in its config.json'
        raise FormatError(
            f"`qzeros` holds {int(wrong[0])}, but symmetric weights in `{version}` hold {self.stored_zero} everywhere",
            hint=hint,
        )


GPTQ = Gptq()
GPTQ_V2 = Gptq(spellings=(("gptq", "gptq_v2"),), stored_zero=ZERO)
