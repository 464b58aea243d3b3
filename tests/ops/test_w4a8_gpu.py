"""INT4 weights x FP8 activations on a Hopper or an Ada GPU, against float64 products of the same rounded activations."""

import pytest
import torch

from marlin_tools import ops
from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import fp8_reference, layout, reference, w4a8
from marlin_tools.ops.linear.decomposition import Decomposition
from marlin_tools.ops.linear.fp8_tiles import FP8_TILES, fp8_kernel, round_kernel
from marlin_tools.ops.linear.packed import exponent_tensor, packed_fp8_linear
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import QuantizedLinear

CAPABILITY = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or CAPABILITY not in {(8, 9), (9, 0)}, reason="needs a Hopper or an Ada GPU"
    ),
]

DTYPES = [torch.float16, torch.bfloat16]
HOPPER = [name for name, tile in FP8_TILES.items() if tile.kernel == "hopper" and CAPABILITY == (9, 0)]
ADA = [name for name, tile in FP8_TILES.items() if tile.kernel == "ada"]
# (tile, target): Hopper multiplies with the kernel for Ada, too, compiled for itself and from PTX for Ada.
TARGETS = [None, "compute_89"] if CAPABILITY == (9, 0) else [None]
KERNELS = [*((name, None) for name in HOPPER), *((name, target) for target in TARGETS for name in ADA)]


