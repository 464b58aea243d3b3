"""Every type of model through the whole: the stream, the files that come out, and those read back."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from marlin_tools.backends import load
from marlin_tools.checkpoint.cards import Card
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import ModelError
from marlin_tools.families import known_types
from marlin_tools.families.experts import shell
from marlin_tools.families.layout import Layout
from marlin_tools.formats.contents import Contents
from marlin_tools.formats.stored import StoredLinears
from marlin_tools.serving.transformers import register, unregister
from marlin_tools.stream.inventory import check_shapes, take_linears
from marlin_tools.stream.layer_stream import LayerStream
from marlin_tools.stream.weights import weights_of
from marlin_tools.verification.checks import Subject, check_config
from marlin_tools.verification.engines import judge_checkpoint
from tiny_models import CASES
from tiny_nested import NESTED_CASES

Load = Callable[[str, Path], torch.nn.Module]


def test_every_type_has_a_case() -> None:
    """Of those that only a larger model holds, that model is the case."""
    cases = {name.partition("-")[0] for name in (*CASES, *NESTED_CASES)}
    assert {name for name in known_types() if not name.endswith("_text")} <= cases | {"mistral4"} <= {*known_types()}


@torch.no_grad()
def test_activations_are_those_of_eager_transformers(
    made: Callable[[str], Path], eager: Load, tokens: TokenSet, model_type: str
) -> None:
    path = made(model_type)
    checkpoint = Checkpoint.open(path)
    linears = Layout(checkpoint).linears()
    stream = LayerStream(checkpoint, tokens, frozenset(linears), torch.device("cpu"), with_original=True)
    handed = []
    for block in stream:
        for group in block.groups():
            assert group.hessian is not None
            assert group.hessian.matrix.shape[0] == group.weight(group.names[0]).shape[1]
            handed += group.names
    ids, logits = stream.logits(64)

    expected = eager(model_type, path)(input_ids=ids[None]).logits[0]
    assert sorted(handed) == sorted(linears)
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert stream.hidden is not None
    assert stream.original is not None
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(stream.hidden, stream.original, strict=True))


@torch.no_grad()
def test_what_is_written_reads_back(
    made: Callable[[str], Path],
    quantized: Callable[[str], Checkpoint],
    eager: Load,
    tokens: TokenSet,
    model_type: str,
    tmp_path: Path,
) -> None:
    source, out = Checkpoint.open(made(model_type)), quantized(model_type)
    check_shapes(take_linears(source, ()))
    linears = Layout(source).linears()
    stored = StoredLinears(out)

    assert sorted(stored.names) == sorted(linears)
    assert out.names() == sorted(set(out.names()))
    kept = set(out.names()) - set(stored.tensors)
    fused = {ref.tensor for index in range(Layout(source).blocks) for _, _, ref in Layout(source).split(index)}
    assert kept - {name for name in kept if re.search(r"\.experts\.\d", name)} == {
        name for name in source.names() if name.removesuffix(".weight") not in linears and name not in fused
    }
    for name in kept & set(source.names()):
        assert torch.equal(out.read(name), source.read(name)), name
    listed = (out.quantization or {})["ignore"]
    assert len(listed) == len(set(listed))
    ignored = set((out.quantization or {})["ignore"])
    assert not ignored & set(linears)
    matrices = {name.removesuffix(".weight") for name in kept if name.endswith(".weight") and len(out.shape(name)) == 2}
    assert matrices - ignored <= {name for name in matrices if "embed" in name}

    assert check_config(out).ok, check_config(out).detail
    assert Subject(out).inventory().ok, Subject(out).inventory().detail

    ids = tokens.sequences[0][None]
    ours = load(out, device="cpu", backend="reference")(input_ids=ids).logits
    expected = eager(model_type, _dequantized(source, stored, tmp_path / "dequantized"))(input_ids=ids).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    unregister()  # `load` has told transformers about our quantizer; here it is on its own
    try:
        theirs = eager(model_type, out.path)(input_ids=ids).logits
    finally:
        register()
    (verdict,) = [each for each in judge_checkpoint(Contents(out)) if each.engine == "transformers"]
    assert verdict.loads == torch.allclose(theirs, expected, rtol=1e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("window", [48, 128])
def test_positions_that_turn_by_length_are_checked_as_a_short_text(eager: Load, tmp_path: Path, window: int) -> None:
    """Windows are long, and the stored reference is 64 tokens: other factors turn them, as a reader of them does."""
    factors = {"short_factor": [1.0 + 0.1 * i for i in range(16)], "long_factor": [4.0 + i for i in range(16)]}
    turns = {"rope_type": "longrope", "rope_theta": 1e4, **factors, "original_max_position_embeddings": 96}
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    positions = {"original_max_position_embeddings": 96, "max_position_embeddings": 512, "rope_parameters": turns}
    config = AutoConfig.for_model("phi3", **sizes, **positions, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    path = tmp_path / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for weight in model.parameters():
        weight.data.mul_(5 if weight.ndim == 2 else 1)  # so that attention attends
    model.half().save_pretrained(path)
    tokens = TokenSet(tuple(torch.randint(2, 60, (3, window))), "random", packed=True, documents=1)
    out = quantize(path, tokens, QuantizeSettings(preset="fast", group_size=32, device="cpu"), tmp_path / "out")
    reference = load_file(out.path / "verify" / "reference.safetensors")

    read = _dequantized(Checkpoint.open(path), StoredLinears(out), tmp_path / "dequantized")
    with torch.no_grad():
        expected = eager("phi3", read)(input_ids=reference["tokens"][None]).logits[0]
    assert len(reference["tokens"]) == min(window, 64)
    torch.testing.assert_close(reference["logits"], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("model_type", "part", "within"),
    [
        ("gemma4_text", "per_layer_input_gate", ".weight"),
        ("gemma4_text", "experts", ".gate_up_proj.weight"),
        ("falcon_h1", "feed_forward.down_proj.bias", ""),
    ],
)
def test_a_part_that_cannot_be_worked_on_is_named_wherever_it_is(
    made: Callable[[str], Path], model_type: str, part: str, within: str, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(made(model_type), tmp_path / "model"))
    own = load_file(path / "model.safetensors")
    more = {f"model.layers.1.{part}{within}": torch.ones(128, 128, dtype=torch.float16)}
    save_file(own | more, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"blocks with `{part}` are not known"):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")


def test_blocks_that_attend_to_the_tokens_that_another_chose_are_refused(made: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(made("glm_moe_dsa"), tmp_path / "model"))
    own = load_file(path / "model.safetensors")
    left = {name: tensor for name, tensor in own.items() if ".1.self_attn.indexer" not in name}
    save_file(left, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"blocks that share what another computes are not known \(some lack `self_attn.indexer`"
    ):
        quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")


@torch.no_grad()
def test_what_predicts_ahead_is_copied(made: Callable[[str], Path], tokens: TokenSet, tmp_path: Path) -> None:
    path = tmp_path / "ahead"
    shutil.copytree(made("glm4_moe"), path)
    own = load_file(path / "model.safetensors")
    ahead = {
        f"model.layers.2.{name.removeprefix('model.layers.1.')}": t.clone() for name, t in own.items() if ".layers.1." in name
    }
    save_file(own | ahead, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    out = quantize(path, None, QuantizeSettings(preset="rtn", group_size=32), tmp_path / "out")
    assert all(torch.equal(out.read(name), tensor) for name, tensor in ahead.items())
    assert "model.layers.2.mlp.experts.3.up_proj" in (out.quantization or {})["ignore"]
    assert Subject(out).inventory().ok, Subject(out).inventory().detail
    ids = tokens.sequences[0][None]
    assert bool(load(out, device="cpu", backend="reference")(input_ids=ids).logits.isfinite().all())


def _dequantized(source: Checkpoint, stored: StoredLinears, folder: Path) -> Path:
    """The source with the values that its quantised linears stand for, in the source's own layout."""
    layout = Layout(source)
    tensors = {name: source.read(name).float() for name in source.names()}
    for index in range(layout.blocks):
        for linear in (linear for group in layout.groups(index) for linear in group):
            ref = layout.weight(index, f"{linear}.weight")
            ref.take(tensors[ref.tensor]).copy_(stored.read(layout.linear(index, linear)).dequantize(torch.float32))
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source.path / "config.json").read_bytes())
    return folder


