"""What the formats do not hold, and what they say about it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from marlin_tools.errors import FormatError
from marlin_tools.formats import FORMATS, find_format, get_format
from marlin_tools.formats.gptq import GPTQ_V2
from marlin_tools.formats.marlin_24 import GPTQ_MARLIN_24
from marlin_tools.quantized import QuantizedLinear

# ---- limits -----------------------------------------------------------------------------------------------------------

LIMITS = (
    ("gptq", (8, 8, -1), None),
    ("gptq", (8, 24, 3), None),
    ("gptq", (12, 64, 32), "12 outputs are not a multiple of 8"),
    ("gptq", (16, 60, -1), "60 inputs are not a multiple of 8"),
    ("gptq", (16, 192, 128), "192 inputs are not a multiple of group_size 128"),
    ("gptq", (16, 64, 0), "group_size 0 is neither positive nor -1 (per column)"),
    ("compressed-tensors", (3, 5, -1), None),
    ("compressed-tensors", (3, 5, 2), "5 inputs are not a multiple of group_size 2"),
    ("marlin", (256, 128, -1), None),
    ("marlin", (256, 384, 384), None),
    ("marlin", (256, 384, 128), None),
    ("marlin", (384, 128, 128), "384 outputs are not a multiple of 256"),
    ("marlin", (256, 192, -1), "192 inputs are not a multiple of 128"),
    ("marlin", (256, 128, 64), "group_size 64 is neither 128 nor -1 (per column)"),
    ("marlin-24", (64, 32, -1), None),
    ("marlin-24", (64, 128, 128), None),
    ("marlin-24", (96, 128, 128), "96 outputs are not a multiple of 64"),
    ("marlin-24", (64, 48, -1), "48 inputs are not a multiple of 32"),
    ("marlin-24", (64, 160, 128), "160 inputs are not a multiple of group_size 128"),
    ("marlin-24", (64, 128, 32), "group_size 32 is neither 128 nor -1 (per column)"),
)


@pytest.mark.parametrize(("name", "sizes", "reason"), LIMITS)
def test_limits(name, sizes, reason):
    assert FORMATS[name].limits(*sizes) == reason
    assert FORMATS[name].limits(*sizes, sparse=True) == reason


def test_only_marlin_24_asks_for_sparsity():
    assert {name: each.limits(256, 128, 128, sparse=False) for name, each in FORMATS.items()} == {
        "gptq": None,
        "compressed-tensors": None,
        "marlin": None,
        "marlin-24": "weights are not 2:4 sparse",
    }


@pytest.mark.parametrize(
    ("name", "sizes", "reason"), [limit for limit in LIMITS if limit[2] and limit[1][1] % abs(limit[1][2] or 7) == 0]
)
def test_pack_keeps_the_limits(draw_linear, name, sizes, reason):
    n, k, group_size = sizes
    with pytest.raises(FormatError) as raised:
        FORMATS[name].pack(draw_linear(n, k, k if group_size == -1 else group_size, sparse=True))
    assert raised.value.message == f"format `{name}`: {reason}"
    assert raised.value.hint == "choose another `--format` or `--group-size`, or leave the linear out with `--ignore`"


@pytest.mark.parametrize("nonzero", [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)])
def test_marlin_24_names_the_quad_that_is_not_2_4(nonzero):
    codes = torch.full((64, 32), 8, dtype=torch.uint8)
    codes[5, [12 + place for place in nonzero]] = 9
    with pytest.raises(FormatError) as raised:
        FORMATS["marlin-24"].pack(QuantizedLinear(codes, torch.ones(64, 1).half(), 32))
    assert raised.value.message == "format `marlin-24`: output 5 has more than two nonzeros in inputs 12..15"
    assert raised.value.hint == "prune first (`--sparsity 2:4`), or use a dense format"


# ---- scales that do not fit -------------------------------------------------------------------------------------------


def test_a_scale_that_bfloat16_cannot_hold_is_not_rounded():
    scales = torch.tensor([[0.5, 0.1], [-2.0, -0.1]]).half()
    linear = QuantizedLinear(torch.zeros(2, 16, dtype=torch.uint8), scales, 8)
    with pytest.raises(FormatError) as raised:
        FORMATS["compressed-tensors"].pack(linear, torch.bfloat16)
    assert raised.value.message == "`weight_scale`: 2 of 4 scales are not exact in bfloat16, first 0.0999756"


@pytest.mark.parametrize(("scale", "shown"), ((1e5, "99840"), (1e-9, "9.96806e-10"), (float("nan"), "nan")))
def test_a_scale_that_float16_cannot_hold_is_not_rounded(scale, shown):
    tensors = FORMATS["gptq"].pack(QuantizedLinear(torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1).half(), 8))
    tensors["scales"] = torch.full((1, 8), scale, dtype=torch.bfloat16)
    with pytest.raises(FormatError, match=rf"^`scales`: 8 of 8 scales are not exact in float16, first {shown}\n"):
        FORMATS["gptq"].unpack(tensors, (8, 8))


# ---- tensors that do not follow their format --------------------------------------------------------------------------

Edit = Callable[[dict[str, Tensor]], object]
BROKEN: tuple[tuple[str, Edit, str], ...] = (
    ("gptq", lambda t: t.pop("g_idx"), "format `gptq`: no tensor `g_idx`"),
    ("gptq", lambda t: t.update(extra=t["scales"]), "format `gptq`: unknown tensor `extra`"),
    ("gptq", lambda t: t.update(qweight=t["qweight"].long()), "`qweight` is int64, not int32"),
    ("gptq", lambda t: t.update(qweight=t["qweight"][1:]), "`qweight` has shape [31, 256], not [32, 256]"),
    ("gptq", lambda t: t.update(scales=t["scales"].repeat(2, 1)[:3]), "3 scales per output do not divide 256 inputs evenly"),
    ("gptq", lambda t: t.update(scales=t["scales"][:0]), "0 scales per output do not divide 256 inputs evenly"),
    ("gptq", lambda t: t.update(scales=t["scales"][0]), "`scales` has shape [256], not two dimensions"),
    ("gptq", lambda t: t.update(scales=t["scales"].int()), "`scales` is int32, not a floating-point type"),
    ("gptq", lambda t: t.update(scales=t["scales"][:, 1:]), "`scales` has shape [2, 255], not [2, 256]"),
    ("gptq", lambda t: t.update(g_idx=t["g_idx"][1:]), "`g_idx` has shape [255], not [256]"),
    ("gptq", lambda t: t.update(g_idx=t["g_idx"].long()), "`g_idx` is int64, not int32"),
    ("gptq", lambda t: t.update(qzeros=t["qzeros"][:, 1:]), "`qzeros` has shape [2, 31], not [2, 32]"),
    (
        "gptq",
        lambda t: t["qzeros"].__setitem__((1, 3), 0x77777737),
        "`qzeros` holds 3, but symmetric weights in `gptq` hold 7 everywhere",
    ),
    (
        "gptq",
        lambda t: t.update(g_idx=t["g_idx"].flip(0)),
        "`g_idx` permutes the inputs (act-order), which no format here can hold",
    ),
    (
        "compressed-tensors",
        lambda t: t.update(weight_packed=t["weight_packed"].t()),
        "`weight_packed` has shape [32, 256], not [256, 32]",
    ),
    (
        "compressed-tensors",
        lambda t: t.update(weight_scale=t["weight_scale"][1:]),
        "`weight_scale` has shape [255, 2], not [256, 2]",
    ),
    ("compressed-tensors", lambda t: t["weight_shape"].add_(1), "`weight_shape` holds [257, 257], not [256, 256]"),
    ("compressed-tensors", lambda t: t.update(weight_shape=t["weight_shape"].int()), "`weight_shape` is int32, not int64"),
    (
        "compressed-tensors",
        lambda t: t.update(weight_zero_point=t["weight_shape"]),
        "format `compressed-tensors`: unknown tensor `weight_zero_point`",
    ),
    ("marlin", lambda t: t.update(B=t["B"].view(32, 256)), "`B` has shape [32, 256], not [16, 512]"),
    ("marlin", lambda t: t.update(B=t["B"].view(torch.float32)), "`B` is float32, not int32"),
    ("marlin", lambda t: t.update(s=t["s"].bfloat16()), "`s` is bfloat16, not float16"),
    ("marlin", lambda t: t.update(s=t["s"].repeat(2, 1)), "format `marlin`: group_size 64 is neither 128 nor -1 (per column)"),
    ("marlin-24", lambda t: t.pop("meta"), "format `marlin-24`: no tensor `meta`"),
    ("marlin-24", lambda t: t.update(meta=t["meta"].int()), "`meta` is int32, not int16"),
    (
        "marlin-24",
        lambda t: t["meta"].__setitem__((3, 7), 0x4454),
        "`meta`: nibble 0x5 does not name two of four inputs in order",
    ),
    (
        "marlin-24",
        lambda t: t["meta"].__setitem__((0, 0), 0x1444),
        "`meta`: nibble 0x1 does not name two of four inputs in order",
    ),
    ("marlin-24", lambda t: t.update(weight_packed=t["weight_packed"][1:]), "`weight_packed` has shape [7, 512], not [8, 512]"),
    ("marlin-24", lambda t: t.update(scale_packed=t["scale_packed"][:, 1:]), "`scale_packed` has shape [2, 255], not [2, 256]"),
)


@pytest.mark.parametrize(("name", "edit", "message"), BROKEN)
def test_unpack_names_what_is_off(draw_linear, name, edit, message):
    tensors = FORMATS[name].pack(draw_linear(256, 256, 128, sparse=True))
    FORMATS[name].unpack(tensors, (256, 256))
    edit(tensors)
    with pytest.raises(FormatError) as raised:
        FORMATS[name].unpack(tensors, (256, 256))
    assert raised.value.message == message
    assert raised.value.hint


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("gptq", (256, 252), "252 inputs are not a multiple of 8"),
        ("marlin", (320, 256), "320 outputs are not a multiple of 256"),
        ("marlin-24", (288, 256), "288 outputs are not a multiple of 64"),
    ],
)
def test_unpack_keeps_the_limits(draw_linear, name, shape, reason):
    tensors = FORMATS[name].pack(draw_linear(256, 256, 128, sparse=True))
    with pytest.raises(FormatError) as raised:
        FORMATS[name].unpack(tensors, shape)
    assert raised.value.message == f"format `{name}`: {reason}"


def test_a_gptq_checkpoint_with_the_zero_points_of_version_2_is_told_so(draw_linear):
    tensors = GPTQ_V2.pack(draw_linear(256, 256, 128))
    with pytest.raises(FormatError) as raised:
        FORMATS["gptq"].unpack(tensors, (256, 256))
    assert raised.value.message == "`qzeros` holds 8, but symmetric weights in `gptq` hold 7 everywhere"
    assert raised.value.hint == (
        'these are zero points of version 2: if so, set `"checkpoint_format": "gptq_v2"` in its config.json'
    )


@pytest.mark.parametrize("name", ("gptq", "marlin", "marlin-24"))
def test_shape_of_needs_a_matrix(name):
    suffix = FORMATS[name].suffixes[0]
    with pytest.raises(FormatError, match=rf"^`{suffix}` has shape \[4\], not two dimensions"):
        FORMATS[name].shape_of({suffix: torch.zeros(4, dtype=torch.int32)})


# ---- which format a checkpoint has ------------------------------------------------------------------------------------

FLAT = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def grouped(layout: str = "pack-quantized", **weights: object) -> dict[str, object]:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups}


@pytest.mark.parametrize(
    ("config", "expected"),
    (
        ({"quant_method": "gptq", **FLAT}, FORMATS["gptq"]),
        ({"quant_method": "gptq", **FLAT, "checkpoint_format": "gptq", "desc_act": True}, FORMATS["gptq"]),
        ({"quant_method": "gptq", **FLAT, "format": "gptq_v2"}, GPTQ_V2),
        ({"quant_method": "gptq", **FLAT, "checkpoint_format": "gptq_v2"}, GPTQ_V2),
        ({"quant_method": "gptq", **FLAT, "checkpoint_format": "marlin"}, FORMATS["marlin"]),
        ({"quant_method": "gptq", **FLAT, "is_marlin_format": True}, FORMATS["marlin"]),
        ({"quant_method": "gptq", **FLAT, "is_marlin_format": False}, FORMATS["gptq"]),
        ({"quant_method": "marlin", "group_size": 128}, FORMATS["marlin"]),
        ({"quant_method": "gptq", **FLAT, "checkpoint_format": "marlin_24"}, GPTQ_MARLIN_24),
        (grouped(), FORMATS["compressed-tensors"]),
        (grouped(actorder="static"), FORMATS["compressed-tensors"]),
        (grouped() | {"sparsity_config": {"format": "dense"}, "transform_config": {}}, FORMATS["compressed-tensors"]),
        (grouped("marlin-24"), FORMATS["marlin-24"]),
    ),
)
def test_find_format(config, expected):
    assert find_format(config) is expected


REFUSED = (
    ({"quant_method": "gptq", **FLAT, "bits": 8}, "`bits` is 8, only 4 can be read", "symmetric 4-bit"),
    ({"quant_method": "gptq", **FLAT, "sym": False}, "`sym` is False, only True can be read", "symmetric 4-bit"),
    (grouped(num_bits=8), "`config_groups.group_0.weights.num_bits` is 8, only 4 can be read", "symmetric 4-bit"),
    (grouped(type="float"), "`config_groups.group_0.weights.type` is 'float', only 'int' can be read", "symmetric 4-bit"),
    (grouped(symmetric=False), "`config_groups.group_0.weights.symmetric` is False, only True can be read", "symmetric"),
    (
        grouped(actorder="group"),
        "`config_groups.group_0.weights.actorder` 'group' permutes the inputs",
        "`actorder` static",
    ),
    (
        grouped() | {"config_groups": {"a": {"weights": {"num_bits": 4}, "input_activations": {"num_bits": 8}}}},
        "`config_groups.a.input_activations.type` is None, only 'float' can be read",
        "activations of 16 bits",
    ),
    (
        grouped() | {"config_groups": {"a": {"weights": {"num_bits": 4}, "output_activations": {"num_bits": 8}}}},
        "`config_groups.a.output_activations` is {'num_bits': 8}, only None can be read",
        "activations of 16 bits",
    ),
    (
        grouped()
        | {
            "config_groups": {
                "a": {"weights": {"num_bits": 4}},
                "b": {"weights": {"num_bits": 4}, "input_activations": FP8},
            }
        },
        "some `config_groups` have FP8 activations and some have not",
        "unquantized",
    ),
    (grouped() | {"config_groups": {"W4A16": ["Linear"]}}, "`config_groups.W4A16` has no `weights` scheme", "unquantized"),
    (grouped() | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "`sparsity_config` is not supported", "unquantized"),
    (grouped() | {"transform_config": {"u": {}}}, "`transform_config` is not supported", "unquantized model"),
    (
        grouped("pack_quantized"),
        "unknown layout `pack_quantized` of `compressed-tensors`, which stores weights as 4-bit int",
        "did you mean `pack-quantized`?",
    ),
    (
        grouped("nvfp4", type="float"),
        "unknown layout `nvfp4` of `compressed-tensors`, which stores weights as 4-bit float",
        "known: marlin-24, pack-quantized",
    ),
    (
        grouped("float-quantized", num_bits=8, type="float"),
        "unknown layout `float-quantized` of `compressed-tensors`, which stores weights as 8-bit float",
        "known: marlin-24, pack-quantized; for all else start from the original model",
    ),
    (
        {"quant_method": "compressed-tensors", "format": "naive-quantized", "config_groups": [{"weights": [[]]}]},
        "unknown layout `naive-quantized` of `compressed-tensors`",
        "known: marlin-24, pack-quantized; for all else start from the original model",
    ),
    (
        {"quant_method": "gptq", "checkpoint_format": "bitblas"},
        "unknown layout `bitblas` of `gptq`",
        "known: gptq, gptq_v2, marlin",
    ),
    (
        {"quant_method": "compressed_tensors"},
        "unknown quant_method `compressed_tensors`",
        "did you mean `compressed-tensors`?",
    ),
    ({"quant_method": "awq"}, "unknown quant_method `awq`", "known: compressed-tensors, gptq, marlin"),
    ({}, "unknown quant_method `None`", "known: compressed-tensors, gptq, marlin"),
)


@pytest.mark.parametrize(("config", "message", "hint"), REFUSED)
def test_find_format_refuses(config, message, hint):
    with pytest.raises(FormatError) as raised:
        find_format(config)
    assert raised.value.message == f"`quantization_config`: {message}"
    assert raised.value.hint is not None
    assert hint in raised.value.hint


def test_get_format():
    assert [get_format(name).name for name in FORMATS] == ["gptq", "compressed-tensors", "marlin", "marlin-24"]
    with pytest.raises(FormatError) as raised:
        get_format("marlin24")
    assert raised.value.message == "unknown format `marlin24`"
    assert raised.value.hint == "did you mean `marlin-24`? known: gptq, compressed-tensors, marlin, marlin-24"
