"""Matrix products on tensor cores that stand in for float32 arithmetic.

Activations have 16 bits, so the products of their elements are exact in float32, and a tensor core adds them up in float32:
`gram` and `cross` add such products to a float32 matrix in place. What is lost is that tensor cores cut sums off where other
units round them, about 1e-5 of a sum over a chunk of tokens.

A product of float32 matrices is cut in three: with x = high + low, two numbers of float16 with 11 bits each, a·b = high·high +
high·low + low·high up to 2^-22. Powers of two bring what float16 could not hold into its range: one for some columns of the
left factor at a time, one for each column of the right factor. A left factor that takes part in several products is cut once,
as `Parts`. On a CPU all of them are plain float32 products.
"""

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from marlin_tools.errors import DeviceError
from marlin_tools.ops.solver import kernels as solver

_PANEL = 2048
"""Columns of a Gram matrix that are computed at a time; only what lies on or below the diagonal panel is."""

_WIDE = 4096
"""Columns of a product that are computed at a time: its right factor is cut, which takes memory."""

_EXPONENT_BITS = 0x7F800000
_LARGEST = 2.0**12
"""Factors are scaled so that their largest element lies between this and twice this; float16 holds 15 times as much."""

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
        _multiply(total_kk[start:, start:stop], x_tk[:, start:].T, x_tk[:, start:stop])


def lower(total_kk: Tensor) -> Iterator[Tensor]:
    """The parts of a Gram matrix that `mirror` does not fill by itself."""
    for start in range(0, len(total_kk), _PANEL):
        stop = start + _PANEL
        yield total_kk[start:stop, :stop]


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
        _multiply(total_nk, left_tn.T, right_tk)
    else:
        total_nk.addmm_(left_tn.float().T, right_tk.float())


