"""Checkpoints that their makers stored in 8 or 4 bits, against the 16-bit models that transformers makes of them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from marlin_tools.backends import load
from marlin_tools.checkpoint.cards import Card
from marlin_tools.checkpoint.dequantized import DequantizedView, dequantized
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.errors import FormatError, ModelError
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.verification.inspect import inspect, rows


def rewritten(
    source: Path, folder: Path, change: Callable[[dict[str, Tensor]], None], scheme: dict[str, object] | None
) -> Path:
    """The model with other tensors, and a quantization_config that says so."""
    folder.mkdir()
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16", "quantization_config": scheme}))
    return folder


def to_fp8(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        scales = torch.rand(-(-weight.shape[0] // 48), -(-weight.shape[1] // 48)) + 0.5
        tensors[name + "_scale_inv"] = scales
        tensors[name] = weight.to(torch.float8_e4m3fn)


FP8 = {"quant_method": "fp8", "weight_block_size": [48, 48], "activation_scheme": "dynamic"}


def test_fp8_blocks_are_codes_times_their_scale(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten(made("qwen3_moe"), tmp_path / "fp8", to_fp8, FP8)
    raw, view = load_file(path / "model.safetensors"), dequantized(Checkpoint.open(path))
    assert isinstance(view, DequantizedView)
    assert view.quantization is None
    assert view.names() == sorted(name for name in raw if not name.endswith("_scale_inv"))
    for name in view.names():
        value = view.read(name)
        assert value.dtype == torch.bfloat16
        assert tuple(value.shape) == view.shape(name)
        if name.endswith("_proj.weight"):
            codes, scales = raw[name].float(), raw[name + "_scale_inv"]
            expected = torch.stack(
                [torch.stack([c * scales[i // 48, j // 48] for j, c in enumerate(row)]) for i, row in enumerate(codes[:60])]
            )
            assert torch.equal(value[:60], expected.bfloat16())
            break


@torch.no_grad()
def test_pruned_mxfp4_is_a_model_in_16_bits(
    made: Callable[[str], Path], eager: Callable[[str, Path], torch.nn.Module], tmp_path: Path
) -> None:
    path = rewritten(made("gpt_oss"), tmp_path / "mxfp4", to_mxfp4, {"quant_method": "mxfp4"})
    out, view = prune(path, None, PruneSettings(preset="magnitude"), tmp_path / "out"), dequantized(Checkpoint.open(path))
    assert out.quantization is None
    assert out.names() == view.names()
    ids = torch.arange(2, 40)[None]
    ours, theirs = (model(input_ids=ids).logits for model in (load(out, device="cpu"), eager("gpt_oss", out.path)))
    torch.testing.assert_close(ours.float(), theirs, rtol=0.1, atol=0.02 * float(theirs.abs().max()))


def scaled_by(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    """The same with scales of another type."""

    def change(tensors: dict[str, Tensor]) -> None:
        to_fp8(tensors)
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items() if name.endswith("_scale_inv")})

    return change


def to_fp8_at_once(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[f"{name}_scale_inv"] = torch.tensor(0.37, dtype=torch.bfloat16)
        tensors[f"{name.removesuffix('.weight')}.activation_scale"] = torch.tensor(2.0)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def test_fp8_with_one_scale(made: Callable[[str], Path], tmp_path: Path) -> None:
    scheme = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    path = rewritten(made("llama"), tmp_path / "fp8", to_fp8_at_once, scheme)
    raw, view = load_file(path / "model.safetensors"), dequantized(Checkpoint.open(path))
    assert view.names() == sorted(name for name in raw if not name.endswith("_scale_inv") and "activation_scale" not in name)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(view.read(name), (raw[name].float() * torch.tensor(0.37).bfloat16().float()).bfloat16())
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert not any("activation_scale" in each for each in out.names())


def test_a_model_in_fp8_is_quantized_as_if_it_were_not(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten(made("llama"), tmp_path / "fp8", to_fp8, FP8)
    view, wide = dequantized(Checkpoint.open(path)), tmp_path / "wide"
    wide.mkdir()
    save_file({name: view.read(name) for name in view.names()}, wide / "model.safetensors", metadata={"format": "pt"})
    (wide / "config.json").write_text(json.dumps(view.config))
    settings = QuantizeSettings(preset="rtn", group_size=32, ignore=("k_proj",))
    ours, expected = (quantize(each, None, settings, tmp_path / f"{each.name}-int4") for each in (path, wide))
    assert ours.names() == expected.names()
    assert all(torch.equal(ours.read(name), expected.read(name)) for name in ours.names())
    assert ours.read("model.layers.0.self_attn.k_proj.weight").dtype == torch.bfloat16


def test_fp8_experts_in_one_tensor(made: Callable[[str], Path], tmp_path: Path) -> None:
    """As Qwen3-VL's may be: blocks of codes [E, N, K] do not go beyond an expert."""

    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            experts, rows, columns = tensors[name].shape
            tensors[name + "_scale_inv"] = torch.rand(experts, -(-rows // 48), -(-columns // 48)) + 0.5
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    path = rewritten(made("qwen3_vl_moe"), tmp_path / "fp8", change, FP8)
    raw, view = load_file(path / "model.safetensors"), dequantized(Checkpoint.open(path))
    for name in (name for name in raw if name.endswith(("gate_up_proj", "down_proj"))):
        value, scales = view.read(name), raw[name + "_scale_inv"]
        assert torch.equal(value[3, 50:90, 50:90], (raw[name][3, 50:90, 50:90].float() * scales[3, 1, 1]).bfloat16())
    assert quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out").names()


@pytest.mark.parametrize("scheme", [FP8, None])
def test_a_type_that_config_json_leaves_out_is_that_of_the_weights(
    made: Callable[[str], Path], tmp_path: Path, scheme: dict[str, object] | None
) -> None:
    """As in MiniMax M2, whose router is in 32 bits."""

    def change(tensors: dict[str, Tensor]) -> None:
        if scheme is not None:
            to_fp8(tensors)
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if name.endswith("mlp.gate.weight")}

    path = rewritten(made("qwen3_moe"), tmp_path / "source", change, scheme)
    config = {k: v for k, v in json.loads((path / "config.json").read_text()).items() if k != "dtype" and v is not None}
    (path / "config.json").write_text(json.dumps(config))
    assert Checkpoint.open(path).dtype == dequantized(Checkpoint.open(path)).dtype == torch.bfloat16
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert out.dtype == torch.bfloat16
    assert {out.read(name).dtype for name in out.names() if name.endswith("weight_scale")} == {torch.bfloat16}
    assert Card(config, "card").dtype == torch.bfloat16


def to_mxfp4(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)


def test_mxfp4_is_what_transformers_reads(made: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = rewritten(made("gpt_oss"), tmp_path / "mxfp4", to_mxfp4, {"quant_method": "mxfp4"})
    raw, view = load_file(path / "model.safetensors"), dequantized(Checkpoint.open(path))
    for kind in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{kind}"
        expected = convert_moe_packed_tensors(raw[f"{name}_blocks"], raw[f"{name}_scales"])
        assert torch.equal(view.read(name), expected)
        assert view.shape(name) == tuple(expected.shape)
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert "model.layers.1.mlp.experts.3.up_proj" in StoredLinears(out).names
    assert torch.equal(
        out.read("model.layers.0.mlp.experts.2.gate_proj.bias"),
        raw["model.layers.0.mlp.experts.gate_up_proj_bias"][2, ::2],
    )


@pytest.mark.parametrize(
    ("change", "scheme", "message"),
    [
        (lambda tensors: (to_fp8(tensors), tensors.pop("model.layers.0.mlp.up_proj.weight_scale_inv")), FP8, "but no"),
        (to_fp8, {"quant_method": "fp8"}, "weight_block_size"),
        (to_fp8, FP8 | {"weight_block_size": [64, 64]}, "with scales"),
        (to_fp8, FP8 | {"weight_block_size": [True, 48]}, "not two sizes"),
        (scaled_by(torch.uint8), FP8, "is stored as uint8, which is no scale here"),
        (scaled_by(torch.int32), FP8, "is stored as int32, which is no scale here"),
        (to_fp8, None, "stored as float8_e4m3fn, and no `quantization_config` says"),
        (lambda _tensors: None, {"quant_method": "bitsandbytes"}, "already quantised"),
    ],
)
def test_what_cannot_be_expanded_is_refused_by_name(
    made: Callable[[str], Path],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], None],
    scheme: dict[str, object] | None,
    message: str,
) -> None:
    path = rewritten(made("llama"), tmp_path / "odd", change, scheme)
    with pytest.raises(ModelError, match=message):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda name, tensors: tensors.update({f"{name}_blocks": tensors[f"{name}_blocks"].flatten(2)}),
        lambda name, tensors: tensors.update({f"{name}_blocks": tensors[f"{name}_blocks"].int()}),
        lambda name, tensors: tensors.update({f"{name}_scales": tensors[f"{name}_scales"].float()}),
        lambda name, tensors: tensors.update({f"{name}_scales": tensors[f"{name}_scales"][:, :1].clone()}),
    ],
)
def test_mxfp4_of_another_shape_or_type_is_refused(made: Callable[[str], Path], tmp_path: Path, change: Any) -> None:
    def damaged(tensors: dict[str, Tensor]) -> None:
        to_mxfp4(tensors)
        change("model.layers.1.mlp.experts.down_proj", tensors)

    path = rewritten(made("gpt_oss"), tmp_path / "odd", damaged, {"quant_method": "mxfp4"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj` is \[.*\] with exponents \["):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")


def test_experts_that_are_no_numbers_are_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    def damaged(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        tensors[name] = tensors[name].to(torch.int32)

    with pytest.raises(ModelError, match="gate_up_proj` is stored as int32, weights are floating-point"):
        Checkpoint.open(rewritten(made("gpt_oss"), tmp_path / "odd", damaged, None))


def test_the_name_of_fused_experts_is_not_that_of_a_linear(made: Callable[[str], Path], tmp_path: Path) -> None:
    settings = QuantizeSettings(preset="rtn", group_size=32, ignore=("experts.gate_up_proj",))
    with pytest.raises(ModelError, match=r"`--ignore experts.gate_up_proj` matches nothing") as caught:
        quantize(made("gpt_oss"), None, settings, tmp_path / "out")
    assert "names look like" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("model_type", "change", "scheme"), [("llama", to_fp8, FP8), ("gpt_oss", to_mxfp4, {"quant_method": "mxfp4"})]
)
def test_inspect_says_what_a_source_is_and_what_it_takes(
    made: Callable[[str], Path], tmp_path: Path, model_type: str, change: Callable[[dict[str, Tensor]], None], scheme: Any
) -> None:
    path = rewritten(made(model_type), tmp_path / "source", change, scheme)
    facts = inspect(path)

    assert (None, 0, scheme["quant_method"]) == (facts["format"], facts["quantized"], facts["read_from"])
    assert f"{scheme['quant_method']}, read as bfloat16" == dict(rows(facts))["format"]
    assert inspect(made(model_type))["parameters"] == facts["parameters"]
    assert sum(tensor.nbytes for tensor in load_file(path / "model.safetensors").values()) == facts["bytes"]["total"]


@pytest.mark.parametrize(
    ("model_type", "change", "scheme"), [("llama", to_fp8, FP8), ("gpt_oss", to_mxfp4, {"quant_method": "mxfp4"})]
)
def test_a_source_is_scored_beside_what_was_made_of_it(
    made: Callable[[str], Path], tmp_path: Path, model_type: str, change: Callable[[dict[str, Tensor]], None], scheme: Any
) -> None:
    path = rewritten(made(model_type), tmp_path / "source", change, scheme)
    known = Tokenizer(models.WordLevel({"?": 0, "boat": 1}, unk_token="?"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=known, unk_token="?").save_pretrained(path)
    (tmp_path / "held.txt").write_text("The boat left the harbour. " * 20)
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32, device="cpu"), tmp_path / "out")

    settings = EvaluateSettings(tasks=(f"ppl:{tmp_path / 'held.txt'}",), seqlen=32, limit=2, device="cpu")
    result = evaluate(out, settings, baseline=path)
    assert result.baseline is not None
    assert (None, "bfloat16", None) == tuple(result.baseline[key] for key in ("format", "dtype", "activations"))
    assert "compressed-tensors" == result.model["format"]


def test_a_format_that_nobody_knows_is_refused_before_the_work(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = rewritten(made("llama"), tmp_path / "source", lambda _: None, {"quant_method": "awq"})
    (tmp_path / "held.txt").write_text("The boat left the harbour. " * 20)
    with pytest.raises(FormatError, match="unknown quant_method `awq`"):
        evaluate(made("llama"), EvaluateSettings(tasks=(f"ppl:{tmp_path / 'held.txt'}",), device="cpu"), baseline=path)


def test_experts_in_one_tensor_are_linears_that_nobody_has_read(made: Callable[[str], Path]) -> None:
    tensors = load_file(made("gpt_oss") / "model.safetensors")
    facts = inspect(made("gpt_oss"))

    assert facts["bytes"]["other linears"] >= sum(t.nbytes for name, t in tensors.items() if ".experts." in name)
    assert facts["bytes"]["embeddings and norms"] < facts["bytes"]["other linears"]
    assert not facts["sparsity"]["exact"]
    assert facts["sparsity"]["linears"] == facts["sparsity"]["read"] + 4
