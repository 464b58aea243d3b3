"""Every kernel against the reference, on the GPU at hand, in seconds: what `doctor` shows, and what a GPU that nobody has
measured must pass before its results are used.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import (
    dispatch,
    fp8_reference,
    reference,
    sparse_dispatch,
    sparse_reference,
    trust,
    w4a8,
    w4a16,
    w24a16,
)
from marlin_tools.ops.linear.fp8_tiles import FP8_GROUP_SIZES, FP8_TILES
from marlin_tools.ops.linear.layout import GROUP_SIZES, SPARSE_GROUP_SIZES, pack
from marlin_tools.ops.linear.operator import LinearOperator
from marlin_tools.ops.linear.sparse_layout import pack_sparse
from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES
from marlin_tools.ops.linear.tiles import TILES, Tile
from marlin_tools.ops.runtime.kernel import ELEMENTS
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import ZERO, QuantizedLinear, dtype_name

_N, _K, _ROWS = 456, 896, (1, 7, 33, 70)  # no multiple of any tile, several blocks per output tile


@dataclass(frozen=True)
class CheckResult:
    """One kernel: whether it may be used, and the evidence or the reason."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class _Family:
    """Kernels for one kind of operands, and what they are compared with."""

    operator: LinearOperator
    mark: str
    groups: tuple[int, ...]
    tables: dispatch.Tables
    tiles: Mapping[str, Tile]
    pack: Callable[[QuantizedLinear], Any]
    multiply_with: Callable[[str, Tensor, Any], Tensor]
    exact: Callable[..., Tensor]
    error_bound: Callable[..., Tensor]


_FAMILIES = (
    _Family(
        w4a16.OPERATOR,
        "",
        GROUP_SIZES,
        dispatch.DENSE,
        TILES,
        pack,
        w4a16.multiply_with,
        reference.exact,
        reference.error_bound,
    ),
    _Family(
        w24a16.OPERATOR,
        "2:4 ",
        SPARSE_GROUP_SIZES,
        sparse_dispatch.SPARSE,
        SPARSE_TILES,
        pack_sparse,
        w24a16.multiply_with,
        sparse_reference.exact,
        sparse_reference.error_bound,
    ),
    _Family(
        w4a8.OPERATOR,
        "fp8 ",
        FP8_GROUP_SIZES,
        w4a8.FP8,
        FP8_TILES,
        pack,
        w4a8.multiply_with,
        fp8_reference.exact,
        fp8_reference.error_bound,
    ),
)


def self_test(device: torch.device | str = "cuda") -> list[CheckResult]:
    """Compile, run and compare all kernels on a device; a kernel that fails is a result, not an exception."""
    if not torch.cuda.is_available():
        raise DeviceError("torch finds no CUDA device", hint="the kernels need one; `--backend reference` runs on a CPU")
    device = torch.device("cuda", torch.device(device).index or 0)
    results = []
    for family in _FAMILIES:
        choices = family.tables.choices_on(target_of(device))
        for dtype in ELEMENTS:
            for group in (*family.groups, 0):
                results += _check_family(family, device, dtype, choices, group)
    return results


def check_choices(
    device: torch.device, dtype: torch.dtype, choices: Iterable[str], operator: LinearOperator, group: int
) -> list[CheckResult]:
    """The same for some kernels of one operator, one type of outputs and one size of groups (0: one scale per output)."""
    family = next(family for family in _FAMILIES if family.operator is operator)
    return _check_family(family, device, dtype, choices, group)


def _check_family(
    family: _Family, device: torch.device, dtype: torch.dtype, choices: Iterable[str], group: int
) -> list[CheckResult]:
    packed = family.pack(_weight(group or _K, device))
    kind = f"{dtype_name(dtype)} {f'g{group}' if group else 'column'}"
    if family.operator is w4a8.OPERATOR:  # cuBLAS would not round
        choices = [choice for choice in choices if choice != dispatch.CUBLAS]
    return [_check(f"{family.mark}{choice} {kind}", family, choice, packed, dtype) for choice in choices]


def _failure(device: torch.device) -> str | None:
    failed = next((result for result in self_test(device) if not result.passed), None)
    return None if failed is None else f"{failed.name}: {failed.detail}"


trust.register(_failure)


def _check(name: str, family: _Family, choice: str, packed: Any, dtype: torch.dtype) -> CheckResult:
    try:
        worst = max(_errors(family, choice, packed, dtype))
    except DeviceError as error:
        return CheckResult(name, passed=False, detail=error.message)
    limit = 64.0 if choice == dispatch.CUBLAS else 1.0  # cuBLAS multiplies weights that were rounded to 16 bits
    return CheckResult(name, worst <= limit, f"largest error {worst:.2f} of the bound")


def _errors(family: _Family, choice: str, packed: Any, dtype: torch.dtype) -> Iterator[float]:
    generator = torch.Generator(packed.codes.device).manual_seed(0)
    tile = family.tiles.get(choice)
    rounds = tile is not None and tile.for_group(packed.group_size % packed.in_features).rounded
    how = {"rounded": True} if rounds else {}  # weights that the kernel rounds, which no reference of FP8 knows
    for m in _ROWS:
        x = torch.randn((m, packed.in_features), device=packed.codes.device, generator=generator).to(dtype)
        y = family.multiply_with(choice, x, packed)
        error = (y - family.exact(x, packed, **how)).abs() / family.error_bound(x, packed, **how)
        yield float("inf") if error.isnan().any() else error.max().item()


def _weight(group_size: int, device: torch.device) -> QuantizedLinear:
    """2:4 sparse, so that all kernels can read it."""
    generator = torch.Generator(device).manual_seed(1)
    codes = torch.randint(0, 16, (_N, _K // 4, 4), dtype=torch.uint8, device=device, generator=generator)
    dropped = torch.rand(codes.shape, device=device, generator=generator).argsort(dim=2)[..., :2]
    codes.scatter_(2, dropped, ZERO)
    scales = torch.randn((_N, _K // group_size), device=device, generator=generator) * 0.02
    return QuantizedLinear(codes.view(_N, _K), scales.to(torch.float16), group_size)
