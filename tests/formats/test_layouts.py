"""Where every code and scale lies: against the formulas written out by hand, golden bytes, and places worked out on paper."""

import hashlib
import json
from itertools import product

import pytest
import torch
from torch import Tensor

from marlin_tools.formats import FORMATS
from marlin_tools.quantized import QuantizedLinear


def to_linear(weights) -> QuantizedLinear:
    _, k, groups = weights.sizes
    patterns = torch.tensor(weights.scales, dtype=torch.int32).to(torch.int16)
    return QuantizedLinear(torch.tensor(weights.codes, dtype=torch.uint8), patterns.view(torch.float16), k // groups)


def content(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    assert tensor.is_contiguous()
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()


def hashes(tensors: dict[str, Tensor]) -> dict[str, str]:
    stored = {suffix: content(tensor) for suffix, tensor in tensors.items()}
    return {
        suffix: f"{dtype}{list(shape)} {hashlib.sha256(data).hexdigest()}" for suffix, (dtype, shape, data) in stored.items()
    }


def same_bits(tensor: Tensor, expected: Tensor) -> bool:
    return content(tensor) == content(expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sizes", ((256, 128, 1), (512, 256, 2), (256, 384, 1), (256, 384, 3)))
def test_pack_follows_the_formulas(by_hand, name, sizes):
    weights = by_hand.draw(sizes, seed=sum(sizes))
    expected = {suffix: (s.dtype, s.shape, s.content()) for suffix, s in by_hand.LAYOUTS[name](weights).items()}
    assert {suffix: content(tensor) for suffix, tensor in FORMATS[name].pack(to_linear(weights)).items()} == expected


@pytest.mark.parametrize(("name", "sizes"), (("marlin-24", (64, 32, 1)), ("marlin-24", (192, 128, 1)), ("gptq", (8, 24, 3))))
def test_pack_follows_the_formulas_on_its_smallest_shapes(by_hand, name, sizes):
    weights = by_hand.draw(sizes)
    expected = {suffix: (s.dtype, s.shape, s.content()) for suffix, s in by_hand.LAYOUTS[name](weights).items()}
    assert {suffix: content(tensor) for suffix, tensor in FORMATS[name].pack(to_linear(weights)).items()} == expected


def test_compressed_tensors_pads_the_last_word(by_hand):
    weights = by_hand.Weights([[8, 9, 10, 11, 12, 13, 14, 15, 1, 2], [0] * 10], [[0x3C00], [0xBC00]])
    expected = {suffix: (s.dtype, s.shape, s.content()) for suffix, s in by_hand.compressed_tensors(weights).items()}
    packed = FORMATS["compressed-tensors"].pack(to_linear(weights))
    assert {suffix: content(tensor) for suffix, tensor in packed.items()} == expected
    assert packed["weight_packed"].tolist() == [[0xFEDCBA98 - 2**32, 0x21], [0, 0]]


def test_golden_bytes(by_hand):
    """The committed hashes are those of the formulas and those of the package."""
    committed = json.loads(by_hand.GOLDEN.read_text(encoding="utf-8"))
    linears = {"grouped": to_linear(by_hand.draw(by_hand.GROUPED)), "per column": to_linear(by_hand.draw(by_hand.PER_COLUMN))}
    packed = {name: {key: format_.pack(linear) for key, linear in linears.items()} for name, format_ in FORMATS.items()}
    assert by_hand.golden() == committed
    assert {name: {key: hashes(tensors) for key, tensors in cases.items()} for name, cases in packed.items()} == committed


def test_gptq_words():
    codes = torch.arange(16, dtype=torch.uint8).repeat(8, 1)
    scales = torch.linspace(-1, 1, 16).view(8, 2).half()
    packed = FORMATS["gptq"].pack(QuantizedLinear(codes, scales, 8))
    assert packed["qweight"].tolist() == [[0x76543210] * 8, [0xFEDCBA98 - 2**32] * 8]
    assert packed["qzeros"].tolist() == [[0x77777777], [0x77777777]]
    assert packed["g_idx"].tolist() == [0] * 8 + [1] * 8
    assert same_bits(packed["scales"], scales.t().contiguous())


@pytest.mark.parametrize(
    ("n", "k", "row", "word", "nibble"),
    (
        (0, 0, 0, 0, 0),
        (0, 1, 0, 0, 4),  # the other half of the fp16 pair, sixteen bits up
        (0, 2, 0, 4, 0),  # the next thread
        (0, 8, 0, 0, 1),
        (8, 0, 0, 0, 2),
        (1, 0, 0, 16, 0),
        (16, 0, 0, 1, 0),  # the next of the thread's four words
        (64, 0, 0, 128, 0),
        (0, 16, 1, 0, 0),
        (255, 127, 7, 511, 7),
    ),
)
def test_marlin_places(n, k, row, word, nibble):
    codes = torch.zeros(256, 128, dtype=torch.uint8)
    codes[n, k] = 5
    packed = FORMATS["marlin"].pack(QuantizedLinear(codes, torch.ones(256, 1).half(), 128))["B"]
    assert {(r, w): packed[r, w].item() for r, w in packed.nonzero().tolist()} == {(row, word): 5 << 4 * nibble}


@pytest.mark.parametrize(
    ("n", "k", "row", "word", "nibble"),
    (
        (0, 0, 0, 0, 0),
        (0, 3, 0, 0, 4),  # kept as second of (2, 3)
        (0, 4, 0, 4, 0),
        (0, 16, 0, 0, 1),
        (4, 0, 0, 0, 2),
        (1, 0, 0, 1, 0),
        (8, 0, 0, 16, 0),
        (64, 0, 0, 128, 0),
        (0, 32, 1, 0, 0),
    ),
)
def test_marlin_24_places(n, k, row, word, nibble):
    codes = torch.full((128, 64), 8, dtype=torch.uint8)
    codes[n, k] = 13
    packed = FORMATS["marlin-24"].pack(QuantizedLinear(codes, torch.ones(128, 1).half(), 64))["weight_packed"]
    changed = packed ^ (0x88888888 - 2**32)
    assert {(r, w): changed[r, w].item() for r, w in changed.nonzero().tolist()} == {(row, word): (13 ^ 8) << 4 * nibble}


@pytest.mark.parametrize(
    ("n", "column", "place"),
    ((0, 0, 0), (1, 0, 4), (4, 0, 1), (0, 1, 2), (4, 1, 3), (2, 0, 64), (8, 0, 8), (0, 2, 2 * 128), (64, 0, 128)),
)
def test_marlin_24_metadata_places(n, column, place):
    codes = torch.full((128, 64), 8, dtype=torch.uint8)
    codes[n, 16 * column : 16 * column + 16] = torch.tensor([1, 1, 8, 8, 8, 1, 1, 8, 8, 1, 8, 1, 1, 8, 8, 1])
    meta = FORMATS["marlin-24"].pack(QuantizedLinear(codes, torch.ones(128, 1).half(), 64))["meta"].flatten()
    expected = torch.full((128 * 4,), 0xEEEE - 2**16, dtype=torch.int16)
    expected[place] = 0xCD94 - 2**16
    assert same_bits(meta, expected)


NIBBLES = {
    (0, 1): 0x4,
    (0, 2): 0x8,
    (1, 2): 0x9,
    (0, 3): 0xC,
    (1, 3): 0xD,
    (2, 3): 0xE,
    (): 0xE,
    (2,): 0xE,
    (3,): 0xE,
    (1,): 0x9,
    (0,): 0x8,
}


@pytest.mark.parametrize(("nonzero", "nibble"), NIBBLES.items())
@pytest.mark.parametrize("code", (0, 7, 9, 15))
def test_marlin_24_keeps_by_value_not_by_code(nonzero, nibble, code):
    """A code below 8 is a negative weight, as large as its mirror image above; 8 is what may go."""
    quad = torch.full((4,), 8, dtype=torch.uint8)
    quad[list(nonzero)] = code
    linear = QuantizedLinear(quad.repeat(64, 8), torch.ones(64, 1).half(), 32)
    packed = FORMATS["marlin-24"].pack(linear)
    assert packed["meta"].unique().tolist() == [nibble * 0x1111 - (2**16 if nibble >= 8 else 0)]
    assert torch.equal(FORMATS["marlin-24"].unpack(packed, (64, 32)).codes, linear.codes)


@pytest.mark.parametrize(("name", "groups"), [*product(("marlin", "marlin-24"), (1, 2))])
def test_scale_orders(name, groups):
    order = {
        ("marlin", 1): [0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11],
        ("marlin", 2): [0, 8, 16, 24, 32, 40, 48, 56, 1, 9, 17, 25],
        ("marlin-24", 1): [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],
        ("marlin-24", 2): [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13],
    }
    scales = torch.arange(256).half()[:, None].repeat(1, groups)
    linear = QuantizedLinear(torch.full((256, 256), 8, dtype=torch.uint8), scales, 256 // groups)
    packed = FORMATS[name].pack(linear)[FORMATS[name].suffixes[-1]]
    assert packed.shape == (groups, 256)
    assert [row[:12] for row in packed.tolist()] == [order[name, groups]] * groups
