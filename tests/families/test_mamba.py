"""What is particular to blocks with Mamba: how much is computed at a time, and what engines call their linears."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.formats.contents import Contents
from marlin_tools.stream.inventory import check_shapes, take_linears
from marlin_tools.stream.layer_stream import LayerStream
from marlin_tools.verification.engines import EngineVerdict, judge_checkpoint

Make = Callable[[str], Path]


def test_mamba_is_computed_sequence_by_sequence(made: Make, tokens: TokenSet) -> None:
    """Its code in torch needs room for each token times a part of the text times each state."""
    seen = []
    stream = LayerStream(Checkpoint.open(made("bamba")), tokens, frozenset(), torch.device("cpu"), chunk_tokens=80)
    mamba: nn.Module = stream._blocks[0].mamba  # type: ignore[assignment]
    mamba.get_submodule("in_proj").register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    for block in stream:
        block.skip()
    assert seen == [(1, 40), (1, 40), (1, 23)]


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "bamba"])
def test_linears_of_mamba_that_are_left_out_are_ignored_by_both_names(made: Make, model_type: str) -> None:
    """Of the tensor, and of the module as vLLM has it."""
    inventory = take_linears(Checkpoint.open(made(model_type)), (r"\.mamba\.",))
    called = {f"model.layers.0.{body}.{name}" for body in ("mamba", "mixer") for name in ("in_proj", "out_proj")}
    assert called == {name for name in inventory.unquantized if "_proj" in name}
    assert len(inventory.unquantized) == len(set(inventory.unquantized))


def test_attention_of_falcon_h1_that_is_left_out_is_ignored_by_both_names(made: Make) -> None:
    inventory = take_linears(Checkpoint.open(made("falcon_h1")), (r"\.self_attn\.",))
    assert {"model.layers.0.self_attn.q_proj", "model.layers.0.q_proj"} <= set(inventory.unquantized)


def test_what_vllm_takes_of_mamba(made: Make, tmp_path: Path) -> None:
    def judged(format_name: str, *ignore: str, model_type: str = "granitemoehybrid") -> EngineVerdict:
        settings = QuantizeSettings(preset="rtn", group_size=32, format=format_name, ignore=ignore)
        out = quantize(made(model_type), None, settings, tmp_path / f"{model_type}-{format_name}{len(ignore)}")
        return next(each for each in judge_checkpoint(Contents(out)) if each.engine == "vLLM")

    grouped = judged("compressed-tensors")
    assert grouped.loads
    assert "2 groups of states do not divide among 4" in grouped.reasons[4]
    assert "`model.layers.0.mixer.in_proj` and takes it for one of 16 bits" in judged("gptq").reasons[1]
    assert judged("gptq", r"\.mamba\.").loads
    older = judged("compressed-tensors", model_type="jamba-dense")
    assert "it takes `model.layers.0.mamba.in_proj` in 16 bits only" in older.reasons[1]
    assert judged("compressed-tensors", r"\.mamba\.", model_type="jamba-dense").loads
    assert judged("gptq", model_type="nemotron_h").loads
    renamed = judged("gptq", r"\.mamba\.", model_type="falcon_h1")
    assert "`model.layers.0.k_proj` and takes it for one of 16 bits" in renamed.reasons[1]
    assert judged("compressed-tensors", model_type="falcon_h1").loads


@torch.no_grad()
def test_nemotron_h_under_the_other_name_of_its_decoder(
    made: Make, same_logits: Callable[[str, Path], None], tmp_path: Path
) -> None:
    """`backbone` as its makers have it, `model` as transformers has it; how many blocks there are is said in two ways."""
    path = Path(shutil.copytree(made("nemotron_h"), tmp_path / "model"))
    tensors = {name.replace("backbone.", "model."): t for name, t in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    assert "num_hidden_layers" not in config
    kinds = {key: value for key, value in config.items() if key not in {"layers_block_type", "layer_types"}}
    (path / "config.json").write_text(json.dumps(kinds | {"num_hidden_layers": 3, "hybrid_override_pattern": "M-*"}))
    check_shapes(take_linears(Checkpoint.open(path), ()))
    same_logits("nemotron_h", path)
