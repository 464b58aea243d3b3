"""`kernels/w4a16/strip.cu` on a CPU, by `emulation.py`."""

import pytest
import torch

from emulation import compiler, found, put, run
from marlin_tools.ops.linear import reference
from marlin_tools.ops.linear.layout import TILE_N, pack
from marlin_tools.ops.linear.operator import group_of
from marlin_tools.ops.linear.tiles import TILES, StripTile, types_of
from marlin_tools.quantized import QuantizedLinear

STRIP = TILES["8x32"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return compiler(tmp_path_factory.mktemp("emulated"))


CASES = [  # rows, outputs, inputs, inputs that share a scale, SMs, strips whose sums have room
    (1, 64, 128, 128, 1, 9),
    (1, 330, 2560, 128, 4, 9),
    (5, 200, 2176, 64, 2, 2),
    (8, 260, 640, 32, 3, 1),
    (11, 71, 2304, 2304, 3, 1),
    (3, 100, 2048, 128, 1, 3),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "x".join(map(str, case)))
def test_the_source_multiplies(compiled, case, tmp_path):
    m, n, k, group_size, sms, room = case
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    scales = torch.randn((n, k // group_size), generator=generator).half() * 0.02
    packed = pack(QuantizedLinear(codes, scales, group_size))
    x, bias = torch.randn((m, k), generator=generator).half(), torch.randn(n, generator=generator).half()
    put(tmp_path, x=x, token_scales=torch.zeros(1), codes=packed.codes, scales=packed.scales, bias=bias)
    group = group_of(packed.codes, packed.scales)
    tile = STRIP.for_group(group)
    assert isinstance(tile, StripTile)
    program = compiled(
        "product.cpp",
        SOURCE='"w4a16/strip.cu"',
        NAME="strip_kernel",
        KERNEL=f"{tile.expression(90)},{types_of(torch.float16, torch.float16, torch.float16)},{group}",
        THREADS=tile.threads,
        SHARED=tile.bytes_for(m, k, room),
        PARTIAL=16,
    )
    tiles_n, token_tiles = packed.codes.shape[0], -(-m // tile.tokens)
    strips = tiles_n * (TILE_N // tile.outputs)
    ctas = min(strips, sms)
    for backwards in (0, 1):
        sizes = (m, n, tiles_n, k // 128, token_tiles, ctas, *divmod(strips, ctas), ctas * token_tiles, backwards)
        run(program, tmp_path, *sizes)
        y = found(tmp_path, "y", torch.float16)
        error = (y[: m * n].view(m, n).double() - reference.exact(x, packed, bias)).abs()
        assert (error <= reference.error_bound(x, packed, bias)).all()
        assert y[m * n :].isnan().all()