class Parts:
    """A matrix as the left factor of products: on a GPU (high + low) · scale, in float16, on a CPU as it is.

    scale   [K] powers of two, for the columns
    low     None where `high` is all there is
    """

    def __init__(self, high: Tensor, low: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.high, self.low, self.scale = high, low, scale

    @classmethod
    def of(cls, matrix: Tensor) -> "Parts":
        """Cut a matrix; 16 bits need no low part. On a CPU it stays whole."""
        if not matrix.is_cuda:
            return cls(matrix.float() if matrix.itemsize == 2 else matrix)
        if matrix.dtype == torch.float16:
            return cls(matrix, None, matrix.new_ones(matrix.shape[1], dtype=torch.float32))
        parts = cls.like(matrix)
        parts.put(slice(0, matrix.shape[1]), matrix.float())
        return parts if matrix.dtype == torch.float32 else cls(parts.high, None, parts.scale)

    @classmethod
    def like(cls, matrix: Tensor) -> "Parts":
        """Room for a matrix of this shape that `put` fills piece by piece."""
        if not matrix.is_cuda:
            return cls(torch.empty_like(matrix))
        high, low = (torch.empty_like(matrix, dtype=torch.float16) for _ in range(2))
        return cls(high, low, matrix.new_empty(matrix.shape[1], dtype=torch.float32))

    def __getitem__(self, columns: slice) -> "Parts":
        low, scale = (None if x is None else x[..., columns] for x in (self.low, self.scale))
        return Parts(self.high[:, columns], low, scale)

    def put(self, columns: slice, values: Tensor) -> None:
        """Replace some columns."""
        if self.scale is None:
            self.high[:, columns] = values
            return
        scale = self.scale[columns]
        scale.copy_(_size(torch.linalg.vector_norm(values, torch.inf)))
        solver.cut(values, (None, 1 / scale), self.high[:, columns], None if self.low is None else self.low[:, columns])


def product(left: Tensor | Parts, right: Tensor) -> Tensor:
    """The product of float32 matrices; the left one may have 16 bits."""
    if isinstance(left, Tensor):
        if not left.is_cuda or left.dtype == torch.float64:
            return left @ right
        left = Parts.of(left)
    return left.high @ right if left.scale is None else _in_parts(left, right, rough=False)


def rough_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of float32 matrices, on a GPU with 11 bits of each element: for sums that are only reported."""
    return _in_parts(Parts.of(left), right, rough=True) if left.is_cuda else left @ right


def _in_parts(left: Parts, right: Tensor, *, rough: bool) -> Tensor:
    """The product as a sum of products of 16 bits, the smallest first."""
    (n, k), m = left.high.shape, right.shape[1]
    result = torch.empty(n, m, dtype=torch.float32, device=right.device)
    if k == 0:
        return result.zero_()
    for start in range(0, m, _WIDE):
        panel = slice(start, min(start + _WIDE, m))
        part = result[:, panel]
        high, low, size = _cut_right(right[:, panel], left, rough=rough)
        more = False
        for one, other in ((left.low, high), (left.high, low)):
            if one is not None and other is not None and not rough:
                _multiply(part, one, other, add=more)
                more = True
        _multiply(part, left.high, high, add=more)
        part *= size
    return result


def _cut_right(right_km: Tensor, left: Parts, *, rough: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """The two parts of a right factor, and the size of each of its columns that was taken out; memory as it comes."""
    assert left.scale is not None, "nothing to cut for"
    turned = right_km.stride(1) != 1
    held = right_km.T if turned else right_km
    scaled = held * (left.scale if turned else left.scale[:, None])
    size = _size(torch.linalg.vector_norm(scaled, torch.inf, dim=1 if turned else 0))
    del scaled
    high = torch.empty(held.shape, dtype=torch.float16, device=held.device)
    low = None if rough else torch.empty_like(high)
    factors = (left.scale.contiguous(), 1 / size)
    solver.cut(held, factors[::-1] if turned else factors, high, low)
    if turned:
        high, low = high.T, None if low is None else low.T
    return high, low, size


def _size(largest: Tensor) -> Tensor:
    """The power of two by which to divide, so that these become about as large as they may."""
    power = largest.view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32)
    return power.clamp_(min=2.0**-100) / _LARGEST


def _narrow(x: Tensor) -> bool:
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _multiply(total_nm: Tensor, left_nk: Tensor, right_km: Tensor, *, add: bool = True) -> None:
    """Make a float32 matrix the product of two factors of 16 bits, or add it: torch would make it first and then add it.

    Factors may lie in memory the other way around. cuBLAS thinks in columns, so it is told to compute totalᵀ = rightᵀ leftᵀ.
    """
    (n, k), m = left_nk.shape, right_km.shape[1]
    narrow = _CUDA_TYPES[left_nk.dtype]
    one, beta = (ctypes.byref(ctypes.c_float(x)) for x in (1.0, float(add)))
    (right_way, right_stride), (left_way, left_stride) = _way(right_km), _way(left_nk)
    with torch.cuda.device(total_nm.device):
        status = _gemm()(
            *(ctypes.c_void_p(torch.cuda.current_blas_handle()), right_way, left_way, m, n, k, one),
            *(ctypes.c_void_p(right_km.data_ptr()), narrow, right_stride),
            *(ctypes.c_void_p(left_nk.data_ptr()), narrow, left_stride, beta),
            *(ctypes.c_void_p(total_nm.data_ptr()), _CUDA_TYPES[total_nm.dtype], _way(total_nm)[1]),
            *(_COMPUTE_FLOAT32, _DEFAULT_ALGORITHM),
        )
    if status:
        raise DeviceError(f"cuBLAS refused a product of {n} x {k} by {k} x {m} (status {status})")


def _way(matrix: Tensor) -> tuple[int, int]:
    """Whether cuBLAS has to turn a matrix around, and how far its rows (or columns) are apart."""
    if matrix.stride(1) == 1:
        return _AS_IT_IS, matrix.stride(0)
    assert matrix.stride(0) == 1, matrix.stride()
    return _TRANSPOSED, matrix.stride(1)


@cache
def _gemm() -> Any:
    """The function of the library that torch has loaded."""
    return ctypes.CDLL(f"libcublas.so.{str(torch.version.cuda).partition('.')[0]}").cublasGemmEx
