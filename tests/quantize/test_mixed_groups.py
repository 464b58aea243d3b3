"""`--group-size auto` gives each linear the largest group that fits it, and everybody who reads the result gets it right."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from marlin_tools.backends import load
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.export import export
from marlin_tools.compress.quantize import QuantizeSettings, prepare_quantize
from marlin_tools.errors import FormatError, RecipeError
from marlin_tools.formats.contents import Contents
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.plan import plan
from marlin_tools.serving.transformers import register, unregister
from marlin_tools.stream.inventory import take_linears
from marlin_tools.verification.checks import check_config
from marlin_tools.verification.engines import served_as
from marlin_tools.verification.inspect import inspect
from marlin_tools.verification.verify import verify

Run = Callable[..., Checkpoint]
DOWN = [f"model.layers.{block}.mlp.down_proj" for block in range(2)]


@pytest.fixture
def narrow(tiny_model: Callable[..., Path]) -> Path:
    """256 inputs everywhere but in `down_proj`, whose 320 come in 64s."""
    return tiny_model("llama", intermediate_size=320)


@pytest.fixture
def mixed(narrow: Path, run: Run) -> Checkpoint:
    """That model in groups of two sizes."""
    return run(narrow, "mixed", preset="rtn", group_size="auto")


def groups_of(checkpoint: Checkpoint) -> dict[str, Any]:
    groups: dict[str, Any] = checkpoint.config["quantization_config"]["config_groups"]
    return groups


def test_each_linear_has_the_largest_that_fits(mixed: Checkpoint) -> None:
    linears, manifest = StoredLinears(mixed), read_manifest(mixed.path)
    assert manifest is not None
    expected = {name: 64 if name in DOWN else 128 for name in linears.names}

    assert 14 == len(expected)
    assert expected == {name: linears.read(name).group_size for name in linears.names}
    assert expected == {record["name"]: record["group_size"] for record in manifest["linears"]}
    assert "auto" == manifest["settings"]["group_size"]
    assert [64, 128] == inspect(mixed)["group_sizes"]
    assert verify(mixed.path).ok


def test_each_size_has_an_entry_with_short_targets(mixed: Checkpoint) -> None:
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "dynamic": False, "actorder": None}
    wide = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    expected = {"group_0": (128, {rf"re:.*\.{name}$" for name in wide}), "group_1": (64, {r"re:.*\.down_proj$"})}

    assert expected == {key: (each["weights"]["group_size"], set(each["targets"])) for key, each in groups_of(mixed).items()}
    assert all(scheme.items() <= each["weights"].items() for each in groups_of(mixed).values())


def by_hand(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The weights, from the layout alone: nibbles along the inputs, a scale for as many of them as come out even."""
    tensors: dict[str, torch.Tensor] = {}
    for file in checkpoint.path.glob("*.safetensors"):
        tensors |= load_file(file)
    weights = {}
    for name in [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]:
        words, scales = tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_scale"].float()
        codes = torch.stack([(words >> 4 * place) & 15 for place in range(8)], dim=-1).flatten(1) - 8
        weights[name] = codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)
    return weights


