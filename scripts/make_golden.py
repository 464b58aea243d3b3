"""Write `tests/formats/golden/layouts.json`, the exact bytes of every weight format: `python scripts/make_golden.py`.

The layouts are computed here a second time, element by element, in plain integers, straight from the published index formulas
and without a line of the package. Tests hold the package to these functions on many shapes and to the committed file on two, so
that a change of both at once does not pass unnoticed. A new file is a change of format: say so in CHANGELOG.md.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "formats" / "golden" / "layouts.json"
BYTES = {"float16": 2, "int16": 2, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class Weights:
    """A quantised linear in lists: codes 0..15 [N][K], scales as float16 bit patterns [N][K/G]."""

    codes: list[list[int]]
    scales: list[list[int]]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """N, K, and the number of groups."""
        return len(self.codes), len(self.codes[0]), len(self.scales[0])


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint: its elements are bit patterns, in row-major order."""

    dtype: str
    shape: tuple[int, ...]
    elements: list[int]

    def content(self) -> bytes:
        """As it lies in a safetensors file."""
        return b"".join(element.to_bytes(BYTES[self.dtype], "little") for element in self.elements)


def gptq(weights: Weights) -> dict[str, Stored]:
    """Eight inputs in one word, zero point 8 stored as 7."""
    n_outputs, n_inputs, groups = weights.sizes
    qweight = [0] * (n_inputs // 8 * n_outputs)
    scales = [0] * (groups * n_outputs)
    for n in range(n_outputs):
        for k in range(n_inputs):
            qweight[k // 8 * n_outputs + n] |= weights.codes[n][k] << 4 * (k % 8)
        for g in range(groups):
            scales[g * n_outputs + n] = weights.scales[n][g]
    return {
        "qweight": Stored("int32", (n_inputs // 8, n_outputs), qweight),
        "qzeros": Stored("int32", (groups, n_outputs // 8), [0x77777777] * (groups * n_outputs // 8)),
        "scales": Stored("float16", (groups, n_outputs), scales),
        "g_idx": Stored("int32", (n_inputs,), [k // (n_inputs // groups) for k in range(n_inputs)]),
    }


def compressed_tensors(weights: Weights) -> dict[str, Stored]:
    """Eight inputs in one word, the last one filled up with zero bits."""
    n_outputs, n_inputs, groups = weights.sizes
    columns = (n_inputs + 7) // 8
    packed = [0] * (n_outputs * columns)
    for n in range(n_outputs):
        for k in range(n_inputs):
            packed[n * columns + k // 8] |= weights.codes[n][k] << 4 * (k % 8)
    return {
        "weight_packed": Stored("int32", (n_outputs, columns), packed),
        "weight_scale": Stored("float16", (n_outputs, groups), [bits for row in weights.scales for bits in row]),
        "weight_shape": Stored("int64", (2,), [n_outputs, n_inputs]),
    }


def marlin(weights: Weights) -> dict[str, Stored]:
    """Fragments of mma.m16n8k16."""
    n_outputs, n_inputs, groups = weights.sizes
    words = [0] * (n_inputs // 16 * 2 * n_outputs)
    for n in range(n_outputs):
        for k in range(n_inputs):
            kr, c = k % 16, n % 16
            thread = 4 * (c % 8) + kr % 8 // 2
            element = 4 * (c // 8) + kr % 2 + 2 * (kr // 8)
            word = 128 * (n // 64) + 4 * thread + n % 64 // 16
            words[k // 16 * 2 * n_outputs + word] |= weights.codes[n][k] << 4 * (element // 2 + 4 * (element % 2))
    scales = [0] * (groups * n_outputs)
    for g in range(groups):
        for place in range(n_outputs):
            if groups == 1:
                i, m = place % 32 // 8, place % 8
                source = place // 32 * 32 + 2 * i + (0, 1, 8, 9, 16, 17, 24, 25)[m]
            else:
                i, j = place % 64 // 8, place % 8
                source = place // 64 * 64 + i + 8 * j
            scales[g * n_outputs + place] = weights.scales[source][g]
    return {
        "B": Stored("int32", (n_inputs // 16, 2 * n_outputs), words),
        "s": Stored("float16", (groups, n_outputs), scales),
    }


def kept(codes: list[int]) -> tuple[int, int]:
    """The two positions that a quad keeps."""
    nonzero = [position for position in range(4) if codes[position] != 8]
    if len(nonzero) == 2:
        return nonzero[0], nonzero[1]
    return {(0,): (0, 2), (1,): (1, 2), (2,): (2, 3), (3,): (2, 3), (): (2, 3)}[tuple(nonzero)]


def meta_place(n: int, column: int, n_outputs: int) -> int:
    """Where the metadata of output n and inputs 16 column .. 16 column + 15 lies."""
    row = 64 * (n // 64) + 2 * (n % 2) + n % 8 // 4 + 32 * (n % 4 // 2) + 4 * (n % 64 // 8)
    if row % 2 == 0 and column % 2 == 1:
        row, column = row + 1, column - 1
    elif row % 2 == 1 and column % 2 == 0:
        row, column = row - 1, column + 1
    return column // 2 * 2 * n_outputs + 2 * row + column % 2


def marlin_24(weights: Weights) -> dict[str, Stored]:
    """Fragments of mma.sp.m16n8k32."""
    n_outputs, n_inputs, groups = weights.sizes
    words = [0] * (n_inputs // 32 * 2 * n_outputs)
    meta = [0] * (n_inputs // 32 * 2 * n_outputs)
    for n in range(n_outputs):
        for quad in range(n_inputs // 4):
            codes = weights.codes[n][4 * quad : 4 * quad + 4]
            low, high = kept(codes)
            meta[meta_place(n, quad // 4, n_outputs)] |= (low + 4 * high) << 4 * (quad % 4)
            for k, code in ((2 * quad, codes[low]), (2 * quad + 1, codes[high])):
                kr, r = k % 16, n % 64
                thread = 4 * (r // 8) + kr % 8 // 2
                element = 4 * (r % 8 // 4) + kr % 2 + 2 * (kr // 8)
                word = 128 * (n // 64) + 4 * thread + r % 4
                words[k // 16 * 2 * n_outputs + word] |= code << 4 * (element // 2 + 4 * (element % 2))
    scales = [0] * (groups * n_outputs)
    for g in range(groups):
        for place in range(n_outputs):
            a, d = place % 8 // 2, place % 2
            source = place if groups == 1 else place // 8 * 8 + a + 4 * d
            scales[g * n_outputs + place] = weights.scales[source][g]
    return {
        "weight_packed": Stored("int32", (n_inputs // 32, 2 * n_outputs), words),
        "meta": Stored("int16", (n_inputs // 32, 2 * n_outputs), meta),
        "scale_packed": Stored("float16", (groups, n_outputs), scales),
    }


LAYOUTS: dict[str, Callable[[Weights], dict[str, Stored]]] = {
    "gptq": gptq,
    "compressed-tensors": compressed_tensors,
    "marlin": marlin,
    "marlin-24": marlin_24,
}
GROUPED, PER_COLUMN = (256, 256, 2), (256, 128, 1)
"""(N, K, groups) of the two golden linears."""


def draw(sizes: tuple[int, int, int], seed: int = 0) -> Weights:
    """Any 2:4 weights, quads with no and with one nonzero among them, under any finite scales of either sign."""
    random = Random(seed).random  # the one method whose sequence Python promises to keep
    n_outputs, n_inputs, groups = sizes
    codes = []
    for _ in range(n_outputs):
        row = [8] * n_inputs
        for quad in range(0, n_inputs, 4):
            for position in (int(random() * 4), int(random() * 4)):
                row[quad + position] = int(random() * 16)
        codes.append(row)
    signs = [[int(random() * 2) << 15 for _ in range(groups)] for _ in range(n_outputs)]
    return Weights(codes, [[sign + int(random() * 0x7C00) for sign in row] for row in signs])


def golden() -> dict[str, dict[str, dict[str, str]]]:
    """Per format, linear and tensor: type, shape and hash of the bytes."""
    linears = {"grouped": draw(GROUPED), "per column": draw(PER_COLUMN)}
    return {
        name: {
            linear: {
                suffix: f"{stored.dtype}{list(stored.shape)} {hashlib.sha256(stored.content()).hexdigest()}"
                for suffix, stored in layout(weights).items()
            }
            for linear, weights in linears.items()
        }
        for name, layout in LAYOUTS.items()
    }


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(golden(), indent=2) + "\n", encoding="utf-8")
    print(GOLDEN)