@pytest.mark.parametrize("model_type", ["deepseek_v3", "ernie4_5_moe", "afmoe"])
@torch.no_grad()
def test_what_corrects_a_router_keeps_its_type(made: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    source = made(model_type)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(source / "model.safetensors").items()}
    (bias,) = [name for name in tensors if name.endswith(("e_score_correction_bias", "expert_bias"))]
    tensors[bias] = (8 + torch.arange(tensors[bias].numel()) / 512).view_as(tensors[bias])  # of which bfloat16 knows two
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    held = load(tmp_path, device="cpu", dtype=torch.bfloat16).state_dict()
    (place,) = [name for name in held if name.endswith(("e_score_correction_bias", "expert_bias"))]
    assert torch.equal(held[place], tensors[bias])

    block: torch.nn.Module = shell(Checkpoint.open(tmp_path), torch.bfloat16).model.layers[1]
    cast = {name for name, (_, cast) in weights_of(block, torch.bfloat16).items() if cast}
    assert "self_attn.o_proj.weight" in cast
    assert place.removeprefix("model.layers.1.") not in cast
    assert ("mlp.gate.weight" in cast) == (model_type == "deepseek_v3")


@torch.no_grad()
def test_heads_of_which_a_part_is_turned(made: Callable[[str], Path], eager: Load, tokens: TokenSet, tmp_path: Path) -> None:
    """As MiniMax M2 says so, and in the words that transformers reads."""
    theirs, ours = (Path(shutil.copytree(made("minimax_m2"), tmp_path / name)) for name in ("theirs", "ours"))
    config = json.loads((theirs / "config.json").read_text())
    turns = {"rope_type": "default", "rope_theta": 1e4}
    told = config | {"rope_parameters": turns | {"partial_rotary_factor": 0.25}}
    (theirs / "config.json").write_text(json.dumps(told))
    (ours / "config.json").write_text(json.dumps(config | {"rope_parameters": turns, "rotary_dim": 8}))
    stream = LayerStream(Checkpoint.open(ours), tokens, frozenset(), torch.device("cpu"))
    for block in stream:
        block.skip()
    ids, logits = stream.logits(40)
    expected = eager("minimax_m2", theirs)(input_ids=ids[None]).logits[0]
    loaded = load(ours, device="cpu", dtype=torch.float32)(input_ids=ids[None]).logits[0]
    for found in (logits, loaded):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_turns_of_minicpm3_whose_factor_follows_from_the_lengths(
    made: Callable[[str], Path], eager: Load, tmp_path: Path
) -> None:
    theirs, ours = (Path(shutil.copytree(made("minicpm3"), tmp_path / name)) for name in ("theirs", "ours"))
    config = json.loads((theirs / "config.json").read_text())
    factors = {"short_factor": [1.5] * 16, "long_factor": [3.0] * 16, "original_max_position_embeddings": 32}
    turns = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    (theirs / "config.json").write_text(json.dumps(config | {"rope_parameters": turns | {"factor": 4.0}}))
    (ours / "config.json").write_text(json.dumps(config | {"rope_parameters": turns}))
    ids = torch.arange(2, 22)[None]
    expected = eager("minicpm3", theirs)(input_ids=ids).logits
    found = load(ours, device="cpu", dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert take_linears(Card(json.loads((ours / "config.json").read_text()), "card"), ()).names
