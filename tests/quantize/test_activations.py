"""FP8 activations from end to end: what is rounded, what is written, who refuses, and who reads it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from marlin_tools import backends
from marlin_tools.backends import BACKENDS
from marlin_tools.checkpoint.manifest import read_manifest
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.export import export
from marlin_tools.compress.quantize import QuantizeSettings, prepare_quantize
from marlin_tools.errors import FormatError, MarlinToolsError, RecipeError
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.quantized import round_inputs, rounded, rounding_inputs, rounds_inputs
from marlin_tools.verification.inspect import inspect
from marlin_tools.verification.verify import verify

Run = Callable[..., Checkpoint]
GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
GRID = GRID[GRID.isfinite()].unique()


def test_a_token_takes_the_nearest_number_of_its_own_grid() -> None:
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1e-20], [1e-3], [1.0], [300.0], [1e20]])
    for token, read in zip(x, rounded(x), strict=True):
        scale = token.abs().max() / 448
        places = token.double() / scale.double()
        nearest = GRID.double()[(places[:, None] - GRID.double()).abs().argmin(dim=1)] * scale.double()
        error, least = (read.double() - token.double()).abs(), (nearest - token.double()).abs()
        torch.testing.assert_close(error, least, rtol=0, atol=448 * 2**-23 * float(scale))  # the product is rounded to float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_zeros_stay_and_what_is_not_finite_spoils_its_token_alone(dtype: torch.dtype) -> None:
    x = torch.ones(5, 8, dtype=dtype)
    x[1], x[2, 3], x[3, 3] = 0, float("inf"), float("nan")
    read = rounded(x)
    assert dtype == read.dtype
    assert torch.equal(x[[0, 1, 4]], read[[0, 1, 4]])
    assert bool(read[[2, 3]].isnan().all())
    assert (0, 8) == rounded(x[:0]).shape


def test_a_linear_rounds_once_and_gradients_pass() -> None:
    linear = nn.Linear(16, 4)
    assert not rounds_inputs(linear)
    assert linear is round_inputs(round_inputs(linear))
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.linear(rounded(x), linear.weight, linear.bias)
    assert torch.equal(expected, linear(x))
    x.requires_grad_()
    out = linear(x)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    torch.testing.assert_close(linear.weight.sum(dim=0).expand(3, -1), x.grad)


def test_linears_round_within_and_read_everything_afterwards() -> None:
    linear, x = nn.Linear(16, 4), torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    before = linear(x)
    with rounding_inputs([linear]):
        assert torch.equal(linear(x), nn.functional.linear(rounded(x), linear.weight, linear.bias))
        assert rounds_inputs(linear)
    assert torch.equal(before, linear(x))
    assert not rounds_inputs(linear)


def test_config_json_says_it_as_vllm_reads_it(tiny_llama: Path, run: Run) -> None:
    result = run(tiny_llama, activations="fp8")
    group = json.loads((result.path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True} == group[
        "input_activations"
    ]
    assert "pack-quantized" == group["format"]
    assert ("int", 4, "group", 128) == tuple(group["weights"][key] for key in ("type", "num_bits", "strategy", "group_size"))
    manifest = read_manifest(result.path)
    assert manifest is not None
    assert "fp8" == manifest["settings"]["activations"]


def test_sixteen_bits_are_written_as_before(tiny_llama: Path, run: Run) -> None:
    group = json.loads((run(tiny_llama).path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert {"targets", "weights", "input_activations", "output_activations"} == group.keys()
    assert group["input_activations"] is None


def test_signed_scales_pass_what_vllm_does_to_them(tiny_llama: Path, run: Run) -> None:
    """Its kernel for Hopper has two levels: a float32 scale for each output, and for each group an e4m3 one of at most 56."""
    linears = StoredLinears(run(tiny_llama, activations="fp8"))
    negative = 0
    for scales in (linears.read(name).scales.float() for name in linears.names):
        output = scales.abs().amax(dim=1, keepdim=True) / 448
        group = ((scales / output).to(torch.float8_e4m3fn).float() / 8).to(torch.float8_e4m3fn).float()
        assert torch.equal(scales.sign(), group.sign())
        assert float(((group * 8 * output - scales) / scales).abs().max()) <= 2**-4
        assert float(group.abs().max()) * 8 <= 448  # times a code it is still a number of e4m3
        negative += int((scales < 0).sum())
    assert negative > 0


def test_positive_scales_are_there_when_asked_for(tiny_llama: Path, run: Run) -> None:
    linears = StoredLinears(run(tiny_llama, activations="fp8", negative_scales=False))
    assert all(bool((linears.read(name).scales > 0).all()) for name in linears.names)


@pytest.mark.parametrize("more", [{"preset": "fast"}, {"preset": "default"}, {"preset": "fast", "tuning": {"iters": 2}}])
def test_the_stored_reference_is_what_the_rounded_model_computes(tiny_qwen2: Path, run: Run, more: dict) -> None:
    """Made by the stream, computed again by hooks on transformers' own model: `verify` and `load` follow both."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    result = run(tiny_qwen2, activations="fp8", ignore=(".*layers.0.mlp.*",), **more)
    reference = load_file(result.path / "verify" / "reference.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32).eval()
    linears = StoredLinears(result)
    assert 11 == len(linears.names)
    for name in linears.names:
        linear = model.get_submodule(name)
        linear.weight.data.copy_(linears.read(name).dequantize())
        linear.register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    with torch.no_grad():
        expected = model(reference["tokens"][None]).logits[0]
        torch.testing.assert_close(reference["logits"], expected, rtol=1e-3, atol=1e-3)
        for backend in ("reference", "reference-packed"):
            found = backends.load(result, device="cpu", backend=backend)(reference["tokens"][None]).logits[0]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        plain = backends.load(result, device="cpu", activations="16bit")(reference["tokens"][None]).logits[0]
    assert float((plain - expected).abs().max()) > 1e-2
    assert verify(result, device="cpu").ok


def test_any_model_is_run_either_way(tiny_llama: Path, run: Run) -> None:
    """What config.json says is what is done, unless something else is asked for."""
    plain = run(tiny_llama)
    tokens, said = torch.arange(2, 40)[None], []
    with torch.no_grad():
        as_stored = backends.load(plain, device="cpu", emit=said.append)(tokens).logits
        as_fp8 = backends.load(plain, device="cpu", activations="fp8", emit=said.append)(tokens).logits
        config = plain.path / "config.json"
        content = json.loads(config.read_text())
        group = content["quantization_config"]["config_groups"]["group_0"]
        group["input_activations"] = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
        config.write_text(json.dumps(content))
        assert torch.equal(as_fp8, backends.load(plain.path, device="cpu")(tokens).logits)
        assert torch.equal(as_stored, backends.load(plain.path, device="cpu", activations="16bit")(tokens).logits)
    assert not torch.equal(as_stored, as_fp8)
    assert ["16bit", "fp8"] == [event.data["activations"] for event in said if "activations" in event.data]
    assert ["FP8" in event.text for event in said if "activations" in event.data] == [False, True]


def test_torch_int4_rounds_as_well(tiny_llama: Path, run: Run) -> None:
    plain = run(tiny_llama)
    loaded = backends.load(plain, device="cpu", backend="torch-int4", activations="fp8")
    assert all(rounds_inputs(loaded.get_submodule(name)) for name in StoredLinears(plain).names)
    assert not rounds_inputs(loaded.lm_head)


def test_every_backend_has_a_way() -> None:
    for name, backend in BACKENDS.items():
        assert callable(backend.function("fp8")), name
        assert backend.function("fp8") is not backend.function("16bit"), name


@pytest.mark.parametrize("more", [{"preset": "default"}, {"preset": "fast", "tuning": {"iters": 2}}, {"preset": "rtn"}])
def test_codes_and_scales_are_those_of_16_bits(tiny_llama: Path, run: Run, more: dict) -> None:
    plain, fp8 = (StoredLinears(run(tiny_llama, each, activations=each, **more)) for each in ("16bit", "fp8"))
    for name in plain.names:
        assert torch.equal(plain.read(name).codes, fp8.read(name).codes)
        assert torch.equal(plain.read(name).scales, fp8.read(name).scales)


def test_a_run_begun_without_is_not_continued(tiny_llama: Path, run: Run) -> None:
    plain = read_manifest(run(tiny_llama, "plain").path)
    fp8 = read_manifest(run(tiny_llama, "fp8", activations="fp8").path)
    assert plain is not None
    assert fp8 is not None
    assert plain["fingerprint"] != fp8["fingerprint"]
    with pytest.raises(MarlinToolsError, match="plain"):
        run(tiny_llama, "plain", activations="fp8")


@pytest.mark.parametrize("name", ["gptq", "marlin", "marlin-24"])
def test_formats_that_cannot_say_it_are_refused_before_the_work(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    directly, later = QuantizeSettings(format=name, activations="fp8"), QuantizeSettings(activations="fp8")
    for settings, exported in ((directly, ()), (later, (name,))):
        with pytest.raises(FormatError, match=f"`{name}` cannot say that activations are FP8") as refusal:
            prepare_quantize(tiny_llama, settings, 100, 10, exported)
        assert "compressed-tensors" in str(refusal.value.hint)
    assert [tiny_llama] == list(tmp_path.iterdir())


@pytest.mark.parametrize("sparsity", ["2:4", "keep"])
def test_sparse_models_are_refused(tiny_llama: Path, sparsity: str) -> None:
    with pytest.raises(RecipeError, match="no kernel multiplies 2:4"):
        prepare_quantize(tiny_llama, QuantizeSettings(sparsity=sparsity, activations="fp8"), 100, 10)


def test_export_keeps_the_scheme_or_refuses(tiny_llama: Path, run: Run, tmp_path: Path) -> None:
    result = run(tiny_llama, activations="fp8")
    copy = export(result, "compressed-tensors", tmp_path / "copy")
    assert result.config["quantization_config"] == copy.config["quantization_config"]
    with pytest.raises(FormatError, match="`gptq` cannot say"):
        export(result, "gptq", tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_inspect_knows(tiny_llama: Path, run: Run) -> None:
    facts = inspect(run(tiny_llama, activations="fp8"))
    assert "fp8" == facts["activations"]
    engines = {each["engine"]: each for each in facts["engines"]}
    assert "float16" in engines["vLLM"]["verdict"]
    assert not engines["SGLang"]["loads"]
    assert engines["marlin-tools"]["loads"]


def test_choices_that_nobody_would_follow_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="holds no quantised linears"):
        backends.load(tiny_llama, device="cpu", activations="fp8")
