"""The sparse kernels on a real GPU against float64: every tile, every M, odd shapes, hostile scales, streams, graphs."""

import pytest
import torch

from marlin_tools import ops
from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import dispatch, sparse_dispatch, sparse_reference, w24a16
from marlin_tools.ops.linear import operator as linear_operator
from marlin_tools.ops.linear.dispatch import CUBLAS
from marlin_tools.ops.linear.sparse_layout import PackedSparse, pack_sparse
from marlin_tools.ops.linear.sparse_tiles import SPARSE_TILES
from marlin_tools.ops.linear.tiles import TILES as TILE_SHAPES
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import ZERO, QuantizedLinear

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]


def device():
    return torch.device("cuda", torch.cuda.current_device())


def here():
    return dispatch.gpu_of(device()) if torch.cuda.is_available() else "sm_90a"


TILES = [choice for choice in sparse_dispatch.choices_on(here()) if choice != CUBLAS]


def random_weight(n, k, group_size=128, *, seed=0, spread=0.02):
    """2:4 sparse, with scales of both signs."""
    generator = torch.Generator(device()).manual_seed(seed)
    codes = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, device=device(), generator=generator)
    dropped = torch.rand(codes.shape, device=device(), generator=generator).argsort(dim=2)[..., :2]
    codes.scatter_(2, dropped, ZERO)
    scales = torch.randn((n, k // group_size), device=device(), generator=generator) * spread
    return QuantizedLinear(codes.view(n, k), scales.to(torch.float16), group_size)


def random_x(m, k, dtype=torch.float16, seed=1):
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn((m, k), device=device(), generator=generator).to(dtype)


def rounds(choice):
    """Whether a tile multiplies with weights that were rounded to 16 bits."""
    return SPARSE_TILES[choice].rounded


def rounds_at(m, packed):
    """Whether the tile that is chosen for so many rows does."""
    return rounds(sparse_dispatch.choose(here(), m, packed.out_features, packed.in_features))


def assert_close(y, x, packed, bias=None, *, rounded=False):
    """Within the stated bound everywhere."""
    exact = sparse_reference.exact(x, packed, bias, rounded=rounded)
    bound = sparse_reference.error_bound(x, packed, bias, rounded=rounded)
    error = (y.to(torch.float64) - exact).abs()
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} wrong, first at {wrong.nonzero()[0].tolist()}, error/bound {(error / bound).max():.3g}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_every_m(tile, dtype, poisoned):
    packed = pack_sparse(random_weight(192, 640))
    for m in [*range(1, 273), *range(511, 515), *range(1023, 1026), 4096]:
        x = random_x(m, 640, dtype, seed=m)
        assert_close(w24a16.multiply_with(tile, x, packed), x, packed, rounded=rounds(tile))


@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 200, 264, 1088])
@pytest.mark.parametrize("k", [128, 256, 384, 1152, 2944])
@pytest.mark.parametrize("tile", TILES)
def test_odd_shapes(tile, n, k, poisoned):
    for group_size in {128, k}:
        packed = pack_sparse(random_weight(n, k, group_size))
        for m, dtype in ((1, torch.float16), (13, torch.bfloat16), (70, torch.float16)):
            x, bias = random_x(m, k, dtype), random_x(1, n, dtype, seed=5)[0]
            assert_close(w24a16.multiply_with(tile, x, packed, bias), x, packed, bias, rounded=rounds(tile))