@torch.no_grad()
def test_transformers_and_our_backends_compute_with_the_dequantized_weights(narrow: Path, mixed: Checkpoint) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.arange(64).view(2, 32)
    dense = AutoModelForCausalLM.from_pretrained(narrow, dtype=torch.float32).eval()
    weights = by_hand(mixed)
    for name, weight in weights.items():
        dense.get_submodule(name).weight.copy_(weight)
    expected = dense(ids).logits
    unregister()  # compressed-tensors on its own
    try:
        theirs = AutoModelForCausalLM.from_pretrained(mixed.path, dtype=torch.float32).eval()
    finally:
        register()
    assert all(
        theirs.get_submodule(name).quantization_scheme.weights.group_size == (64 if name in DOWN else 128) for name in weights
    )
    theirs = torch.nn.Module.float(theirs)  # what was dequantised too
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))
    ours = AutoModelForCausalLM.from_pretrained(mixed.path, dtype=torch.float32).eval()
    assert not hasattr(ours.get_submodule(DOWN[0]), "quantization_scheme")
    for model in (ours, load(mixed, device="cpu", backend="reference")):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_config_that_swaps_the_sizes_is_found(mixed: Checkpoint) -> None:
    config = json.loads((mixed.path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"], groups["group_1"]["targets"] = groups["group_1"]["targets"], groups["group_0"]["targets"]
    (mixed.path / "config.json").write_text(json.dumps(config))
    found = check_config(Checkpoint.open(mixed.path))

    assert not found.ok
    assert f"`{DOWN[0]}` has groups of 64, `quantization_config` says 128" in found.detail


def test_a_copy_is_the_same_and_formats_of_one_size_refuse(mixed: Checkpoint, tmp_path: Path) -> None:
    copy = export(mixed, "compressed-tensors", tmp_path / "copy")

    assert mixed.config == copy.config
    assert all(torch.equal(mixed.read(name), copy.read(name)) for name in mixed.names())
    assert served_as(Contents(mixed)) is None
    for name in ("gptq", "marlin", "marlin-24"):
        with pytest.raises(FormatError, match="mixes group sizes: 64, 128") as refusal:
            export(mixed, name, tmp_path / name)
        assert f"`{name}` can name only one" in str(refusal.value.hint)


def test_a_finished_run_is_known_again(narrow: Path, mixed: Checkpoint, run: Run) -> None:
    before = (mixed.path / "manifest.json").stat().st_mtime_ns
    run(narrow, "mixed", preset="rtn", group_size="auto")

    assert before == (mixed.path / "manifest.json").stat().st_mtime_ns


@pytest.mark.parametrize("settings", [{"preset": "default"}, {"preset": "rtn", "sparsity": "2:4"}])
def test_calibrated_scales_and_zeros_of_2_4(narrow: Path, run: Run, settings: dict[str, str]) -> None:
    checkpoint = run(narrow, group_size="auto", **settings)
    linears = StoredLinears(checkpoint)

    assert {64, 128} == {linears.read(name).group_size for name in linears.names}
    assert ("sparsity" in settings) == all(linears.read(name).is_2_4() for name in linears.names)
    assert verify(checkpoint.path).ok


@pytest.mark.parametrize(
    ("settings", "later"),
    [({"format": "gptq"}, ()), ({}, ("gptq",)), ({"activations": "fp8"}, ()), ({"ignore": ("[qkvo]_proj|gate|up",)}, ())],
)
def test_where_one_size_has_to_do_it_is_as_if_asked_for(
    narrow: Path, run: Run, digest: Callable[[Path], dict[str, str]], settings: dict[str, Any], later: tuple[str, ...]
) -> None:
    chosen = QuantizeSettings(preset="rtn", group_size="auto", device="cpu", **settings)
    assert {64} == set(prepare_quantize(narrow, chosen, 0, 0, later).group_sizes.values())
    if not later:
        auto, asked = (run(narrow, str(size), preset="rtn", group_size=size, **settings) for size in ("auto", 64))
        assert digest(asked.path) == digest(auto.path)


def test_models_that_128_fits_are_as_they_were(tiny_llama: Path, run: Run, digest: Callable[[Path], dict[str, str]]) -> None:
    auto, asked = (run(tiny_llama, str(size), preset="rtn", group_size=size) for size in ("auto", 128))

    assert digest(asked.path) == digest(auto.path)
    assert {"group_0": ["Linear"]} == {name: group["targets"] for name, group in groups_of(auto).items()}


def test_what_fits_nowhere_and_what_the_preset_does_not_know(tiny_model: Callable[..., Path], narrow: Path) -> None:
    odd = take_linears(Checkpoint.open(tiny_model("llama", intermediate_size=328)), ())
    with pytest.raises(FormatError, match="down_proj`: 328 inputs are not a multiple") as refusal:
        QuantizeSettings(preset="rtn", group_size="auto").sized(odd)
    assert "`--group-size -1`" in str(refusal.value.hint)
    with pytest.raises(FormatError, match="320 inputs are not a multiple of 128"):
        QuantizeSettings(preset="rtn", group_size="auto", format="marlin").sized(take_linears(Checkpoint.open(narrow), ()))
    with pytest.raises(RecipeError, match="not of 96"):
        QuantizeSettings(preset="marlin", group_size=96).sized(take_linears(Checkpoint.open(narrow), ()))


def test_the_paper_s_recipe_with_two_sizes(run: Callable[..., Checkpoint], narrow: Path) -> None:
    out = run(narrow, preset="marlin", group_size="auto")
    records = json.loads((out.path / "manifest.json").read_text())["linears"]
    assert {(record["shape"][1], record["group_size"]) for record in records} == {(256, 128), (320, 64)}
    assert all(record["output_error"] < 0.05 for record in records)


@pytest.mark.parametrize(("inner", "said"), [(320, "128 for 12 linears, 64 for 2"), (512, "128")])
def test_a_dry_run_counts_them(tiny_model: Callable[..., Path], inner: int, said: str) -> None:
    stage = {"stage": "quantize", "preset": "rtn", "group_size": "auto"}
    model = tiny_model("llama", intermediate_size=inner)
    (step,) = plan(Recipe.model_validate({"name": "x", "model": str(model), "stages": [stage]}), dry=True).steps

    assert said == dict(step.facts)["group size"]
