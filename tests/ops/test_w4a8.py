"""INT4 weights x FP8 activations without a GPU: the order of inputs, the rounding, the operator on a CPU, what is refused."""

import dataclasses
import re

import pytest
import torch

from marlin_tools import ops
from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear import fp8_reference, w4a8
from marlin_tools.ops.linear.fp8_tiles import FP8_TILES, fp8_kernel, fp8_kernels, round_kernel
from marlin_tools.ops.linear.layout import WORDS, pack
from marlin_tools.ops.runtime.compiler import compile_kernel
from marlin_tools.quantized import ZERO, QuantizedLinear

DTYPES = [torch.float16, torch.bfloat16]


def weight(n, k, group_size=128, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    return QuantizedLinear(codes, torch.randn((n, k // group_size), generator=generator).half() * 0.02, group_size)


def fragments(words):
    """int32 [..., jj, i, lane, j] -> e4m3 operands float32 [output of 64, place of 128], as `E4m3::dequantize` makes them."""
    halves = (words.view(2, 4, 8, 4, 4) >> shift & 0x0F0F0F0F for shift in (0, 4))
    rows = torch.stack([half.contiguous().view(torch.uint8).view(2, 4, 8, 4, 4, 4) for half in halves], dim=-1)
    distance = (rows.to(torch.int16) - ZERO).abs().to(torch.uint8)
    values = (distance | (rows < ZERO).to(torch.uint8) << 7).view(torch.float8_e4m3fn).to(torch.float32)
    # [jj, i, g, t, j, byte, h]: output 8 g + 2 i + h, place 64 jj + 16 j + 4 t + byte (k32 fragments: registers 2 (j % 2) + h)
    return values.permute(2, 1, 6, 0, 4, 3, 5).reshape(64, 128)


def test_packed_words_and_rounded_activations_are_in_the_same_order():
    quantized = weight(64, 128)
    words = pack(quantized).codes[0, 0]
    assert words.shape == (WORDS,)
    natural = quantized.codes.to(torch.float32) - ZERO
    assert torch.equal(fragments(words) * 512, fp8_reference.in_kernel_order(natural))


def test_the_order_is_a_permutation_within_16_inputs():
    order = fp8_reference.in_kernel_order(torch.arange(256).view(1, -1))[0]
    assert sorted(order.tolist()) == list(range(256))
    assert order[:6].tolist() == [0, 8, 1, 9, 2, 10]
    assert torch.equal(order.view(-1, 16) // 16, torch.arange(16)[:, None].expand(16, 16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_rounded_by_their_largest_value(dtype):
    x = torch.randn((7, 256), generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    x[2, 5] = 1000
    x[3] *= 1e-7
    rounded, scales = fp8_reference.round_tokens(x)
    values = rounded.to(torch.float32) * scales[:, None]
    assert ((values - x.float()).abs() <= x.float().abs() * 2**-4 + scales[:, None] * 2**-10).all()
    assert (values[1] == 0).all()
    assert values[2, 5] == 1000
    assert rounded.to(torch.float32).abs().amax(dim=1)[[0, 2, 4]].tolist() == [448] * 3


def test_only_tokens_that_are_not_finite_have_such_outputs():
    packed = pack(weight(70, 256))
    x = torch.randn((5, 256), dtype=torch.float16)
    expected = w4a8.fp8_linear(x, packed)
    x[1, 3], x[4, 200] = float("nan"), float("inf")
    y = w4a8.fp8_linear(x, packed)
    assert y[[1, 4]].isnan().all()
    assert torch.equal(y[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("group_size", [128, 384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_cpu(dtype, group_size):
    packed = pack(weight(200, 384, group_size))
    x, bias = torch.randn((6, 384)).to(dtype), torch.randn(200).to(dtype)
    for b in (None, bias):
        y = w4a8.fp8_linear(x, packed, b)
        error = (y - fp8_reference.exact(x, packed, b)).abs()
        assert (error <= fp8_reference.error_bound(x, packed, b)).all()
        full = ops.linear(x, packed, b)
        assert 1e-3 < (y - full).norm() / full.norm() < 0.05
    assert w4a8.fp8_linear(x[:0], packed).shape == (0, 200)


def test_traced_without_a_device():
    packed = pack(weight(200, 384))
    x = torch.empty((5, 384), dtype=torch.bfloat16, device="meta")
    y = w4a8.fp8_linear(x, packed.to("meta"))
    assert (y.shape, y.dtype, y.device.type) == ((5, 200), torch.bfloat16, "meta")


def test_narrow_groups_are_refused():
    cpu = torch.device("cpu")
    assert w4a8.fp8_supported(cpu, 1024, 128) is None
    assert w4a8.fp8_supported(cpu, 1024, 1024) is None
    assert "group_size 64" in w4a8.fp8_supported(cpu, 1024, 64)
    with pytest.raises(ValueError, match="scales must be float16"):
        w4a8.fp8_linear(torch.zeros((1, 256), dtype=torch.float16), pack(weight(64, 256, 64)))


INSTRUCTIONS = {
    "hopper": ("compute_90a", b"wgmma.mma_async.sync.aligned.m64n%dk32.f16.e4m3.e4m3"),
    "ada": ("compute_89", b"mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32"),
}


@pytest.mark.parametrize("group", [128, 0])
@pytest.mark.parametrize("tile", FP8_TILES)
def test_tensor_cores_multiply_eight_bits(tile, group):
    target, instruction = INSTRUCTIONS[FP8_TILES[tile].kernel]
    instruction = instruction.replace(b"%d", str(FP8_TILES[tile].tokens).encode())
    kernel = fp8_kernel(tile, torch.float16, target, group)
    text = compile_kernel(kernel).image
    assert instruction in text
    assert text.count(b"vabsdiff4") % 16 == 0  # whole packed tiles
    for what, value in kernel.mirrors:
        with pytest.raises(DeviceError, match="static assertion failed with"):
            compile_kernel(dataclasses.replace(kernel, mirrors=((what, value + 1),)))


def test_activations_are_rounded_by_hardware():
    text = compile_kernel(round_kernel(torch.bfloat16, 4096, "compute_90a")).image.decode(errors="replace")
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f32", text)
    assert "griddepcontrol.wait" in text


def test_activations_are_rounded_by_ada_as_well():
    text = compile_kernel(round_kernel(torch.bfloat16, 4096, "compute_89")).image.decode(errors="replace")
    assert re.search(r"cvt\.rn\.satfinite\.e4m3x2\.f32", text)
    assert "max.u16x2" not in text  # which came with Hopper


def test_hopper_and_ada_have_them():
    assert not fp8_kernels("sm_80")
    assert not fp8_kernels("sm_86")
    assert len(fp8_kernels("sm_89")) == 8 + 6
    assert len(fp8_kernels("sm_90a")) == 8 + 8 + 6


def test_each_gpu_takes_its_own():
    sizes = [(4096, 4096), (1024, 28672), (57344, 8192), (64, 128)]
    for m in (1, 64, 65, 512, 4096):
        for n, k in sizes:
            assert w4a8.FP8.choose("sm_89", m, n, k) == "64x256-ada"
            for gpu in ("sm_90a", "sm_90a H200"):
                assert w4a8.FP8.choose(gpu, m, n, k) in {"128x128-fp8", "256x128-fp8"}


@pytest.mark.parametrize(("target", "refused"), [("sm_80", True), ("sm_89", False), ("sm_90a", False), ("sm_120", True)])
def test_other_gpus_are_refused(monkeypatch, target, refused):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(w4a8, "target_of", lambda _device: target)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "Some GPU")
    reason = w4a8.fp8_supported(gpu, 1024, 128)
    assert reason == ("`Some GPU` is neither a Hopper nor an Ada GPU" if refused else None)
    choice = w4a8.FP8.choose(target, 512, 4096, 4096)
    if refused:
        with pytest.raises(DeviceError, match=f"`{choice}` does not run on `{target}`"):
            w4a8._kernel(choice, torch.float16, 128, target)
    else:
        assert w4a8._kernel(choice, torch.float16, 128, target).target == target
    assert w4a8._kernel("64x256-ada", torch.float16, 128, "sm_90a").threads == 256
    with pytest.raises(DeviceError, match="does not run on `sm_89`"):
        w4a8._kernel("128x128-fp8", torch.float16, 128, "sm_89")


@pytest.mark.parametrize("exponent", [-12, -2, 8, 12, 24])
@pytest.mark.parametrize("groups", [1, 73, 74, 224, 1000])
def test_no_sum_in_float16_can_overflow(exponent, groups):
    bits, growth = w4a8._smaller_scales(exponent, groups)
    smaller = torch.tensor([bits & 0xFFFF], dtype=torch.int32).to(torch.int16).view(torch.float16).item()
    largest = torch.tensor(min(2.0 ** (exponent - 8), 65504.0) * smaller)
    assert bits >> 16 == bits & 0xFFFF
    assert smaller * growth == 1
    total = torch.zeros(1, dtype=torch.float16)
    for _ in range(groups):  # rounded as the kernel rounds them, with a little more each time
        total = (total.double() + 896 * largest * (1 + 2.0**-12)).half()
    assert total.isfinite()
    assert exponent < 0 or groups * 896 * 2.0 ** (exponent - 8) * smaller > 65504 / 4 or groups < 37  # not without need


def of_tensor_cores(so_far, products):
    """A sum [M, N] and 32 products, cut 13 bits below the largest of them all, rounded to float16."""
    operands = torch.cat([products, so_far.double()[..., None]], dim=-1)
    unit = torch.frexp(operands.abs().amax(dim=-1, keepdim=True)).exponent.double().sub(14).exp2()
    return ((operands / unit).trunc() * unit).sum(dim=-1).half()


def of_kernel(x, packed):
    """As the kernel adds: 32 inputs at a time, of 128 the sum that is scaled."""
    rounded, token_scales = fp8_reference.round_tokens(x)
    column, groups = packed.scales.shape[1] == 1, x.shape[1] // 128
    exponent = fp8_reference.COLUMN_EXPONENT if column else packed.exponent
    unpacked, smaller = ops.unpack(packed), 2.0 ** fp8_reference.smaller_scales(exponent, groups)
    scales = torch.ones((packed.out_features, groups)) if column else unpacked.scales
    codes = (unpacked.codes.double() - ZERO) / 512
    total = torch.zeros((len(x), packed.out_features), dtype=torch.float16)
    for group in range(groups):
        part = torch.zeros_like(total)
        for first in range(group * 128, group * 128 + 128, 32):
            here = slice(first, first + 32)
            part = of_tensor_cores(part, rounded[:, None, here].double() * codes[None, :, here])
        total = (total.double() + part.double() * (scales[:, group].double() * smaller)).half()
    y = total.double() * 512 / smaller * token_scales.double()[:, None]
    return y * unpacked.scales[:, 0].double() if column else y


@pytest.mark.parametrize("k", [128, 256, 2048, 9600])
@pytest.mark.parametrize("size", [1, 3e-4])
@pytest.mark.parametrize("column", [False, True])
def test_sums_in_float16_stay_within_the_bound(k, size, column):
    """The bound is not far beyond what is lost."""
    quantized = weight(64, k, k if column else 128)
    quantized.scales.mul_(size)
    packed = pack(quantized)
    x = torch.randn((20, k), generator=torch.Generator().manual_seed(3)).half()
    y = of_kernel(x, packed)
    assert y.isfinite().all()
    error = (y - fp8_reference.exact(x, packed)).abs()
    bound = fp8_reference.error_bound(x, packed)
    assert (error <= bound).all()
    assert (error / bound).max() > 0.01
    assert (fp8_reference.error_bound(x, packed, half_sums=False) <= bound).all()


def test_the_bound_knows_that_small_products_are_lost_behind_a_large_sum():
    codes, x = torch.full((64, 1024), 15, dtype=torch.uint8), torch.ones((4, 1024)).half()
    x.view(4, 8, 128)[..., :30] = 320.0
    codes.view(64, 8, 128)[:, 1::2, :30] = 1
    x[:, 0] = 448
    packed = pack(QuantizedLinear(codes, torch.full((64, 8), 0.02).half(), 128))
    error = (of_kernel(x, packed) - fp8_reference.exact(x, packed)).abs()
    small = x == 1
    assert (error > 0.9 * small.sum(dim=1, keepdim=True) * 7 * 0.02).all()
    assert (error <= fp8_reference.error_bound(x, packed)).all()
    assert (error > fp8_reference.error_bound(x, packed, half_sums=False) / 4).all()