@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (12288, 4096), (4096, 11008), (8192, 8192), (57344, 8192)])
def test_model_shapes(n, k):
    packed = pack_sparse(random_weight(n, k))
    for m in (1, 16, 48, 128, 257):
        x = random_x(m, k)
        choice = sparse_dispatch.choose(here(), m, n, k)
        y = ops.sparse_linear(x, packed)
        rows = torch.randperm(n // 64, device=device())[:24]  # some tiles of outputs: float64 of all would take minutes
        part = PackedSparse(packed.codes[rows], packed.scales[rows], 24 * 64, packed.exponent)
        some = y.view(m, -1, 64)[:, rows].reshape(m, -1)
        if choice == CUBLAS:  # it sees weights rounded to 16 bits
            exact = sparse_reference.exact(x, part)
            assert (some - exact).abs().mean() / exact.abs().mean() < 1e-3
        else:
            assert_close(some, x, part, rounded=rounds(choice))


@pytest.mark.parametrize("dtype", DTYPES)
def test_cublas_path(dtype):
    for group_size in (128, 1152):
        weight = random_weight(1000, 1152, group_size)
        packed = pack_sparse(weight)
        assert torch.equal(ops.dequantize_sparse(packed, dtype), weight.dequantize(dtype))
    x, bias = random_x(300, 1152, dtype), random_x(1, 1000, dtype)[0]
    for b in (None, bias):
        y = w24a16.multiply_with(CUBLAS, x, packed, b)
        expected = sparse_reference.exact(x, packed, b)
        assert (y - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


def test_cublas_path_in_chunks(monkeypatch):
    packed = pack_sparse(random_weight(1000, 1152))
    x = random_x(64, 1152)
    whole = w24a16.multiply_with(CUBLAS, x, packed)
    monkeypatch.setattr(linear_operator, "_CUBLAS_CHUNK_BYTES", 300 * 1152 * 2)
    parts = w24a16.multiply_with(CUBLAS, x, packed)
    assert (whole - parts).abs().max() <= 2 * torch.finfo(torch.float16).eps * whole.abs().max()


def test_every_pair_of_positions_and_codes():
    """One weight per output quad is enough to see a position or a code taken for another."""
    quads = []
    for first in range(4):
        for second in range(first + 1, 4):
            for a in range(16):
                quad = [ZERO] * 4
                quad[first], quad[second] = a, 15 - a
                quads.append(quad)
    codes = torch.tensor(quads * 32, dtype=torch.uint8, device=device()).view(96, 128)
    packed = pack_sparse(QuantizedLinear(codes, torch.ones((96, 1), dtype=torch.float16, device=device()), 128))
    x = torch.eye(128, dtype=torch.float16, device=device())
    for tile in TILES:
        assert torch.equal(w24a16.multiply_with(tile, x, packed), (codes.to(torch.float16) - ZERO).T)


@pytest.mark.parametrize("tile", TILES)
def test_hostile_scales(tile):
    weight = random_weight(128, 512)
    scales = weight.scales.clone()
    scales[0] = 6e-8  # the smallest subnormal
    scales[1] = 65504.0
    scales[2] = 0.0
    scales[3] = -scales[3]
    scales[4, 1] = float("inf")
    scales[5, 2] = float("nan")
    packed = pack_sparse(QuantizedLinear(weight.codes, scales, 128))
    x = random_x(5, 512) * 1e-3
    y = w24a16.multiply_with(tile, x, packed)

    assert (y[:, 2] == 0).all()
    assert not torch.isfinite(y[:, 4:6]).any()
    fine = [row for row in range(128) if row not in {4, 5}]
    clean = pack_sparse(QuantizedLinear(weight.codes[fine], scales[fine], 128))
    assert_close(y[:, fine], x, clean, rounded=rounds(tile))


@pytest.mark.parametrize("tile", TILES)
def test_hundred_runs_are_bit_equal(tile):
    packed = pack_sparse(random_weight(4096, 2048))
    x = random_x(24, 2048)
    first = w24a16.multiply_with(tile, x, packed)
    for _ in range(100):
        assert torch.equal(w24a16.multiply_with(tile, x, packed), first)


def test_two_streams_at_once():
    packed = [pack_sparse(random_weight(4096, 4096, seed=s)) for s in range(2)]
    x = random_x(16, 4096)
    expected = [ops.sparse_linear(x, p) for p in packed]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for _ in range(50):
        for stream, p in zip(streams, packed, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.sparse_linear(x, p))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 2])


@pytest.mark.parametrize("m", [1, 8, 64])
def test_graphs_replayed_beside_each_other_and_eager_work(m):
    packed = [pack_sparse(random_weight(2048, 4096, seed=s)) for s in range(2)]
    x = [random_x(m, 4096, seed=s) for s in range(2)]
    outputs, graphs = [], []
    for p, x_ in zip(packed, x, strict=True):
        ops.sparse_linear(x_, p)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([ops.sparse_linear(x_, p) for _ in range(20)])
        graphs.append(graph)
    for seed in range(10, 20):
        for x_ in x:
            x_.copy_(random_x(m, 4096, seed=seed))
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [ops.sparse_linear(x_, p) for x_, p in zip(x, packed, strict=True)]
        torch.cuda.synchronize()
        for y, ys, x_, p in zip(eager, outputs, x, packed, strict=True):
            assert_close(y, x_, p, rounded=rounds_at(m, p))
            assert all(torch.equal(y, other) for other in ys)


