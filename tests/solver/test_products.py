"""Products of float32 matrices in parts of 16 bits, without a GPU: plain torch in the place of the kernel and of cuBLAS."""

import pytest
import torch
from torch import Tensor

from marlin_tools.ops.solver import kernels as solver
from marlin_tools.ops.solver import products
from marlin_tools.ops.solver.products import Parts

N, K, M = 24, 96, 40


def cut(matrix: Tensor, factors: tuple[Tensor | None, Tensor | None], high: Tensor, low: Tensor | None) -> None:
    """What `cut.cu` says at its top."""
    rows, columns = (1.0 if factor is None else factor for factor in factors)
    value = matrix * (rows[:, None] if isinstance(rows, Tensor) else rows) * columns
    high.copy_(value.half())
    if low is not None:
        low.copy_((value - high.float()).half())


def multiply(total_nm: Tensor, left_nk: Tensor, right_km: Tensor, *, add: bool = True) -> None:
    made = left_nk.float() @ right_km.float()
    total_nm.copy_(total_nm + made if add else made)


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "cut", cut)
    monkeypatch.setattr(products, "_multiply", multiply)
    monkeypatch.setattr(products, "_WIDE", 16)


def in_pieces(matrix: Tensor, piece: int) -> Parts:
    """As a GPU would hold it, put there piece by piece."""
    high, low = torch.full_like(matrix, torch.nan, dtype=torch.float16), torch.empty_like(matrix, dtype=torch.float16)
    parts = Parts(high, low, torch.empty(matrix.shape[1]))
    for start in range(0, matrix.shape[1], piece):
        columns = slice(start, start + piece)
        parts.put(columns, matrix[:, columns])
    return parts


def error(made: Tensor, left: Tensor, right: Tensor) -> float:
    """The largest, in sizes of what was added up."""
    size = left.double().abs() @ right.double().abs()
    return float(((made.double() - left.double() @ right.double()).abs() / size.clamp(min=1e-300)).max())


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("piece", [K, 32])
def test_nothing_is_lost_whatever_the_ranges(size: float, turned: bool, piece: int) -> None:
    """Rows, columns and pieces of very different sizes: all as good as float32."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(N, K, generator=generator) * size * torch.logspace(-1, 1, N)[:, None]
    contrast = 1e6 if piece == 32 else 1e2  # columns that are put together have one size in common
    left[:, 32:64] /= contrast
    right = torch.randn(K, M, generator=generator) * torch.logspace(-9, 9, M)
    right[32:64] *= contrast
    right[:, 3] = 0
    parts = in_pieces(left, piece)
    assert bool(torch.isfinite(parts.high).all())
    made = products._in_parts(parts, right.T.contiguous().T if turned else right, rough=False)
    assert error(made, left, right) < 2e-6
    assert torch.equal(made[:, 3], torch.zeros(N))
    rough = error(products._in_parts(parts, right, rough=True), left, right)
    assert 2e-5 < rough < 2e-3


def test_some_columns_and_none() -> None:
    left, right = torch.randn(N, K), torch.randn(K, M)
    parts = in_pieces(left, 32)
    assert error(products._in_parts(parts[32:], right[32:], rough=False), left[:, 32:], right[32:]) < 2e-6
    assert torch.equal(products._in_parts(parts[:0], right[:0], rough=False), torch.zeros(N, M))


def test_factors_of_16_bits_have_no_low_part() -> None:
    left, right = torch.randn(N, K).half(), torch.randn(K, M)
    parts = Parts(left, None, torch.ones(K))
    assert error(products._in_parts(parts, right, rough=False), left.float(), right) < 2e-6
