"""The kernels on a real GPU against float64: every tile, every M, odd shapes, hostile scales, streams, graphs, compilation."""

from functools import partial

import pytest
import torch

from marlin_tools import ops
from marlin_tools.bench import timing
from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import dispatch, layout, reference, w4a16
from marlin_tools.ops.linear import operator as linear_operator
from marlin_tools.ops.linear.tiles import TILES as SHAPES
from marlin_tools.ops.runtime import driver
from marlin_tools.quantized import QuantizedLinear

pytestmark = pytest.mark.gpu

DTYPES = [torch.float16, torch.bfloat16]
GROUPS = layout.GROUP_SIZES


def device():
    return torch.device("cuda", torch.cuda.current_device())


def here():
    return dispatch.gpu_of(device()) if torch.cuda.is_available() else "sm_90a"


TILES = [choice for choice in dispatch.choices_on(here()) if choice != dispatch.CUBLAS]


def random_weight(n, k, group_size=128, *, seed=0, spread=0.02):
    generator = torch.Generator(device()).manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device(), generator=generator)
    scales = torch.randn((n, k // group_size), device=device(), generator=generator) * spread  # of both signs
    return QuantizedLinear(codes, scales.to(torch.float16), group_size)


def random_x(m, k, dtype=torch.float16, seed=1):
    generator = torch.Generator(device()).manual_seed(seed)
    return torch.randn((m, k), device=device(), generator=generator).to(dtype)


def rounds(choice, group_size=128):
    """Whether a tile multiplies with weights that were rounded to 16 bits."""
    return SHAPES[choice].for_group(group_size).rounded


def assert_close(y, x, packed, bias=None, *, rounded=False):
    """Within the stated bound everywhere; non-finite exactly where the exact result overflows or is not finite."""
    exact = reference.exact(x, packed, bias, rounded=rounded)
    bound = reference.error_bound(x, packed, bias, rounded=rounded)
    error = (y.to(torch.float64) - exact).abs()
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} wrong, first at {wrong.nonzero()[0].tolist()}, error/bound {(error / bound).max():.3g}"
    )


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
def test_every_m(tile, dtype, group_size, poisoned):
    packed = ops.pack(random_weight(192, 640, group_size))
    for m in [*range(1, 273), *range(511, 515), *range(1023, 1026), 4096]:
        x = random_x(m, 640, dtype, seed=m)
        assert_close(w4a16.multiply_with(tile, x, packed), x, packed, rounded=rounds(tile, packed.group_size))


@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 200, 264, 1088])
@pytest.mark.parametrize("k", [128, 256, 384, 1152, 2944])
@pytest.mark.parametrize("tile", TILES)
def test_odd_shapes(tile, n, k, poisoned):
    for group_size in {*GROUPS, k}:
        packed = ops.pack(random_weight(n, k, group_size))
        for m, dtype in ((1, torch.float16), (13, torch.bfloat16), (70, torch.float16)):
            x, bias = random_x(m, k, dtype), random_x(1, n, dtype, seed=5)[0]
            assert_close(w4a16.multiply_with(tile, x, packed, bias), x, packed, bias, rounded=rounds(tile, group_size))