def test_chain_reads_what_the_previous_kernel_wrote():
    """Each kernel fetches weights while the one before still runs; activations must be those that it wrote."""
    square = pack_sparse(random_weight(2048, 2048, spread=0.03))
    for m in (1, 8, 16, 32, 64):
        start = random_x(m, 2048) * 0.1
        y = start
        for _ in range(6):
            y = ops.sparse_linear(y, square)
        z = start
        for _ in range(6):
            z = ops.sparse_linear(z, square)
            torch.cuda.synchronize()
        assert torch.isfinite(z).all()
        assert torch.equal(y, z)


def test_dense_and_sparse_kernels_share_a_stream():
    """They use the same scratch: partial sums and counters."""
    weight = random_weight(4096, 4096)
    sparse, dense = pack_sparse(weight), ops.pack(weight)
    for m in (4, 24, 64):
        x = random_x(m, 4096)
        for _ in range(20):
            assert_close(ops.linear(x, dense), x, sparse, rounded=TILE_SHAPES[dispatch.choose(here(), m, 4096, 4096)].rounded)
            assert_close(ops.sparse_linear(x, sparse), x, sparse, rounded=rounds_at(m, sparse))


def test_refuses_to_compile_while_capturing(monkeypatch):
    packed = pack_sparse(random_weight(64, 128))
    x = random_x(1, 128)
    ops.sparse_linear(x, packed)
    monkeypatch.setattr(driver, "_functions", {})
    monkeypatch.setattr(driver.kept, "launches", {})
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(DeviceError, match="not loaded yet"), torch.cuda.graph(graph):
        ops.sparse_linear(x, packed)


def test_prepare_makes_capture_possible(monkeypatch):
    packed = pack_sparse(random_weight(64, 128))
    monkeypatch.setattr(driver, "_functions", {})
    monkeypatch.setattr(driver.kept, "launches", {})
    ops.prepare_sparse(packed, torch.float16)
    for m in (1, 12, 40, 100):
        x = random_x(m, 128)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = ops.sparse_linear(x, packed)
        graph.replay()
        assert_close(y, x, packed, rounded=rounds_at(m, packed))


def test_compiles_whole():
    packed = pack_sparse(random_weight(512, 512))

    def block(x):
        return torch.nn.functional.silu(ops.sparse_linear(x, packed)) + 1

    x = random_x(6, 512)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    assert (compiled(x) - block(x)).abs().max() < 1e-2


def test_opcheck():
    packed = pack_sparse(random_weight(200, 384))
    for dtype in DTYPES:
        for bias in (None, random_x(1, 200, dtype)[0]):
            arguments = (random_x(5, 384, dtype), packed.codes, packed.scales, bias, 200, packed.exponent)
            torch.library.opcheck(torch.ops.marlin_tools.w24a16_linear.default, arguments)


def test_no_rows():
    packed = pack_sparse(random_weight(200, 384))
    for choice in sparse_dispatch.choices_on(here()):
        assert w24a16.multiply_with(choice, random_x(0, 384), packed).shape == (0, 200)
    assert ops.sparse_linear(random_x(0, 384), packed).shape == (0, 200)


def test_portable_code_runs_here():
    """The Ampere code path, finished by the driver from PTX."""
    packed = pack_sparse(random_weight(1024, 2048))
    for tile in (name for name, shape in SPARSE_TILES.items() if shape.runs_on(80)):
        for dtype in DTYPES:
            x = random_x(30, 2048, dtype)
            assert_close(w24a16.multiply_with(tile, x, packed, target="compute_80"), x, packed)


@pytest.mark.parametrize("tile", [name for name in TILES if SPARSE_TILES[name].kernel == "hopper"])
def test_every_decomposition(tile):
    """Whole tiles, shared runs of steps, clusters that split a tile each, alone and behind whole tiles."""
    names = set()
    for n, k, rows in ((392, 2944, (70, 300)), (9001, 384, (1500,))):
        for dtype, group_size in ((torch.float16, 128), (torch.bfloat16, k)):
            packed = pack_sparse(random_weight(n, k, group_size))
            for m in rows:
                x, bias = random_x(m, k, dtype), random_x(1, n, dtype, seed=5)[0]
                plan = w24a16.OPERATOR._plan_for(tile, x, packed.codes, packed.scales, n, target_of(device()))
                for way in plan.alternatives():
                    plan.use(way)
                    y = torch.full((m, n), float("nan"), dtype=dtype, device=x.device)
                    plan(y, x, packed.codes, packed.scales, bias, packed.exponent)
                    assert_close(y, x, packed, bias, rounded=rounds(tile))
                    names.add((way.split > 1, way.shared_tiles > 0, way.shared_tiles < way.tiles))
    assert {(False, False, True), (False, True, False), (True, True, False)} <= names
