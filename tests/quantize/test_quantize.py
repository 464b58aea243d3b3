"""The stage from end to end on tiny models: what it writes, that it is repeatable, and that every setting has an effect."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_tools.algorithms import GPTQ, PRESETS
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, prepare_quantize, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import FormatError, ModelError, RecipeError
from marlin_tools.events import Event
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.stream.inventory import take_linears

Run = Callable[..., Checkpoint]
Digest = Callable[[Path], dict[str, str]]


def test_result_is_a_complete_model(tiny_llama: Path, run: Run) -> None:
    result = run(tiny_llama)
    manifest = read_manifest(result.path)

    assert manifest is not None
    assert len(StoredLinears(result).names) == len(manifest["linears"]) == 14
    assert {"config.json", "manifest.json", "model.safetensors.index.json", "tokenizer.json"} <= {
        file.name for file in result.path.iterdir()
    }
    assert not list(result.path.glob("*.tmp"))
    assert not (result.path.parent / "out.partial").exists()
    assert manifest["calibration"]["tokens"] == 384
    assert manifest["model"]["fingerprint"] == Checkpoint.open(tiny_llama).fingerprint
    assert all(0 < linear["output_error"] < 0.05 for linear in manifest["linears"])
    assert manifest["times"]["real"]["seconds"] > 0


def test_what_is_not_a_target_is_copied_bit_for_bit(tiny_llama: Path, run: Run) -> None:
    source, result = Checkpoint.open(tiny_llama), run(tiny_llama)
    for name in source.names():
        if "proj" not in name:
            assert torch.equal(source.read(name), result.read(name)), name


@pytest.mark.parametrize("preset", ["default", "marlin"])
def test_two_runs_give_the_same_bytes(tiny_llama: Path, run: Run, digest: Digest, preset: str) -> None:
    assert digest(run(tiny_llama, "a", preset=preset).path) == digest(run(tiny_llama, "b", preset=preset).path)


def test_a_result_inside_of_its_model_harms_neither(tiny_llama: Path, run: Run, digest: Digest) -> None:
    def source() -> tuple[str, list[Path], set[tuple[str, str]]]:
        model = Checkpoint.open(tiny_llama)
        files = {each for each in digest(tiny_llama).items() if not each[0].startswith("out/")}
        return model.fingerprint, model.companions(), files

    before, beside = source(), digest(run(tiny_llama, "beside").path)
    assert digest(run(tiny_llama, str(tiny_llama / "out")).path) == beside
    assert digest(run(tiny_llama, str(tiny_llama / "out"), overwrite=True).path) == beside
    assert source() == before


def test_the_stored_reference_is_what_the_model_computes(tiny_llama: Path, run: Run) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    result = run(tiny_llama, preset="default")
    reference = load_file(result.path / "verify" / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    linears = StoredLinears(result)
    for name in linears.names:
        model.get_submodule(name).weight.data.copy_(linears.read(name).dequantize())
    with torch.no_grad():
        logits = model(reference["tokens"][None]).logits[0]
    torch.testing.assert_close(reference["logits"], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma2"])
def test_every_family_runs(tiny_model: Callable[..., Path], run: Run, model_type: str) -> None:
    assert len(StoredLinears(run(tiny_model(model_type), preset="default")).names) == 14


def test_a_single_file_and_shards_give_the_same_codes(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16).save_pretrained(sharded, max_shard_size="600KB")
    for file in tiny_llama.glob("tokenizer*"):
        (sharded / file.name).write_bytes(file.read_bytes())
    assert len(list(sharded.glob("*.safetensors"))) > 2
    one, many = StoredLinears(run(tiny_llama, "one")), StoredLinears(run(sharded, "many"))
    for name in one.names:
        assert torch.equal(one.read(name).codes, many.read(name).codes)


@pytest.mark.parametrize(
    ("changes", "effect"),
    [
        ({"preset": "rtn"}, lambda q: q.scales.min() > 0),
        ({"negative_scales": False}, lambda q: q.scales.min() > 0),
        ({"negative_scales": True}, lambda q: q.scales.min() < 0),
        ({"group_size": -1}, lambda q: q.group_size == q.shape[1]),
        ({"group_size": 64}, lambda q: q.group_size == 64),
    ],
)
def test_settings_change_the_result(tiny_llama: Path, run: Run, changes: dict[str, Any], effect: Callable[[Any], bool]) -> None:
    linears = StoredLinears(run(tiny_llama, **changes))
    assert all(effect(linears.read(name)) for name in linears.names)


def test_damping_and_algorithm_override_the_preset() -> None:
    assert QuantizeSettings(preset="marlin", damp=0.05).solver == PRESETS["marlin"].model_copy(update={"damp": 0.05})
    assert QuantizeSettings(algorithm=GPTQ(polish=7)).solver == GPTQ(polish=7)
    with pytest.raises(RecipeError, match="round-to-nearest"):
        _ = QuantizeSettings(preset="rtn", damp=0.05).solver
    with pytest.raises(RecipeError, match=r"contradicts|conditional"):
        _ = QuantizeSettings(preset="marlin", negative_scales=True).solver
    with pytest.raises(RecipeError, match="know groups that divide 128 and per column, not of 96"):
        PRESETS["marlin"].check_group_size(96, 384)
    with pytest.raises(ValueError, match="unknown preset"):
        QuantizeSettings(preset="defualt")


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors", "marlin"])
def test_codes_do_not_depend_on_the_format(tiny_llama: Path, run: Run, format_name: str) -> None:
    base, other = StoredLinears(run(tiny_llama, "base")), StoredLinears(run(tiny_llama, "other", format=format_name))
    for name in base.names:
        assert torch.equal(base.read(name).codes, other.read(name).codes)
        assert torch.equal(base.read(name).scales, other.read(name).scales)


def test_ignored_linears_keep_their_weights(tiny_llama: Path, run: Run) -> None:
    source, result = Checkpoint.open(tiny_llama), run(tiny_llama, ignore=("down_proj$", r"layers\.0\.self_attn\.q_proj"))
    manifest = json.loads((result.path / "manifest.json").read_text())

    assert len(StoredLinears(result).names) == 11
    assert set(manifest["kept"]) == {
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.0.self_attn.q_proj",
    }
    assert result.quantization is not None
    assert set(manifest["kept"]) <= set(result.quantization["ignore"])
    for name in manifest["kept"]:
        assert torch.equal(source.read(f"{name}.weight"), result.read(f"{name}.weight"))


def test_bfloat16_models_get_scales_that_bfloat16_holds(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(model)
    for file in tiny_llama.glob("tokenizer*"):
        (model / file.name).write_bytes(file.read_bytes())
    result = run(model, preset="default")
    linears = StoredLinears(result)

    assert result.dtype == torch.bfloat16
    assert result.read(f"{linears.names[0]}.weight_scale").dtype == torch.bfloat16
    assert all(torch.equal(q.scales, q.scales.bfloat16().half()) for q in map(linears.read, linears.names))


def test_the_same_run_again_does_nothing(tiny_llama: Path, run: Run, tokens: TokenSet, tmp_path: Path) -> None:
    run(tiny_llama)
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    events: list[Event] = []
    quantize(tiny_llama, tokens, QuantizeSettings(preset="fast", device="cpu"), tmp_path / "out", emit=events.append)

    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert any("already holds this result" in event.text for event in events)


def test_forecast_is_known_before_and_compared_after(tiny_llama: Path, run: Run) -> None:
    settings = QuantizeSettings(preset="default", device="cpu")
    plan = prepare_quantize(tiny_llama, settings, tokens=384, longest=64)
    real = json.loads((run(tiny_llama, preset="default").path / "manifest.json").read_text())["times"]

    assert len(plan.inventory.targets) == 14
    assert {name for name, _ in plan.forecast.lines()} == {"linears", "device", "host memory", "disk", "time"}
    assert real["forecast"].keys() == real["real"].keys()
    larger = prepare_quantize(tiny_llama, settings, tokens=384_000, longest=2048).forecast
    assert larger.host_gb > plan.forecast.host_gb
    assert larger.seconds > plan.forecast.seconds


@pytest.mark.parametrize(
    ("formats", "expected"),
    [(("gptq",), 64), (("gptq", "compressed-tensors"), 64), (("marlin",), "320 inputs are not a multiple of 128")],
)
def test_auto_regards_every_format(tiny_model: Callable[..., Path], formats: tuple[str, ...], expected: int | str) -> None:
    settings = QuantizeSettings(preset="rtn", group_size="auto", format=formats[0], device="cpu")
    inventory = take_linears(Checkpoint.open(tiny_model("llama", intermediate_size=320)), ())
    if isinstance(expected, int):
        assert {expected} == set(settings.sized(inventory, *formats[1:]).values())
    else:
        with pytest.raises(FormatError, match=expected):
            settings.sized(inventory, *formats[1:])


def test_a_hint_can_be_pasted_into_a_shell(tiny_llama: Path, tmp_path: Path) -> None:
    made = quantize(tiny_llama, None, QuantizeSettings(preset="rtn", device="cpu"), tmp_path / "a b")
    with pytest.raises(ModelError, match="is already quantised") as caught:
        take_linears(made, ())
    assert f"`marlin-tools export '{tmp_path}/a b' --format NAME` converts it" in str(caught.value.hint)


@pytest.mark.parametrize("size", ["abc", 1.5, True, None, "128.0", 0, "0", -2])
def test_what_is_no_group_size(size: object) -> None:
    with pytest.raises(ValueError, match="`group_size` is no flag" if size is True else "a group size is 128, 64, 32"):
        QuantizeSettings.model_validate({"group_size": size})
