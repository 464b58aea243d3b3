"""`marlin_tools::packed_linear`: packed weights, dense or 2:4 sparse, as tensors alone, for engines that compile a model once.
And `marlin_tools::packed_fp8_linear`, the same of a dense weight whose linear reads FP8.

Such an engine keeps what it compiled and may run it with another checkpoint under the same path. So nothing that depends on the
weights' values is a number in the graph: the width of the tiles says whether a weight is dense or sparse, and the exponent lies
in a tensor. That one stays on the CPU: reading it synchronises nothing, also while a CUDA graph is being captured.
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
_ARGUMENTS = "Tensor x, Tensor codes, Tensor scales, Tensor exponent, Tensor? bias, int out_features"


def packed_linear(x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute x [..., K] times the packed weight, transposed, plus bias; `exponent` is `exponent_tensor` of the weight."""
    y: Tensor = torch.ops.marlin_tools.packed_linear(x.reshape(-1, x.shape[-1]), codes, scales, exponent, bias, out_features)
    return y.view(*x.shape[:-1], out_features)


def packed_fp8_linear(
    x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """The same where x is meant to be rounded to FP8: it is where that is faster, which its rows say when the operator runs."""
    y: Tensor = torch.ops.marlin_tools.packed_fp8_linear(
        x.reshape(-1, x.shape[-1]), codes, scales, exponent, bias, out_features
    )
    return y.view(*x.shape[:-1], out_features)


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


def _fake(
    x: Tensor,
    codes: Tensor,  # noqa: ARG001
    scales: Tensor,  # noqa: ARG001
    exponent: Tensor,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    out_features: int,
) -> Tensor:
    return x.new_empty((x.shape[0], out_features))


def _register(name: str, choose: Callable[[int, Tensor, int], LinearOperator]) -> None:
    def on_cuda(x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        power = int(exponent.item())
        return choose(x.shape[0], codes, power).on_cuda(x.contiguous(), codes, scales, bias, out_features, power)

    def on_cpu(x: Tensor, codes: Tensor, scales: Tensor, exponent: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
        power = int(exponent.item())
        return choose(x.shape[0], codes, power).on_cpu(x.contiguous(), codes, scales, bias, out_features, power)

    _library.define(f"{name}({_ARGUMENTS}) -> Tensor")
    _library.impl(name, on_cuda, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(f"marlin_tools::{name}", _fake, lib=_library)


_register("packed_linear", _stored)
_register("packed_fp8_linear", _fp8)
