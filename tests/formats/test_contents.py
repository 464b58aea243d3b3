"""What a checkpoint holds, by its headers and by what its config.json leaves out."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from marlin_tools.errors import FormatError
from marlin_tools.formats import FORMATS
from marlin_tools.formats.contents import LinearShape, grid_of, ignores, keeps
from marlin_tools.formats.format import Format
from marlin_tools.quantized import QuantizedLinear

Draw = Callable[..., QuantizedLinear]


@dataclass
class Stored:
    """As much of stored linears, and of their checkpoint, as a size is read from; remembers the values that were read."""

    format: Format
    tensors: dict[str, Tensor]
    values: list[str] = field(default_factory=list)

    @property
    def checkpoint(self) -> "Stored":
        return self

    def places(self, _linear: str) -> dict[str, str]:
        return {name: name for name in self.tensors}

    def stored(self, name: str) -> Tensor:
        return self.tensors[name]

    def read(self, name: str) -> Tensor:
        self.values.append(name)
        return self.tensors[name]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("group_size", [128, 512])
def test_the_size_of_a_linear_is_known_without_its_codes(draw_linear: Draw, name: str, group_size: int) -> None:
    layout = FORMATS[name]
    stored = Stored(layout, layout.pack(draw_linear(256, 512, group_size, sparse=True)))

    assert grid_of(stored, "down") == LinearShape(256, 512, group_size)  # type: ignore[arg-type]
    assert set(stored.values) <= {"weight_shape"}


@pytest.mark.parametrize("scales", [torch.ones(3, 255), torch.ones(3, 256), torch.ones(0, 256), torch.ones(1, 128)], ids=str)
def test_scales_that_do_not_fit_are_told_with_their_linear(draw_linear: Draw, scales: Tensor) -> None:
    layout = FORMATS["gptq"]
    stored = Stored(layout, layout.pack(draw_linear(256, 512, 128)) | {"scales": scales})
    with pytest.raises(FormatError) as raised:
        grid_of(stored, "model.layers.0.down")  # type: ignore[arg-type]
    assert raised.value.message == f"`model.layers.0.down`: {scales.numel()} scales do not fit 256 outputs by 512 inputs"


def test_tensors_without_a_size_are_told_with_their_linear(draw_linear: Draw) -> None:
    layout = FORMATS["gptq"]
    stored = Stored(layout, layout.pack(draw_linear(256, 512, 128)) | {"qweight": torch.zeros(64, dtype=torch.int32)})
    with pytest.raises(FormatError, match=r"^`down`: `qweight` has shape \[64\], not two dimensions"):
        grid_of(stored, "down")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dynamic", "expected"),
    [
        ({r"-:^model\.layers\.0\.down$": {}}, {"model.layers.0.down"}),
        ({r"-:.*\.up": {}}, {"model.layers.0.up"}),
        ({r"+:.*\.up": {"bits": 4}, r".*\.down": {"bits": 4}}, set()),
        (None, set()),
    ],
)
def test_the_flat_dialect_leaves_out_by_rules_and_by_names(dynamic: dict[str, object] | None, expected: set[str]) -> None:
    names = {"model.layers.0.down", "model.layers.0.up", "lm_head"}
    config = {
        "quant_method": "gptq",
        "bits": 4,
        "dynamic": dynamic,
        "ignore": ["model.layers.0.up"],
    }  # that is the other's word

    assert expected == {name for name in names if ignores(config, name)} == {name for name in names if keeps(config, name)}
    named = config | {"modules_to_not_convert": ["lm_head"]}
    assert expected | {"lm_head"} == {name for name in names if ignores(named, name)}


def test_the_grouped_dialect_leaves_out_what_it_ignores_and_what_no_target_means() -> None:
    groups = {"group_0": {"targets": [r"re:.*\.down$"]}, "group_1": {"targets": ["model.layers.0.up"]}}
    config = {"quant_method": "compressed-tensors", "ignore": ["model.layers.1.down"], "config_groups": groups}
    names = ["model.layers.0.down", "model.layers.0.up", "model.layers.1.down", "model.layers.1.up"]

    assert ["model.layers.1.down"] == [name for name in names if ignores(config, name)]
    assert ["model.layers.1.down", "model.layers.1.up"] == [name for name in names if keeps(config, name)]
    whole = config | {"config_groups": {"group_0": {"targets": ["Linear"]}}}
    assert ["model.layers.1.down"] == [name for name in names if keeps(whole, name)]
