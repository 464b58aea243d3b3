"""How mixtures of experts are stored, what engines ask for by name, and what config.json says about them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools.checkpoint.cards import Card
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import MarlinToolsError, ModelError
from marlin_tools.families.layout import Layout
from marlin_tools.serving.transformers import register, unregister
from marlin_tools.stream.inventory import check_shapes, take_linears

Make = Callable[[str], Path]

NAMES = {
    "mixtral": ("block_sparse_moe.gate", "block_sparse_moe.experts.3.w1"),
    "minimax_m2": ("block_sparse_moe.gate", "block_sparse_moe.experts.3.w1"),
    "phimoe": ("block_sparse_moe.gate", "block_sparse_moe.experts.3.w1"),
    "granitemoe": ("block_sparse_moe.router.layer", "block_sparse_moe.experts.3.w1"),
    "granitemoeshared": ("block_sparse_moe.router.layer", "block_sparse_moe.experts.3.w1"),
    "lfm2_moe": ("feed_forward.gate", "feed_forward.experts.3.w1"),
    "granitemoehybrid-experts": ("block_sparse_moe.router.layer", "block_sparse_moe.experts.3.gate_proj"),
    "nemotron_h-experts": ("mixer.gate", "mixer.experts.3.up_proj"),
    "jamba": ("feed_forward.router", "feed_forward.experts.3.up_proj"),
    "hunyuan_v1_moe": ("mlp.gate.wg", "mlp.experts.3.gate_proj"),
    "afmoe": ("mlp.router.gate", "mlp.experts.3.gate_proj"),
    "ernie4_5_moe": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "deepseek_v2": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "deepseek_v32": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "glm4_moe_lite": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "dots1": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "flex_olmo": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "exaone_moe": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "solar_open": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "mimo_v2_flash": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "qwen3_vl_moe": ("mlp.gate", "mlp.experts.3.gate_proj"),
    "glm4v_moe": ("mlp.gate", "mlp.experts.3.gate_proj"),
}
"""What vLLM 0.22 and 0.33 read: a router that they build in 16 bits or find in the ignore list, and experts one by one."""


@pytest.mark.parametrize(("model_type", "names"), NAMES.items(), ids=NAMES)
def test_names_are_those_that_engines_look_for(made: Make, model_type: str, names: tuple[str, str]) -> None:
    inventory = take_linears(Checkpoint.open(made(model_type)), ())
    router, expert = (inventory.family.block_prefix(1) + name for name in names)
    assert router in inventory.unquantized
    assert f"{router}.weight" in inventory.checkpoint
    assert expert in inventory.names
    assert len(inventory.unquantized) == len(set(inventory.unquantized))


def test_experts_without_a_gate_are_ignored_with_one(made: Make) -> None:
    """VLLM asks for it where it chooses what to do with the experts of a block."""
    inventory = take_linears(Checkpoint.open(made("nemotron_h-experts")), (r"\.experts\.",))
    called = {f"backbone.layers.1.mixer.experts.{n}.{end}_proj" for n in range(4) for end in ("gate", "up", "down")}
    assert called == {name for name in inventory.unquantized if ".experts." in name}


def test_what_experts_read_in_fewer_numbers_stays_as_it_is(made: Make) -> None:
    kept = take_linears(Checkpoint.open(made("nemotron_h-latent")), ()).unquantized
    assert {f"backbone.layers.0.mixer.{name}_latent_proj" for name in ("fc1", "fc2")} <= set(kept)


@pytest.mark.parametrize("model_type", ["phimoe", "dots1"])
def test_transformers_finds_all_weights(quantized: Callable[[str], Checkpoint], model_type: str) -> None:
    """Without us, by the names of its own modules: of which Phi-3.5's router is a linear with a name of its own."""
    from transformers import AutoModelForCausalLM

    out = quantized(model_type)
    unregister()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(out.path, output_loading_info=True)
    finally:
        register()
    assert not found["missing_keys"]
    router = "router" if model_type == "phimoe" else "gate"
    stored = out.read(f"model.layers.1.{'block_sparse_moe' if model_type == 'phimoe' else 'mlp'}.gate.weight")
    assert torch.equal(getattr(model.model.layers[1].mlp, router).weight, stored)


