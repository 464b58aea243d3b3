"""`marlin_tools::packed_linear`: packed weights, dense or 2:4 sparse, as tensors alone, for engines that compile a model once.
And `marlin_tools::packed_fp8_linear`, the same of a dense weight whose linear reads FP8.

Such an engine keeps what it compiled and may run it with another checkpoint under the same path. So nothing that depends on the
weights' values is a number in the graph: the width of the tiles says whether a weight is dense or sparse, and the exponent lies
in a tensor. That one stays on the CPU: reading it synchronises nothing, also while a CUDA graph is being captured.

The operators write into a tensor that the caller has made. torch.compile assumes of what an operator returns that it may begin
anywhere once one of its operands may, as any tensor on the CPU may; the kernels behind it would then read one number at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from marlin_tools.ops.linear import w4a8, w4a16, w24a16
from marlin_tools.ops.linear.layout import WORDS, PackedTiles
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.sparse_layout import WORDS as SPARSE_WORDS

_OPERATORS = {WORDS: w4a16.OPERATOR, SPARSE_WORDS: w24a16.OPERATOR}

_library = torch.library.Library("marlin_tools", "FRAGMENT")
_ARGUMENTS = "Tensor(a!) y, Tensor x, Tensor codes, Tensor scales, Tensor exponent, Tensor? bias"


def packed_linear(x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute x [..., K] times the packed weight, transposed, plus bias; `exponent` is `exponent_tensor` of the weight."""
    rows, y = _rows(x, out_features)
    torch.ops.marlin_tools.packed_linear(y, rows, codes, scales, exponent, bias)
    return y.view(*x.shape[:-1], out_features)


def packed_fp8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """The same where x is meant to be rounded to FP8: it is where that is faster, which its rows say when the operator runs."""
    rows, y = _rows(x, out_features)
    torch.ops.marlin_tools.packed_fp8_linear(y, rows, codes, scales, exponent, bias)
    return y.view(*x.shape[:-1], out_features)


def _rows(x: Tensor, out_features: int) -> tuple[Tensor, Tensor]:
    """The inputs as a matrix, and an empty one for the outputs."""
    if not x.ndim:
        raise ValueError("x must be [..., K], got []")
    rows = x.reshape(-1, x.shape[-1])
    return rows, rows.new_empty((rows.shape[0], out_features))


def exponent_tensor(weight: PackedTiles) -> Tensor:
    """The exponent of a weight as the operator takes it."""
    return torch.tensor([weight.exponent], dtype=torch.int32, device="cpu")


def _stored(_rows: int, codes: Tensor, _exponent: int) -> LinearOperator:
    words = codes.shape[-1]
    if words not in _OPERATORS:
        raise ValueError(f"codes have {words} words a tile, packed weights have {' or '.join(map(str, _OPERATORS))}")
    return _OPERATORS[words]


def _fp8(rows: int, _codes: Tensor, exponent: int) -> LinearOperator:
    return w4a8.operator_for(rows, exponent)


def _check(y: Tensor, x: Tensor) -> None:
    if y.ndim != 2 or len(y) != len(x) or y.dtype != x.dtype or y.device != x.device or not y.is_contiguous():
        raise ValueError(
            f"y must be {x.dtype} [{x.shape[0]}, N] on {x.device} and contiguous, got {y.dtype} {list(y.shape)} on {y.device}"
        )


def _register(name: str, choose: Callable[[int, Tensor, int], LinearOperator]) -> None:
    def on_cuda(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None) -> None:
        _check(y, x)
        power = int(exponent.item())
        choose(x.shape[0], codes, power).write(y, x.contiguous(), codes, scales, bias, power)

    def on_cpu(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None) -> None:
        _check(y, x)
        power = int(exponent.item())
        y.copy_(choose(x.shape[0], codes, power).on_cpu(x.contiguous(), codes, scales, bias, y.shape[1], power))

    def fake(y: Tensor, x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None) -> None:
        pass

    _library.define(f"{name}({_ARGUMENTS}) -> ()")
    _library.impl(name, on_cuda, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"marlin_tools::{name}", fake, lib=_library)


_register("packed_linear", _stored)
_register("packed_fp8_linear", _fp8)
