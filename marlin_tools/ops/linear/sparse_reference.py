"""The 2:4-sparse operation in plain torch: the oracle of the kernels, and what runs on a CPU."""

from dataclasses import replace

from torch import Tensor

from marlin_tools.ops.linear import layout, reference
from marlin_tools.ops.linear.sparse_layout import PackedSparse, unpack_sparse


def w24a16_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Compute x [M, K] times the packed weight, transposed, plus bias."""
    return reference.linear(x, unpack_sparse(PackedSparse(codes, scales, out_features, 0)), bias)


def exact(x: Tensor, packed: PackedSparse, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """The same in float64 without the last rounding; see `reference.exact`."""
    return reference.exact(x, as_dense(packed), bias, rounded=rounded)


def error_bound(x: Tensor, packed: PackedSparse, bias: Tensor | None = None, *, rounded: bool = False) -> Tensor:
    """What `|y - exact|` may not exceed, per element; see `reference.error_bound`."""
    return reference.error_bound(x, as_dense(packed), bias, rounded=rounded)


def as_dense(packed: PackedSparse) -> layout.PackedWeight:
    """The same weight as the dense kernels read it."""
    return replace(layout.pack(unpack_sparse(packed)), exponent=packed.exponent)
