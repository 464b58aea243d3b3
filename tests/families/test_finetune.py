"""Training sees the logits that transformers computes, for every kind of head: what a manifest says of the KL is what it is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools.checkpoint.dequantized import dequantized
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import ModelError
from marlin_tools.families.layout import Layout
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.training.finetune import FinetuneSettings, finetune

Load = Callable[[str, Path], torch.nn.Module]

SETTINGS = {"tokens": 3 * 4 * 24, "batch": 4, "micro": 2, "held_out": 4, "device": "cpu"}
DENSE = (
    "llama",
    "gemma2",
    "granite",
    "cohere2",
    "gpt_neox",
    "phi",
    "phi3",
    "hyperclovax",
    "apertus",
    "gemma3",
    "gemma4",
    "mistral3",
    "qwen2_5_vl",
    "smolvlm",
    "granitemoehybrid",
    "bamba",
    "nemotron_h",
    "jamba-dense",
    "lfm2",
)


@pytest.fixture(scope="module")
def windows() -> TokenSet:
    """Ten windows of one length."""
    generator = torch.Generator().manual_seed(1)
    return TokenSet(tuple(torch.randint(2, 64, (10, 24), generator=generator)), "random", packed=True, documents=1)


@torch.no_grad()
def kl(student: torch.nn.Module, teacher: torch.nn.Module, ids: torch.Tensor) -> float:
    log_s, log_t = (
        torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].double(), dim=-1) for model in (student, teacher)
    )
    return float((log_t.exp() * (log_t - log_s)).sum(dim=-1).mean())


@pytest.mark.parametrize("model_type", DENSE)
def test_the_kl_of_a_pruned_model(
    made: Callable[[str], Path], eager: Load, windows: TokenSet, model_type: str, tmp_path: Path
) -> None:
    original = made(model_type)
    pruned = prune(original, None, PruneSettings(preset="magnitude", device="cpu"), tmp_path / "pruned")
    out = finetune(pruned, windows, FinetuneSettings(teacher=str(original), **SETTINGS), tmp_path / "out")
    manifest = json.loads((out.path / "manifest.json").read_text())
    told = dict(manifest["held_out_kl"])
    ids, teacher = torch.stack(windows.sequences[-4:]), eager(model_type, original)

    assert told[manifest["best_step"]] < told[0]
    assert kl(eager(model_type, pruned.path), teacher, ids) == pytest.approx(told[0], rel=1e-3)
    assert kl(eager(model_type, out.path), teacher, ids) == pytest.approx(told[manifest["best_step"]], rel=1e-2)
    for name in (f"{linear}.weight" for linear in Layout(out).linears()):
        assert torch.equal(out.read(name) == 0, pruned.read(name) == 0), name


@pytest.mark.parametrize("model_type", ["granite", "gpt_neox", "gemma3", "nemotron_h", "falcon_h1"])
def test_the_kl_of_a_quantised_model(
    made: Callable[[str], Path], eager: Load, windows: TokenSet, model_type: str, tmp_path: Path
) -> None:
    original = made(model_type)
    quantized = quantize(original, None, QuantizeSettings(preset="rtn", group_size=32, device="cpu"), tmp_path / "quantized")
    out = finetune(quantized, windows, FinetuneSettings(teacher=str(original), **SETTINGS), tmp_path / "out")
    manifest = json.loads((out.path / "manifest.json").read_text())
    told = dict(manifest["held_out_kl"])
    teacher, student = (eager(model_type, original) for _ in range(2))
    _fill(student, out)

    assert told[manifest["best_step"]] < told[0]
    expected = kl(student, teacher, torch.stack(windows.sequences[-4:]))
    assert expected == pytest.approx(told[manifest["best_step"]], rel=2e-2)


@torch.no_grad()
def _fill(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """What a quantised checkpoint stands for."""
    layout, linears = Layout(checkpoint), StoredLinears(checkpoint)
    for name, parameter in model.named_parameters():
        stored = layout.place(name).tensor
        linear = stored.removesuffix(".weight")
        if linear in linears.names:
            parameter.copy_(linears.read(linear).dequantize())
        elif stored in checkpoint:  # what sees is called otherwise, and not needed
            parameter.copy_(checkpoint.read(stored))


@pytest.mark.parametrize("other", ["gpt_neox", "qwen3_moe", "gemma3"])
def test_a_teacher_of_another_type(
    made: Callable[[str], Path], eager: Load, windows: TokenSet, other: str, tmp_path: Path
) -> None:
    pruned = prune(made("llama"), None, PruneSettings(preset="magnitude", device="cpu"), tmp_path / "pruned")
    settings = FinetuneSettings(teacher=str(made(other)), square_head=0, **SETTINGS)
    out = finetune(pruned, windows, settings, tmp_path / "out")
    (_, told), *_ = json.loads((out.path / "manifest.json").read_text())["held_out_kl"]
    ids = torch.stack(windows.sequences[-4:])
    assert kl(eager("llama", pruned.path), eager(other, made(other)), ids) == pytest.approx(told, rel=1e-3)


def test_a_teacher_in_fp8_is_the_model_that_it_stands_for(
    made: Callable[[str], Path], eager: Load, windows: TokenSet, tmp_path: Path
) -> None:
    """As its makers stored it, there is no other original."""
    original = Path(shutil.copytree(made("mistral"), tmp_path / "original"))
    tensors = load_file(original / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[f"{name}_scale_inv"], tensors[name] = torch.tensor(0.5), (tensors[name] * 2).to(torch.float8_e4m3fn)
    save_file(tensors, original / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    wide, view = Path(shutil.copytree(made("mistral"), tmp_path / "wide")), dequantized(Checkpoint.open(original))
    save_file({name: view.read(name) for name in view.names()}, wide / "model.safetensors", metadata={"format": "pt"})

    quantized = quantize(original, None, QuantizeSettings(preset="rtn", group_size=32, device="cpu"), tmp_path / "quantized")
    out = finetune(quantized, windows, FinetuneSettings(teacher=str(original), **SETTINGS), tmp_path / "out")
    (_, told), *_ = json.loads((out.path / "manifest.json").read_text())["held_out_kl"]
    teacher, student = (eager("mistral", wide) for _ in range(2))
    _fill(student, quantized)
    assert kl(student, teacher, torch.stack(windows.sequences[-4:])) == pytest.approx(told, rel=2e-2)
    with pytest.raises(ModelError, match="is quantised"):
        finetune(quantized, windows, FinetuneSettings(teacher=str(quantized.path), **SETTINGS), tmp_path / "again")
