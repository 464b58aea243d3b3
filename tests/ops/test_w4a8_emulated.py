"""`kernels/w4a8/{round,ada}.cu` on a CPU, by `emulation.py`."""

from pathlib import Path

import pytest
import torch

from emulation import compiler, found, put, run
from marlin_tools.ops.linear import fp8_reference
from marlin_tools.ops.linear.decomposition import Decomposition
from marlin_tools.ops.linear.fp8_tiles import FP8_TILES
from marlin_tools.ops.linear.layout import pack
from marlin_tools.ops.linear.operator import group_of
from marlin_tools.ops.linear.tiles import types_of
from marlin_tools.ops.linear.w4a16 import decompose
from marlin_tools.quantized import QuantizedLinear

TILES = {name: tile for name, tile in FP8_TILES.items() if tile.kernel == "ada"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiler(tmp_path_factory.mktemp("emulated"))


def emulated(program: Path, folder: Path, way: Decomposition, sizes: tuple[int, ...], backwards: int):
    """y, and what lies behind it. `sizes`: those of the argument, from m on; `backwards`: the last CTA and lane come first."""
    m, n, _, steps, _ = sizes
    schedule = divmod(way.tiles * steps if way.stream_k else way.tiles, way.ctas)
    run(program, folder, *sizes, 0 if way.stream_k else 1, *schedule, way.ctas, backwards)
    y = found(folder, "y", torch.bfloat16)
    return y[: m * n].view(m, n), y[m * n :]


CASES = [  # rows, outputs, inputs, inputs that share a scale, SMs
    (1, 64, 128, 128, 1),
    (70, 330, 640, 128, 142),
    (130, 260, 384, 128, 4),
    (150, 200, 896, 128, 5),
    (66, 71, 512, 512, 3),
    (64, 256, 1024, 1024, 142),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
@pytest.mark.parametrize("name", TILES)
def test_the_source_multiplies(compiled, name, case, tmp_path):
    m, n, k, group_size, sms = case
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.randn((n, k // group_size), generator=generator).half() * 0.02
    packed = pack(QuantizedLinear(codes, scales, group_size))
    x, bias = torch.randn((m, k), generator=generator).bfloat16(), torch.randn(n, generator=generator).bfloat16()
    x[0, 3] = 300
    rounded, token_scales = fp8_reference.round_tokens(x)
    ordered = fp8_reference.in_kernel_order(rounded.view(torch.uint8))
    put(tmp_path, x=ordered, token_scales=token_scales, codes=packed.codes, scales=packed.scales, bias=bias)
    group = group_of(packed.codes, packed.scales)
    tile, tiles_n, token_tiles = TILES[name].for_group(group), packed.codes.shape[0], -(-m // TILES[name].tokens)
    types = types_of(torch.float8_e4m3fn, torch.float8_e4m3fn, torch.bfloat16)
    program = compiled(
        "product.cpp",
        SOURCE='"w4a8/ada.cu"',
        NAME="ada_kernel",
        KERNEL=f"{tile.expression(89)},{types},{group}",
        SHARED=tile.shared_bytes(89),
        PARTIAL=tile.partial_bytes,
    )
    way = decompose(tile, token_tiles * -(-tiles_n // tile.along_n), k // 128, sms, 89)
    for backwards in (0, 1):
        y, behind = emulated(program, tmp_path, way, (m, n, tiles_n, k // 128, token_tiles), backwards)
        error = (y.double() - fp8_reference.exact(x, packed, bias)).abs()
        assert (error <= fp8_reference.error_bound(x, packed, bias)).all()
        assert behind.isnan().all()


@pytest.mark.parametrize(("k", "held"), [(128, 1), (4096, 1), (4224, 2), (8832, 1)])
def test_the_source_rounds(compiled, k, held, tmp_path):
    x = torch.randn((9, k), generator=torch.Generator().manual_seed(k)).bfloat16()
    x[3], x[4], x[5] = 0, x[4] * 1e-6, 2.0
    x[5, 7], x[6, k - 1], x[7, 1], x[8, k - 1] = 3000, -70, float("nan"), -float("inf")
    put(tmp_path, x=x)
    run(compiled("rounding.cpp", HELD=held), tmp_path, 9, k)
    rounded, scales = found(tmp_path, "rounded", torch.uint8).view(9, k), found(tmp_path, "scales", torch.float32)
    expected, expected_scales = fp8_reference.round_tokens(x)
    assert torch.equal(fp8_reference.in_kernel_order(expected.view(torch.uint8))[:7], rounded[:7])
    assert torch.equal(expected_scales[:7], scales[:7])
    assert scales[7:].isnan().all()