MODEL_SHAPES = [
    (4096, 4096),
    (12288, 4096),
    (22016, 4096),
    (4096, 11008),
    (10240, 8192),
    (8192, 8192),
    (57344, 8192),
    (8192, 28672),
]


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize(("n", "k"), MODEL_SHAPES)
def test_model_shapes(n, k, group_size):
    packed = ops.pack(random_weight(n, k, group_size))
    for m in (1, 16, 48, 257):
        x = random_x(m, k)
        y = ops.linear(x, packed)
        rows = torch.randperm(n // 64, device=device())[:24]  # some tiles of outputs: float64 of all would take minutes
        part = layout.PackedWeight(packed.codes[rows], packed.scales[rows], 24 * 64, packed.exponent)
        some = y.view(m, -1, 64)[:, rows].reshape(m, -1)
        choice = dispatch.choose(here(), m, n, k)
        if choice == dispatch.CUBLAS:  # which sees weights rounded to 16 bits
            assert ((some - reference.exact(x, part)).abs().mean() / reference.exact(x, part).abs().mean()) < 1e-3
        else:
            assert_close(some, x, part, rounded=rounds(choice, group_size))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("m", [24, 48, 100, 200, 300, 700, 1500])
def test_nothing_falls_below_dequantizing_and_cublas(m, group_size):
    """Between the measured numbers of rows, and on a shape that no table has: the dispatched kernel against the fallback."""
    n, k = 6144, 4096
    packed = ops.pack(random_weight(n, k, group_size))
    xs = [random_x(m, k, seed=seed) for seed in range(8)]
    ours = [partial(ops.linear, x, packed) for x in xs]
    fallback = [partial(w4a16.multiply_with, dispatch.CUBLAS, x, packed) for x in xs]
    times = timing.time_calls({"ours": ours, "fallback": fallback}, calls=16)
    assert times["ours"].microseconds < 1.05 * times["fallback"].microseconds


@pytest.mark.parametrize("group_size", [*GROUPS, 1152])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cublas_path(dtype, group_size):
    weight = random_weight(1000, 1152, group_size)
    packed = ops.pack(weight)
    assert torch.equal(ops.dequantize(packed, dtype), weight.dequantize(dtype))
    x, bias = random_x(300, 1152, dtype), random_x(1, 1000, dtype)[0]
    for b in (None, bias):
        y = w4a16.multiply_with(dispatch.CUBLAS, x, packed, b)
        expected = reference.exact(x, packed, b)
        assert (y - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


def test_cublas_path_in_chunks(monkeypatch):
    packed = ops.pack(random_weight(1000, 1152))
    x = random_x(64, 1152)
    whole = w4a16.multiply_with(dispatch.CUBLAS, x, packed)
    monkeypatch.setattr(linear_operator, "_CUBLAS_CHUNK_BYTES", 300 * 1152 * 2)
    parts = w4a16.multiply_with(dispatch.CUBLAS, x, packed)
    assert (whole - parts).abs().max() <= 2 * torch.finfo(torch.float16).eps * whole.abs().max()


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("tile", TILES)
def test_hostile_scales(tile, group_size):
    weight = random_weight(128, 512, group_size)
    scales = weight.scales.clone()
    scales[0] = 6e-8  # the smallest subnormal
    scales[1] = 65504.0
    scales[2] = 0.0
    scales[3] = -scales[3]
    scales[4, 1] = float("inf")
    scales[5, 2] = float("nan")
    packed = ops.pack(QuantizedLinear(weight.codes, scales, group_size))
    x = random_x(5, 512) * 1e-3
    y = w4a16.multiply_with(tile, x, packed)

    assert (y[:, 2] == 0).all()
    assert not torch.isfinite(y[:, 4:6]).any()
    fine = [row for row in range(128) if row not in {4, 5}]
    clean = ops.pack(QuantizedLinear(weight.codes[fine], scales[fine], group_size))
    assert_close(y[:, fine], x, clean, rounded=rounds(tile, group_size))


def test_weights_that_float16_cannot_hold_beside_others_are_not_rounded():
    """One outlier, and float16 kernels would round all other weights to multiples of 2^-2: these go to cuBLAS."""
    weight = random_weight(512, 1024)
    weight.scales[7, 3] = 4000.0
    packed = ops.pack(weight)
    for m in (64, 300):
        x = random_x(m, 1024)
        y, exact = ops.linear(x, packed), reference.exact(x, packed)
        others = [row for row in range(512) if row != 7]
        assert (y - exact)[:, others].norm() < 1e-3 * exact[:, others].norm()
        half = ops.linear(x.bfloat16(), packed)
        assert_close(half, x.bfloat16(), packed, rounded=rounds(dispatch.choose(here(), m, 512, 1024)))


def test_per_column_sums_beyond_float16():
    """A sum of codes times activations above 65504 before the scale is applied: a float16 partial sum would be infinite."""
    codes = torch.full((64, 4096), 15, dtype=torch.uint8, device=device())
    scales = torch.full((64, 1), 1e-3, dtype=torch.float16, device=device())
    packed = ops.pack(QuantizedLinear(codes, scales, 4096))
    x = torch.full((3, 4096), 10.0, dtype=torch.float16, device=device())
    for tile in TILES:
        assert_close(w4a16.multiply_with(tile, x, packed), x, packed)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("tile", TILES)
def test_hundred_runs_are_bit_equal(tile, group_size):
    packed = ops.pack(random_weight(4096, 2048, group_size))
    x = random_x(24, 2048)
    first = w4a16.multiply_with(tile, x, packed)
    for _ in range(100):
        assert torch.equal(w4a16.multiply_with(tile, x, packed), first)


def test_two_streams_at_once():
    packed = [ops.pack(random_weight(4096, 4096, seed=s)) for s in range(2)]
    x = random_x(16, 4096)
    expected = [ops.linear(x, p) for p in packed]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    for _ in range(50):
        for stream, p in zip(streams, packed, strict=True):
            with torch.cuda.stream(stream):
                results.append(ops.linear(x, p))
    torch.cuda.synchronize()
    for i, y in enumerate(results):
        assert torch.equal(y, expected[i % 2])


def test_graphs_replayed_beside_each_other_and_eager_work():
    packed = [ops.pack(random_weight(2048, 4096, seed=s)) for s in range(2)]
    x = [random_x(8, 4096, seed=s) for s in range(2)]
    outputs, graphs = [], []
    for p, x_ in zip(packed, x, strict=True):
        ops.linear(x_, p)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([ops.linear(x_, p) for _ in range(20)])
        graphs.append(graph)
    for seed in range(10, 20):
        for x_ in x:
            x_.copy_(random_x(8, 4096, seed=seed))
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = [ops.linear(x_, p) for x_, p in zip(x, packed, strict=True)]
        torch.cuda.synchronize()
        for y, ys, x_, p in zip(eager, outputs, x, packed, strict=True):
            assert_close(y, x_, p)
            assert all(torch.equal(y, other) for other in ys)


def test_weights_made_by_the_kernel_before():
    """The ring is filled before the previous kernel is known to have ended; weights written just before must still be seen."""
    packed = ops.pack(random_weight(4096, 4096))
    other = ops.pack(random_weight(4096, 4096, seed=9))
    x = random_x(4, 4096)
    expected = ops.linear(x, other)
    for _ in range(20):
        target = layout.PackedWeight(packed.codes.clone(), packed.scales.clone(), 4096, packed.exponent)
        ops.linear(x, packed)
        target.codes.copy_(other.codes)
        target.scales.copy_(other.scales)
        assert torch.equal(ops.linear(x, target), expected)


def test_chain_reads_what_the_previous_kernel_wrote():
    square = ops.pack(random_weight(2048, 2048, spread=0.005))
    start = random_x(8, 2048)
    y = start
    for _ in range(50):
        y = torch.ops.marlin_tools.w4a16_linear(y, square.codes, square.scales, None, 2048, square.exponent)
        y = y / y.abs().max()
    z = start
    for _ in range(50):
        z = ops.linear(z, square)
        torch.cuda.synchronize()
        z = z / z.abs().max()
    assert torch.equal(y, z)


def test_refuses_to_compile_while_capturing(monkeypatch):
    packed = ops.pack(random_weight(64, 128))
    x = random_x(1, 128)
    ops.linear(x, packed)
    monkeypatch.setattr(driver, "_functions", {})
    monkeypatch.setattr(driver.kept, "launches", {})
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(DeviceError, match="not loaded yet"), torch.cuda.graph(graph):
        ops.linear(x, packed)


def test_prepare_makes_capture_possible(monkeypatch):
    packed = ops.pack(random_weight(64, 128))
    monkeypatch.setattr(driver, "_functions", {})
    ops.prepare(packed, torch.float16)
    x = random_x(3, 128)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.linear(x, packed)
    graph.replay()
    assert_close(y, x, packed)


def test_compiles_whole():
    packed = ops.pack(random_weight(512, 512))

    def block(x):
        return torch.nn.functional.silu(ops.linear(x, packed)) + 1

    x = random_x(6, 512)
    compiled = torch.compile(block, fullgraph=True, dynamic=False)
    assert (compiled(x) - block(x)).abs().max() < 1e-2


def test_opcheck():
    packed = ops.pack(random_weight(200, 384))
    for dtype in DTYPES:
        for bias in (None, random_x(1, 200, dtype)[0]):
            arguments = (random_x(5, 384, dtype), packed.codes, packed.scales, bias, 200, packed.exponent)
            torch.library.opcheck(torch.ops.marlin_tools.w4a16_linear.default, arguments)


def test_no_rows():
    packed = ops.pack(random_weight(200, 384))
    for choice in dispatch.choices_on(here()):
        assert w4a16.multiply_with(choice, random_x(0, 384), packed).shape == (0, 200)
    assert ops.linear(random_x(0, 384), packed).shape == (0, 200)


def test_more_than_2_31_elements():
    """Outputs and activations whose byte and element offsets do not fit 32 bits."""
    if torch.cuda.mem_get_info()[0] < 14 << 30:
        pytest.skip("needs 14 GB of free memory")
    m, n, k = 1 << 19, 4160, 128
    packed = ops.pack(random_weight(n, k))
    x = random_x(m, k)
    for choice in ("64x128", dispatch.CUBLAS):
        y = w4a16.multiply_with(choice, x, packed)
        assert y.numel() > 2**31
        rows = torch.tensor([0, 1, m // 2, m - 2, m - 1], device=device())
        expected = reference.exact(x[rows], packed)
        assert (y[rows] - expected).abs().max() <= 4 * 2**-11 * expected.abs().max()


@pytest.mark.parametrize("group_size", GROUPS)
def test_portable_code_runs_here(group_size):
    """The Ampere code path, finished by the driver from PTX."""
    packed = ops.pack(random_weight(1024, 2048, group_size))
    for tile in (name for name, shape in SHAPES.items() if shape.runs_on(80)):
        for dtype in DTYPES:
            x = random_x(30, 2048, dtype)
            assert_close(w4a16.multiply_with(tile, x, packed, target="compute_80"), x, packed)


def test_a_second_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    packed = ops.pack(random_weight(256, 256)).to("cuda:1")
    x = random_x(4, 256).to("cuda:1")
    assert_close(ops.linear(x, packed), x, packed)
