"""Matrix products on tensor cores that stand in for float32 arithmetic.

Activations have 16 bits, so the products of their elements are exact in float32, and a tensor core adds them up in float32:
`gram` and `cross` add such products to a float32 matrix in place. What is lost is that tensor cores cut sums off where other
units round them, about 1e-5 of a sum over a chunk of tokens.

A product of float32 matrices is cut in three: with x = high + low, high the upper 11 bits of the mantissa, a·b = high·high +
high·low + low·high up to 2^-22. A factor that takes part in several products is cut once, as `Parts`. On a CPU all of them are
plain float32 products.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from marlin_tools.errors import DeviceError

_PANEL = 2048
"""Columns of a Gram matrix that are computed at a time; only what lies on or below the diagonal panel is."""

_KEPT_BITS = -(1 << 13)
"""Of the 23 bits of a float32 mantissa, the 10 that TF32 stores."""

_CUDA_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType
_COMPUTE_FLOAT32, _AS_IT_IS, _TRANSPOSED, _DEFAULT_ALGORITHM = 68, 0, 1, -1


def gram(total_kk: Tensor, x_tk: Tensor) -> None:
    """Add xᵀ x to `total`. On a GPU only the lower block triangle is valid until `mirror` is called."""
    k = x_tk.shape[1]
    if not _narrow(x_tk):
        x_tk = x_tk.float()
        total_kk.addmm_(x_tk.T, x_tk)
        return
    for start in range(0, k, _PANEL):
        stop = min(start + _PANEL, k)
        _accumulate(total_kk[start:, start:stop], x_tk[:, start:], x_tk[:, start:stop])


def mirror(total_kk: Tensor) -> None:
    """Complete what `gram` left out."""
    k = total_kk.shape[0]
    for start in range(0, k, _PANEL):
        stop = min(start + _PANEL, k)
        total_kk[start:stop, stop:] = total_kk[stop:, start:stop].T
        square = total_kk[start:stop, start:stop]
        square.copy_(square.tril() + square.tril(-1).T)


def cross(total_nk: Tensor, left_tn: Tensor, right_tk: Tensor) -> None:
    """Add leftᵀ right to `total`."""
    if _narrow(left_tn) and left_tn.dtype == right_tk.dtype:
        _accumulate(total_nk, left_tn, right_tk)
    else:
        total_nk.addmm_(left_tn.float().T, right_tk.float())


class Parts:
    """A float32 matrix as the factor of a product: on a GPU, what TF32 holds of each element exactly, and the rest."""

    def __init__(self, high: Tensor, low: Tensor | None) -> None:
        self.high, self.low = high, low

    @classmethod
    def of(cls, matrix: Tensor) -> "Parts":
        """Cut a matrix; on a CPU it stays whole and shares the memory."""
        if not matrix.is_cuda:
            return cls(matrix, None)
        high = matrix.view(torch.int32).bitwise_and(_KEPT_BITS).view(torch.float32)
        return cls(high, matrix - high)

    @classmethod
    def like(cls, matrix: Tensor) -> "Parts":
        """Room for a matrix of this shape that `put` fills piece by piece."""
        return cls(torch.empty_like(matrix), torch.empty_like(matrix) if matrix.is_cuda else None)

    def __getitem__(self, columns: slice) -> "Parts":
        return Parts(self.high[:, columns], None if self.low is None else self.low[:, columns])

    def put(self, columns: slice, values: Tensor) -> None:
        """Replace some columns."""
        parts = Parts.of(values)
        self.high[:, columns] = parts.high
        if self.low is not None and parts.low is not None:
            self.low[:, columns] = parts.low


def product(left: Tensor | Parts, right: Tensor | Parts) -> Tensor:
    """The product of float32 matrices."""
    if isinstance(left, Tensor) and isinstance(right, Tensor) and left.dtype != torch.float32:
        return left @ right
    left, right = (x if isinstance(x, Parts) else Parts.of(x) for x in (left, right))
    if left.low is None or right.low is None:
        return left.high @ right.high
    with _tensor_cores():
        result = left.low @ right.high
        result.addmm_(left.high, right.low)
        return result.addmm_(left.high, right.high)


def rough_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of float32 matrices, on a GPU with 11 bits of each element: for sums that are only reported."""
    if not left.is_cuda:
        return left @ right
    with _tensor_cores():
        return left @ right


def _narrow(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Float32 products go through TF32 in here."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _accumulate(total_nk: Tensor, left_tn: Tensor, right_tk: Tensor) -> None:
    """Add leftᵀ right, factors of 16 bits, to a float32 matrix in place: torch would make the product first and then add it.

    cuBLAS thinks in columns, so it is told to compute totalᵀ += rightᵀ left.
    """
    (tokens, n), k = left_tn.shape, right_tk.shape[1]
    narrow = _CUDA_TYPES[left_tn.dtype]
    one = ctypes.byref(ctypes.c_float(1.0))
    with torch.cuda.device(total_nk.device):
        status = _gemm()(
            *(ctypes.c_void_p(torch.cuda.current_blas_handle()), _AS_IT_IS, _TRANSPOSED, k, n, tokens, one),
            *(ctypes.c_void_p(right_tk.data_ptr()), narrow, _row_stride(right_tk)),
            *(ctypes.c_void_p(left_tn.data_ptr()), narrow, _row_stride(left_tn), one),
            *(ctypes.c_void_p(total_nk.data_ptr()), _CUDA_TYPES[total_nk.dtype], _row_stride(total_nk)),
            *(_COMPUTE_FLOAT32, _DEFAULT_ALGORITHM),
        )
    if status:
        raise DeviceError(f"cuBLAS refused a product of {n} x {tokens} by {tokens} x {k} (status {status})")


def _row_stride(matrix: Tensor) -> int:
    assert matrix.stride(1) == 1, matrix.stride()
    return matrix.stride(0)


@cache
def _gemm() -> Any:
    """The function of the library that torch has loaded."""
    return ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).partition('.')[0]}").cublasGemmEx