def random_weight(n, k, group_size=128, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda", generator=generator)
    scales = torch.randn((n, k // group_size), device="cuda", generator=generator) * 0.02  # of both signs
    return QuantizedLinear(codes, scales.to(torch.float16), group_size)


def random_x(m, k, dtype=torch.float16, seed=1):
    return torch.randn((m, k), device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).to(dtype)


def multiply(kernel, x, packed, bias=None):
    tile, target = kernel
    return w4a8.multiply_with(tile, x, packed, bias, target)


def follow(plan, x, packed):
    y = torch.full((len(x), packed.out_features), float("nan"), dtype=x.dtype, device=x.device)
    plan(y, x, packed.codes, packed.scales, None, packed.exponent)
    return y


def assert_close(y, x, packed, bias=None, kernel=None):
    error = (y.to(torch.float64) - fp8_reference.exact(x, packed, bias)).abs()
    half_sums = kernel[0] in HOPPER if kernel else CAPABILITY == (9, 0)
    bound = fp8_reference.error_bound(x, packed, bias, half_sums=half_sums)
    wrong = ~(error <= bound)
    assert not wrong.any(), (
        f"{int(wrong.sum())} wrong, first at {wrong.nonzero()[0].tolist()}, error/bound {(error / bound).max():.3g}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [128, 640, 4096, 4224, 11008, 28672])
@pytest.mark.parametrize("target", TARGETS)
def test_rounding_is_that_of_torch(target, k, dtype):
    x = random_x(77, k, dtype)
    x[3], x[6], x[9] = 0, x[6] * 1e-6, 2.0
    x[5, 7], x[8, 1], x[10, k - 1] = 3000, float("nan"), -float("inf")
    rounded = torch.empty(x.shape, dtype=torch.uint8, device="cuda")
    scales = torch.empty(77, dtype=torch.float32, device="cuda")
    launch = driver.launch_of(round_kernel(dtype, k, target or target_of(x.device)), x.device, 77)
    launch(driver.current_stream(x.device.index), x.data_ptr(), rounded.data_ptr(), scales.data_ptr(), k)
    expected, expected_scales = fp8_reference.round_tokens(x)
    finite = [row for row in range(77) if row not in {8, 10}]
    assert torch.equal(rounded[finite], fp8_reference.in_kernel_order(expected.view(torch.uint8))[finite])
    assert torch.equal(scales[finite], expected_scales[finite])
    assert scales[[8, 10]].isnan().all()


@pytest.mark.parametrize("m", [1, 512, 1000])
def test_beside_products_in_16_bits(m):
    """The tables choose, and neither operator takes what the other one has prepared for the same shapes."""
    packed, x = ops.pack(random_weight(4096, 512)), random_x(m, 512)
    exact = reference.exact(x, packed)
    for _ in range(2):
        plain, rounded = ops.linear(x, packed), ops.fp8_linear(x, packed)
        assert_close(rounded, x, packed)
        assert (plain - exact).norm() < 2e-3 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_m(kernel, dtype, poisoned):
    packed = ops.pack(random_weight(192, 640))
    for m in [*range(1, 273), 351, 352, 353, *range(511, 515), 1025, 4096]:
        x = random_x(m, 640, dtype, seed=m)
        assert_close(multiply(kernel, x, packed), x, packed, kernel=kernel)


@pytest.mark.parametrize("n", [1, 7, 8, 63, 64, 65, 200, 264, 1088])
@pytest.mark.parametrize("k", [128, 256, 384, 1152, 2944])
@pytest.mark.parametrize("kernel", KERNELS)
def test_odd_shapes(kernel, n, k, poisoned):
    for group_size in {128, k}:
        packed = ops.pack(random_weight(n, k, group_size))
        for m, dtype in ((1, torch.float16), (13, torch.bfloat16), (200, torch.float16)):
            x, bias = random_x(m, k, dtype), random_x(1, n, dtype, seed=5)[0]
            assert_close(multiply(kernel, x, packed, bias), x, packed, bias, kernel)


@pytest.mark.parametrize("tile", HOPPER)
def test_every_way_to_cut_the_work(tile):
    packed = ops.pack(random_weight(1000, 4096))
    for m in (100, 700):
        x = random_x(m, 4096)
        plan = w4a8.OPERATOR._plan_for(tile, x, packed.codes, packed.scales, 1000, "sm_90a")
        ways = plan.alternatives()
        assert len(ways) > 2
        for way in ways:
            plan.use(way)
            assert_close(follow(plan, x, packed), x, packed)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ADA)
def test_every_way_to_cut_the_work_of_ada(name, target):
    packed, tile = ops.pack(random_weight(1000, 4096)), FP8_TILES[name].for_group(128)
    function = driver.loaded(
        fp8_kernel(name, torch.float16, target or target_of(packed.codes.device), 128), packed.codes.device
    )
    for m in (1, 100, 700):
        x, tiles = random_x(m, 4096), -(-m // tile.tokens) * -(-16 // tile.along_n)
        stream_k = [Decomposition(ctas, 1, tiles, tiles) for ctas in (1, 3, tiles, tiles + 1, 100, 4 * tiles)]
        for way in (Decomposition(tiles, 1, tiles), Decomposition(1, 1, tiles), *stream_k):
            plan = w4a8.AdaPlan(lambda *_, way=way: way, tile, function, x, packed.codes, 1000)
            for _ in range(2):
                assert_close(follow(plan, x, packed), x, packed, kernel=(name, target))


@pytest.mark.parametrize(("n", "k"), [(12288, 4096), (4096, 11008), (8192, 28672)])
@pytest.mark.parametrize("kernel", [None, *((name, None) for name in ADA)])
def test_model_shapes(kernel, n, k):
    packed = ops.pack(random_weight(n, k))
    for m in (128, 256, 1024):
        x = random_x(m, k)
        y = multiply(kernel, x, packed) if kernel else w4a8.fp8_linear(x, packed)
        tiles = torch.randperm(n // 64, device="cuda")[:16]  # some tiles of outputs: float64 of all would take minutes
        part = layout.PackedWeight(packed.codes[tiles], packed.scales[tiles], 16 * 64, packed.exponent)
        assert_close(y.view(m, -1, 64)[:, tiles].reshape(m, -1), x, part, kernel=kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_outliers_zeros_and_what_is_not_finite(kernel):
    packed, bias = ops.pack(random_weight(200, 1024)), random_x(1, 200, seed=3)[0]
    x = random_x(300, 1024)
    x[0], x[1, 5], x[2, :], x[3] = 0, 60000, 1e-7, x[3].abs() + 1
    y = multiply(kernel, x, packed, bias)
    assert torch.equal(y[0], bias)
    assert_close(y, x, packed, bias, kernel)
    broken = x.clone()
    broken[7, 0], broken[150, 1023], broken[299, 512] = float("nan"), float("inf"), -float("inf")
    z = multiply(kernel, broken, packed, bias)
    hit = [7, 150, 299]
    others = [row for row in range(300) if row not in hit]
    assert z[hit].isnan().all()
    assert torch.equal(z[others], y[others])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("size", [100, 500, 3000, 60000])
def test_sums_beside_one_outlier(kernel, size):
    """Tensor cores cut what is small beside the largest product: the more outputs, the worse the worst of them."""
    packed = ops.pack(random_weight(4096, 512))
    x = random_x(130, 512)
    x[torch.arange(130), torch.arange(130) * 3] = size
    assert_close(multiply(kernel, x, packed), x, packed, kernel=kernel)


@pytest.mark.parametrize("tile", HOPPER)
@pytest.mark.parametrize("k", [128, 1024, 8960, 9088, 28672, 149504])
@pytest.mark.parametrize("code", [0, 15])
def test_the_largest_sums_stay_finite(tile, k, code):
    """All products are the largest of their sign; sums in float16 would overflow if scales were taken as they are."""
    for scale in (2.0**-12, 0.01, 0.999, 15.0, 60000.0):
        for group in (128, k):
            codes, scales = torch.full((64, k), code, dtype=torch.uint8), torch.full((64, k // group), scale)
            packed = ops.pack(QuantizedLinear(codes.cuda(), scales.half().cuda(), group))
            x = torch.full((130, k), 1e-4 if scale > 1 else 0.5, dtype=torch.bfloat16, device="cuda")
            y = multiply((tile, None), x, packed)
            assert y.isfinite().all()
            assert_close(y, x, packed)


@pytest.mark.parametrize("kernel", KERNELS)
def test_small_products_after_a_large_sum(kernel):
    """The sum so far is an operand too, beside which tensor cores may cut what is added."""
    codes, x = torch.full((64, 1024), 9, dtype=torch.uint8), torch.full((4, 1024), 1.0)
    codes.view(64, 8, 128)[..., :30], x.view(4, 8, 128)[..., :30] = 15, 320.0
    codes.view(64, 8, 128)[:, 1::2, :30] = 1
    codes.view(64, 8, 128)[..., 30:] = 15
    x[:, 0] = 448
    packed = ops.pack(QuantizedLinear(codes.cuda(), torch.full((64, 8), 0.02).half().cuda(), 128))
    x = x.half().cuda()
    assert_close(multiply(kernel, x, packed), x, packed, kernel=kernel)


@pytest.mark.parametrize("tile", HOPPER)
def test_sums_of_one_sign_and_scales_of_all_sizes(tile):
    weight = random_weight(192, 28672)
    weight.scales.abs_().mul_(torch.logspace(-3, 1, 224, device="cuda"))
    codes = weight.codes.clamp(min=8)
    for part in (weight, QuantizedLinear(codes, weight.scales, 128)):
        packed, x = ops.pack(part), random_x(300, 28672).abs()
        assert_close(multiply((tile, None), x, packed), x, packed)


def test_scales_of_weights_that_are_not_finite_stay_in_their_rows():
    weight = random_weight(128, 512)
    weight.scales[4, 1], weight.scales[5, 2], weight.scales[6] = float("inf"), float("nan"), 0
    y = w4a8.fp8_linear(random_x(200, 512), ops.pack(weight))
    assert not y[:, 4:6].isfinite().any()
    assert (y[:, 6] == 0).all()
    assert y[:, [row for row in range(128) if row not in {4, 5}]].isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_runs_are_bit_equal(kernel):
    packed, x = ops.pack(random_weight(4096, 2048)), random_x(300, 2048)
    first = multiply(kernel, x, packed)
    for _ in range(100):
        assert torch.equal(multiply(kernel, x, packed), first)


def test_graphs_streams_and_chains():
    weight = random_weight(1024, 1024)
    weight.scales.mul_(0.3)  # what comes out is about as large as what goes in
    packed = ops.pack(weight)
    w4a8.prepare_fp8(packed, torch.float16)
    x = random_x(150, 1024)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(20):
            y = w4a8.fp8_linear(y, packed)
    for seed in range(5):
        x.copy_(random_x(150, 1024, seed=seed))
        graph.replay()
        expected = x
        for _ in range(20):
            expected = w4a8.fp8_linear(expected, packed)
            torch.cuda.synchronize()
        assert y.isfinite().all()
        assert torch.equal(y, expected)


def test_engines_have_few_rows_multiplied_in_16_bits():
    """In a graph that was captured for some rows, and in one that was compiled for all."""
    packed, bias = ops.pack(random_weight(200, 384)), random_x(1, 200)[0]
    weight = (packed.codes, packed.scales, exponent_tensor(packed), bias, 200)
    ops.prepare(packed, torch.float16)
    ops.prepare_fp8(packed, torch.float16)
    compiled = torch.compile(lambda x: packed_fp8_linear(x, *weight), backend="aot_eager", dynamic=True, fullgraph=True)
    for m in (2, w4a8.LEAST_ROWS - 1, w4a8.LEAST_ROWS, 600):
        x = random_x(m, 384)
        expected = (ops.fp8_linear if m >= w4a8.LEAST_ROWS else ops.linear)(x, packed, bias)
        assert torch.equal(packed_fp8_linear(x, *weight), expected)
        assert torch.equal(compiled(x), expected)
        graph, held = torch.cuda.CUDAGraph(), torch.zeros_like(x)
        with torch.cuda.graph(graph):
            y = packed_fp8_linear(held, *weight)
        held.copy_(x)
        graph.replay()
        assert torch.equal(y, expected)


def test_compiles_whole_and_passes_opcheck():
    packed = ops.pack(random_weight(200, 384))
    x, bias = random_x(5, 384), random_x(1, 200)[0]
    arguments = (x, packed.codes, packed.scales, bias, 200, packed.exponent)
    torch.library.opcheck(torch.ops.marlin_tools.w4a8_linear.default, arguments)


def test_no_rows_and_activations_that_are_not_aligned():
    packed = ops.pack(random_weight(64, 128))
    assert w4a8.fp8_linear(random_x(0, 128), packed).shape == (0, 64)
    shifted = torch.zeros(129, dtype=torch.float16, device="cuda")[1:].view(1, 128)
    with pytest.raises(DeviceError, match="begin at address"):
        w4a8.fp8_linear(shifted, packed)
