"""Nothing is lost: through a format and back, from any format to any other, and through a file."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from marlin_tools.formats import FORMATS, find_format
from marlin_tools.formats.gptq import GPTQ_V2
from marlin_tools.formats.marlin_24 import GPTQ_MARLIN_24
from marlin_tools.quantized import QuantizedLinear

EVERY = {**FORMATS, "gptq_v2": GPTQ_V2, "gptq marlin_24": GPTQ_MARLIN_24}
UNITS = {"gptq": (8, 8), "gptq_v2": (8, 8), "compressed-tensors": (1, 1), "marlin": (256, 128)}
"""What N and K must be multiples of; 2:4 layouts: (64, 32)."""


def bits(tensor: Tensor) -> Tensor:
    """Compared as bits, so that -0 is not 0."""
    return tensor.view(torch.int16) if tensor.dtype == torch.float16 else tensor


def assert_same(linear: QuantizedLinear, expected: QuantizedLinear) -> None:
    assert linear.group_size == expected.group_size
    assert torch.equal(linear.codes, expected.codes)
    assert torch.equal(bits(linear.scales), bits(expected.scales))
    assert linear.codes.is_contiguous()
    assert linear.scales.is_contiguous()


@st.composite
def cases(draw, name: str) -> tuple[int, int, int, int]:
    """(N, K, group_size, seed) within the limits of a format."""
    n_unit, k_unit = UNITS.get(name, (64, 32))
    n = n_unit * draw(st.integers(1, 3))
    if draw(st.booleans()):
        k = k_unit * draw(st.integers(1, 9))
        return n, k, k, draw(st.integers(0, 2**32))
    return n, 128 * draw(st.integers(1, 4)), 128, draw(st.integers(0, 2**32))


@pytest.mark.parametrize("name", EVERY)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_unpack_inverts_pack(draw_linear, name, data):
    n, k, group_size, seed = data.draw(cases(name))
    sparse = "24" in name or (k % 4 == 0 and data.draw(st.booleans()))
    linear = draw_linear(n, k, group_size, sparse=sparse, seed=seed)
    assert EVERY[name].limits(n, k, group_size, sparse=sparse) is None
    tensors = EVERY[name].pack(linear)
    assert tuple(tensors) == EVERY[name].suffixes
    assert EVERY[name].shape_of(tensors) == (n, k)
    assert_same(EVERY[name].unpack(tensors, (n, k)), linear)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), tiles=st.tuples(st.integers(1, 2), st.integers(1, 2)), per_column=st.booleans())
def test_marlin_24_holds_any_quad(seed, tiles, per_column):
    """Every one of the 16 x 16 x 6 and fewer-nonzero quads is as likely as any other, not only those of a pruned model."""
    random = torch.Generator().manual_seed(seed)
    n, k = 64 * tiles[0], 128 * tiles[1]
    kept = torch.rand(n, k // 4, 4, generator=random).argsort(dim=2)[..., :2]
    kept[torch.rand(n, k // 4, generator=random) < 0.2] = 3  # one position twice: a single nonzero at most
    values = torch.randint(0, 16, kept.shape, generator=random, dtype=torch.uint8)
    codes = torch.full((n, k // 4, 4), 8, dtype=torch.uint8).scatter_(2, kept, values).view(n, k)
    group_size = k if per_column else 128
    linear = QuantizedLinear(codes, torch.randn(n, k // group_size, generator=random).half(), group_size)
    assert linear.is_2_4()
    assert_same(FORMATS["marlin-24"].unpack(FORMATS["marlin-24"].pack(linear), (n, k)), linear)


@pytest.mark.parametrize(("source", "target"), [*permutations(FORMATS, 2)])
@pytest.mark.parametrize("group_size", (128, 256))
def test_conversion_gives_the_bytes_of_packing_afresh(draw_linear, source, target, group_size):
    linear = draw_linear(256, 256, group_size, sparse=True)
    converted = FORMATS[target].pack(FORMATS[source].unpack(FORMATS[source].pack(linear), (256, 256)))
    assert save(converted) == save(FORMATS[target].pack(linear))


@pytest.mark.parametrize("name", EVERY)
def test_a_file_brings_back_what_went_in(draw_linear, name):
    linear = draw_linear(256, 256, 128, sparse=True)
    assert_same(EVERY[name].unpack(load(save(EVERY[name].pack(linear))), (256, 256)), linear)


@pytest.mark.parametrize("name", EVERY)
def test_strides_make_no_difference(draw_linear, name):
    """Codes and scales may be slices or transposes of something larger; so may stored tensors."""
    linear = draw_linear(256, 256, 128, sparse=True)
    strided = QuantizedLinear(linear.codes.t().contiguous().t(), linear.scales.repeat(1, 2)[:, :2], 128)
    assert not strided.codes.is_contiguous()
    tensors = EVERY[name].pack(strided)
    assert save(tensors) == save(EVERY[name].pack(linear))
    assert_same(
        EVERY[name].unpack({key: t[..., None].repeat_interleave(2, -1)[..., 0] for key, t in tensors.items()}, (256, 256)),
        linear,
    )


@pytest.mark.parametrize("name", EVERY)
def test_linears_that_are_packed_together_are_as_if_each_were_alone(draw_linear, name):
    whole = draw_linear(768, 256, 128, sparse=True)
    rows = {"c": slice(512, 768), "a": slice(0, 256), "b": slice(0, 512)}
    packed = EVERY[name].pack_all(whole, rows, torch.float16)
    assert list(packed) == list(rows)
    for linear, own in rows.items():
        assert save(packed[linear]) == save(EVERY[name].pack(whole[own]))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("group_size", (-1, 128))
def test_a_checkpoint_is_recognized_by_what_we_write(name, group_size):
    config = EVERY[name].quantization_config(group_size, ["lm_head", "model.layers.0.mlp.down_proj"])
    assert find_format(config) is EVERY[name]
    assert [other for other, each in EVERY.items() if each.recognize(config)] == [name]


@pytest.mark.parametrize("name", ("gptq", "compressed-tensors"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_scales_of_another_type_are_read_if_exact(draw_linear, name, dtype):
    linear = draw_linear(64, 128, 32)
    shared = linear.scales.to(torch.bfloat16).clamp(-60000, 60000).half()
    tensors = FORMATS[name].pack(QuantizedLinear(linear.codes, shared, 32))
    suffix = "scales" if name == "gptq" else "weight_scale"
    tensors[suffix] = tensors[suffix].to(dtype)
    assert_same(FORMATS[name].unpack(tensors, (64, 128)), QuantizedLinear(linear.codes, shared, 32))


def test_compressed_tensors_stores_scales_in_the_dtype_of_the_model(draw_linear):
    codes = draw_linear(16, 64, 32).codes
    scales = torch.full((16, 2), -0.0078125, dtype=torch.float16)
    linear = QuantizedLinear(codes, scales, 32)
    packed = FORMATS["compressed-tensors"].pack(linear, torch.bfloat16)
    assert packed["weight_scale"].dtype == torch.bfloat16
    assert_same(FORMATS["compressed-tensors"].unpack(packed, (16, 64)), linear)


@pytest.mark.parametrize("name", ("gptq", "marlin", "marlin-24"))
def test_the_others_store_float16_for_every_model(draw_linear, name):
    linear = draw_linear(256, 128, 128, sparse=True)
    assert save(FORMATS[name].pack(linear, torch.bfloat16)) == save(FORMATS[name].pack(linear))


@pytest.mark.parametrize("name", ("gptq", "gptq_v2"))
def test_gptq_zero_points_mean_8_to_a_loader_that_knows_only_the_layout(draw_linear, name):
    """Version 1 loaders add 1 to what is stored, version 2 loaders do not; both then compute (code - zero) * scale."""
    linear = draw_linear(16, 64, 32)
    stored = EVERY[name].pack(linear)
    shifts = torch.arange(0, 32, 4)
    zeros = (stored["qzeros"][:, :, None] >> shifts & 15).flatten(1) + (name == "gptq")
    codes = (stored["qweight"][:, None, :] >> shifts[:, None] & 15).flatten(0, 1)
    g_idx = stored["g_idx"].long()
    weight_kn = (codes - zeros[g_idx]) * stored["scales"].float()[g_idx]
    assert torch.equal(weight_kn.t(), linear.dequantize())
    assert stored["qzeros"].unique().tolist() == [0x77777777 if name == "gptq" else 0x88888888 - 2**32]


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_the_device_makes_no_difference(draw_linear, name):
    linear = draw_linear(512, 384, 128, sparse=True)
    on_device = EVERY[name].pack(linear.to("cuda"))
    assert {tensor.device.type for tensor in on_device.values()} == {"cuda"}
    assert save(on_device) == save(EVERY[name].pack(linear))
    assert_same(EVERY[name].unpack(on_device, (512, 384)).to("cpu"), linear)


def test_another_spelling_of_marlin_24_names_the_same_tensors_otherwise(draw_linear):
    linear = draw_linear(64, 128, 128, sparse=True)
    ours, theirs = FORMATS["marlin-24"].pack(linear), GPTQ_MARLIN_24.pack(linear)

    assert ["B_24", "B_meta", "s"] == list(theirs)
    assert all(torch.equal(bits(mine), bits(other)) for mine, other in zip(ours.values(), theirs.values(), strict=True))