def test_the_indexer_stays_as_it_is(made: Make) -> None:
    kept = take_linears(Checkpoint.open(made("deepseek_v32")), ()).unquantized
    linears = ("wq_b", "wk", "weights_proj")
    assert {f"model.layers.{i}.self_attn.indexer.{name}" for i in range(2) for name in linears} <= set(kept)


@pytest.mark.parametrize(
    ("model_type", "bodies"),
    [("minimax_m2", ("mlp", "block_sparse_moe")), ("granitemoe", ("block_sparse_moe",)), ("afmoe", ("mlp",))],
)
def test_experts_that_are_left_out_are_ignored_by_all_their_names(made: Make, model_type: str, bodies: tuple[str, ...]) -> None:
    """Engines ask for those of their modules with the names of gate, up and down, or with those of the tensors."""
    inventory = take_linears(Checkpoint.open(made(model_type)), (r"layers\.1\..*experts\.",))
    ends = ("gate_proj", "up_proj", "down_proj", *(() if model_type == "afmoe" else ("w1", "w2", "w3")))
    called = {f"model.layers.1.{body}.experts.{number}.{end}" for body in bodies for number in range(4) for end in ends}
    assert called == {name for name in inventory.unquantized if ".experts." in name}
    assert len(inventory.unquantized) == len(set(inventory.unquantized))


@torch.no_grad()
def test_experts_lie_either_way_round(made: Make, same_logits: Callable[[str, Path], None], tmp_path: Path) -> None:
    """As transformers writes Qwen3-VL's, and turned, as its makers did."""
    path = Path(shutil.copytree(made("qwen3_vl_moe"), tmp_path / "turned"))
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].transpose(1, 2).contiguous()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    usual, turned = (Layout(Checkpoint.open(each)) for each in (made("qwen3_vl_moe"), path))
    for projection in ("gate_proj", "up_proj", "down_proj"):
        parts = [each.weight(1, f"mlp.experts.2.{projection}.weight").read(each.checkpoint) for each in (usual, turned)]
        assert torch.equal(*parts)
    check_shapes(take_linears(turned.checkpoint, ()))
    same_logits("qwen3_vl_moe", path)

    pruned = prune(path, None, PruneSettings(preset="magnitude", device="cpu"), tmp_path / "pruned")
    assert {name: pruned.shape(name) for name in pruned.names()} == {name: tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("ernie4_5_moe", {"moe_num_experts": 8}, "holds 4 experts, config.json asks for 8"),
        ("ernie4_5_moe", {"moe_k": 5}, "`moe_k` is 5, of 4 experts"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 0]}, "`moe_topk` is 0, of 4 experts"),
        ("hunyuan_v1_moe", {"num_experts": [4, 4]}, "`num_experts`"),
        ("granitemoeshared", {"shared_intermediate_size": 0}, "shared_mlp.*which the model of config.json has no place for"),
    ],
)
def test_what_config_json_says_of_experts(
    made: Make, tmp_path: Path, model_type: str, change: dict[str, object], message: str
) -> None:
    path = Path(shutil.copytree(made(model_type), tmp_path / "odd"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(MarlinToolsError, match=message):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")


@torch.no_grad()
def test_a_shared_expert_that_config_json_leaves_out(
    made: Make, same_logits: Callable[[str, Path], None], tokens: TokenSet, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made("granitemoeshared"), tmp_path / "plain"))
    tensors = {name: t for name, t in load_file(path / "model.safetensors").items() if "shared_mlp" not in name}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks `model.layers.0.shared_mlp.input_linear.weight`, which config.json asks for"):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")

    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"shared_intermediate_size": 0}))
    out = quantize(path, tokens, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert not any("shared_mlp" in name for name in out.names())
    same_logits("granitemoeshared", path)


def test_how_many_experts_a_block_calls(made: Make) -> None:
    layout = Layout(Checkpoint.open(made("hunyuan_v1_moe")))
    assert [layout.share(index, "mlp.experts.0.up_proj") for index in range(2)] == [2 / 4, 3 / 4]
    assert Layout(Checkpoint.open(made("ernie4_5_moe"))).share(1, "mlp.experts.0.up_proj") == 2 / 4


@pytest.mark.parametrize("model_type", ["granitemoe", "ernie4_5_moe", "qwen3_vl_moe"])
def test_a_card_names_what_is_stored(made: Make, model_type: str) -> None:
    source = Checkpoint.open(made(model_type))
    card = take_linears(Card(source.config, "card"), ())
    assert card.names == take_linears(source, ()).names
