"""The stream against whole models run by transformers: same logits, same Hessians, whatever the family."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.reconstruct import BlockTraining
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import ModelError
from marlin_tools.families import FAMILIES, find_family
from marlin_tools.quantized import rounded
from marlin_tools.stream.inventory import take_linears
from marlin_tools.stream.layer_stream import Group, LayerStream
from marlin_tools.stream.token_weights import token_weights

FAMILY_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 2, "attention_bias": True}),
    ("mistral", {"sliding_window": 16}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("gemma", {}),
    ("gemma2", {"sliding_window": 16}),
    ("gemma3_text", {"sliding_window": 16}),
]


def token_set(*lengths: int) -> TokenSet:
    generator = torch.Generator().manual_seed(0)
    return TokenSet(tuple(torch.randint(2, 512, (n,), generator=generator) for n in lengths), "test", False, len(lengths))


def targets_of(checkpoint: Checkpoint) -> frozenset[str]:
    family = find_family(checkpoint.config)
    blocks = range(checkpoint.config["num_hidden_layers"])
    return frozenset(family.block_prefix(i) + name for i in blocks for name in family.linears)


def whole_model(path: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize(("model_type", "changes"), FAMILY_CASES, ids=lambda value: value if isinstance(value, str) else "")
@torch.no_grad()
def test_logits_are_those_of_transformers(tiny_model: Callable[..., Path], model_type: str, changes: dict[str, Any]) -> None:
    path = tiny_model(model_type, **changes)
    tokens = token_set(48, 48, 31)
    stream = LayerStream(Checkpoint.open(path), tokens, frozenset(), torch.device("cpu"))
    for block in stream:
        block.skip()
    ids, logits = stream.logits(48)

    assert torch.equal(ids, tokens.sequences[0])
    torch.testing.assert_close(logits, whole_model(path)(ids[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model_type", "changes"), FAMILY_CASES, ids=lambda value: value if isinstance(value, str) else "")
@torch.no_grad()
def test_hessians_are_those_of_hooked_linears(
    tiny_model: Callable[..., Path], model_type: str, changes: dict[str, Any]
) -> None:
    """Staged: every group sees what it would read in the model whose earlier linears are already replaced."""
    path = tiny_model(model_type, **changes)
    checkpoint, tokens = Checkpoint.open(path), token_set(40, 24)
    model, replaced = whole_model(path), 0
    for block in LayerStream(checkpoint, tokens, targets_of(checkpoint), torch.device("cpu")):
        for group in block.groups():
            expected = hooked_gram(model, group.names[0], tokens)
            assert group.hessian is not None
            assert group.hessian.tokens == 64
            torch.testing.assert_close(group.hessian.matrix, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
            for name in group.names:
                coarse = (group.weight(name) * 16).round() / 16
                group.replace(name, coarse)
                model.get_submodule(name).weight.data.copy_(coarse)
                replaced += 1

    assert replaced == 14


def hooked_gram(model: torch.nn.Module, name: str, tokens: TokenSet) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    for sequence in tokens.sequences:
        model(sequence[None])
    handle.remove()
    rows = torch.cat(seen)
    return rows.T @ rows / len(rows)


@torch.no_grad()
def test_unstaged_hessians_come_from_the_original_block(tiny_llama: Path) -> None:
    checkpoint, tokens = Checkpoint.open(tiny_llama), token_set(40)
    model = whole_model(tiny_llama)
    stream = LayerStream(checkpoint, tokens, targets_of(checkpoint), torch.device("cpu"))
    for block in stream:
        expected = {group.names[0]: hooked_gram(model, group.names[0], tokens) for group in block.all_groups()}
        for group in block.groups(staged=False):
            assert group.hessian is not None
            torch.testing.assert_close(group.hessian.matrix, expected[group.names[0]], rtol=1e-3, atol=1e-5)
            for name in group.names:
                group.replace(name, group.weight(name) / 2)
                model.get_submodule(name).weight.data.div_(2)
    ids, logits = stream.logits(40)
    torch.testing.assert_close(logits, model(ids[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("staged", [True, False])
@torch.no_grad()
def test_the_original_model_passes_each_block_once(tiny_llama: Path, *, staged: bool) -> None:
    """Also where the groups are seen first and the block is passed afterwards: block training aims at these activations."""
    checkpoint, tokens = Checkpoint.open(tiny_llama), token_set(40)
    stream = LayerStream(checkpoint, tokens, targets_of(checkpoint), torch.device("cpu"), with_original=True)
    expected = whole_model(tiny_llama)(tokens.sequences[0][None], output_hidden_states=True).hidden_states
    for block in stream:
        for group in block.groups(staged=staged):
            for name in group.names:
                group.replace(name, torch.zeros_like(group.weight(name)))
        assert stream.original is not None
        if block.index + 1 < len(stream):  # transformers gives the last one after its norm
            torch.testing.assert_close(stream.original[0], expected[block.index + 1], rtol=1e-4, atol=1e-4)


def draw_bias(like: Tensor) -> Tensor:
    """A new model's are all zero."""
    return (torch.randn(like.shape, generator=torch.Generator().manual_seed(0)) * 0.1).to(like.dtype)


@pytest.mark.parametrize("biased", [False, True])
@torch.no_grad()
def test_drift_is_the_distance_to_the_original_model(tiny_model: Callable[..., Path], *, biased: bool) -> None:
    path = tiny_model("llama", attention_bias=biased, mlp_bias=biased)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({name: draw_bias(tensor) if name.endswith("bias") else tensor for name, tensor in tensors.items()}, file)
    checkpoint, tokens = Checkpoint.open(path), token_set(40, 40)
    model, original = whole_model(path), whole_model(path)
    stream = LayerStream(checkpoint, tokens, targets_of(checkpoint), torch.device("cpu"), with_original=True)
    for block in stream:
        for group in block.groups():
            assert group.hessian is not None
            assert group.hessian.drift is not None
            now, before = (inputs_of(m, group.names[0], tokens) for m in (model, original))
            closes = group.names[0].endswith(("o_proj", "down_proj"))
            assert (group.hessian.drift.inputs is None) == closes
            assert (group.hessian.drift.outputs is not None) == closes
            if not closes:
                expected = (before - now).T @ now / len(now)
                torch.testing.assert_close(group.hessian.drift.inputs, expected, rtol=1e-3, atol=1e-5)
                continue_with(group, model)
                continue
            norm = "input_layernorm" if "self_attn" in group.names[0] else "post_attention_layernorm"
            layer = group.names[0].rsplit(".", 2)[0]
            h, h0 = (inputs_of(m, f"{layer}.{norm}", tokens) for m in (model, original))
            weight = original.get_submodule(group.names[0]).weight
            expected = (h0 + before @ weight.T - h - now @ weight.T).T @ now / len(now)
            torch.testing.assert_close(group.hessian.drift.outputs, expected, rtol=1e-3, atol=1e-5)
            continue_with(group, model)


@torch.no_grad()
def test_a_token_that_is_far_longer_than_others_does_not_decide(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """What closing linears are fitted to, and the error that blocks are trained for. Their biases count for as much."""
    tokens = token_set(60)
    path = tmp_path / "long"
    shutil.copytree(tiny_model("llama", attention_bias=True, mlp_bias=True), path)
    lengthen(path, int(tokens.sequences[0][0]))
    checkpoint = Checkpoint.open(path)
    model, original = whole_model(path), whole_model(path)
    stream = LayerStream(checkpoint, tokens, targets_of(checkpoint), torch.device("cpu"), with_original=True)
    for block in stream:
        assert stream.hidden is not None
        assert stream.original is not None
        entering = stream.hidden.copy()
        for group in block.groups():
            closes = group.names[0].endswith(("o_proj", "down_proj"))
            now, before = (inputs_of(m, group.names[0], tokens) for m in (model, original))
            weights = torch.ones(60, 1)
            if closes:
                norm = "input_layernorm" if "self_attn" in group.names[0] else "post_attention_layernorm"
                layer = group.names[0].rsplit(".", 2)[0]
                h, h0 = (inputs_of(m, f"{layer}.{norm}", tokens) for m in (model, original))
                after = h0 + original.get_submodule(group.names[0])(before)
                weights = token_weights(after)
                assert float(weights[0]) < 0.1
                assert torch.equal(torch.ones(59, 1), weights[1:])
                owed = (after - h - original.get_submodule(group.names[0])(now)) * weights
            x = now * weights
            assert group.hessian is not None
            assert group.hessian.drift is not None
            torch.testing.assert_close(group.hessian.matrix, x.T @ x / 60, rtol=1e-3, atol=1e-5)
            if closes:
                assert group.hessian.drift.outputs is not None
                torch.testing.assert_close(group.hessian.drift.outputs, owed.T @ x / 60, rtol=1e-3, atol=1e-5)
            continue_with(group, model)
        training, target = BlockTraining(block, entering, {}), stream.original[0]
        weights = token_weights(target)
        lost = (block.module(entering[0], **stream.contexts(block.index, entering)[0]) - target) * weights
        assert training.error() == pytest.approx(float(lost.square().sum() / (target * weights).square().sum()), rel=1e-3)


@torch.no_grad()
def test_whose_drift_nobody_corrects_is_as_if_the_original_were_not_there(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As where published methods are tuned by block."""
    tokens = token_set(60)
    path = tmp_path / "long"
    shutil.copytree(tiny_model("llama"), path)
    lengthen(path, int(tokens.sequences[0][0]))
    checkpoint = Checkpoint.open(path)
    streams = [
        LayerStream(checkpoint, tokens, targets_of(checkpoint), torch.device("cpu"), with_original=original)
        for original in (True, False)
    ]
    streams[0].drift = False
    for blocks in zip(*streams, strict=True):
        for group, plain in zip(*(block.groups() for block in blocks), strict=True):
            assert group.hessian is not None
            assert plain.hessian is not None
            assert group.hessian.drift is None
            assert torch.equal(plain.hessian.matrix, group.hessian.matrix)
            for each in (group, plain):
                for name in each.names:
                    each.replace(name, (each.weight(name) * 32).round() / 32)
    assert streams[0].original is not None
    assert streams[0].hidden is not None
    assert not torch.equal(streams[0].original[0], streams[0].hidden[0])


def lengthen(path: Path, token: int) -> None:
    """Make what this token begins as a thousand times as long, and biases, which begin as 0, something."""
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][token] *= 1000
    for name in [name for name in tensors if name.endswith("_proj.bias")]:
        tensors[name].normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@torch.no_grad()
def test_tokens_that_are_rounded_change_nothing_but_the_logits(tiny_model: Callable[..., Path], model_type: str) -> None:
    """FP8 activations: what is calibrated on is not rounded, what is kept for later checks is."""
    experts = {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 128} if model_type == "qwen3_moe" else {}
    checkpoint, tokens = Checkpoint.open(tiny_model(model_type, **experts)), token_set(40, 40)
    targets = take_linears(checkpoint, (".*layers.0.*[kv]_proj",)).names
    model = shell_with_weights(checkpoint)
    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(lambda _, args: (rounded(args[0]),))
    streams = [LayerStream(checkpoint, tokens, targets, torch.device("cpu"), with_original=True) for _ in range(2)]
    streams[1].look_at(24, rounded=True)
    for blocks in zip(*streams, strict=True):
        for group, same in zip(*(block.groups() for block in blocks), strict=True):
            assert group.hessian is not None
            assert same.hessian is not None
            assert torch.equal(group.hessian.matrix, same.hessian.matrix)
            for each in (group, same):
                continue_with(each, model)
    ids, logits = streams[1].logits(40)
    assert torch.equal(tokens.sequences[0][:24], ids)
    torch.testing.assert_close(logits, model(ids[None]).logits[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits, streams[0].logits(24)[1], rtol=1e-3, atol=1e-3)


def shell_with_weights(checkpoint: Checkpoint) -> torch.nn.Module:
    from marlin_tools.backends import load

    return load(checkpoint, device="cpu")


def continue_with(group: Group, model: torch.nn.Module) -> None:
    for name in group.names:
        coarse = (group.weight(name) * 32).round() / 32
        group.replace(name, coarse)
        model.get_submodule(name).weight.data.copy_(coarse)


def inputs_of(model: torch.nn.Module, name: str, tokens: TokenSet) -> Tensor:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0].flatten(0, 1)))
    for sequence in tokens.sequences:
        model(sequence[None])
    handle.remove()
    return torch.cat(seen)


@torch.no_grad()
def test_one_block_is_resident_at_a_time(tiny_llama: Path) -> None:
    stream = LayerStream(Checkpoint.open(tiny_llama), token_set(16), frozenset(), torch.device("cpu"))
    resident = []
    for block in stream:
        block.skip()
        resident.append([i for i, layer in enumerate(stream.model.model.layers) if not next(layer.parameters()).is_meta])

    assert resident == [[0], [1]]
    assert all(parameter.is_meta for parameter in stream.model.model.layers.parameters())


def test_without_tokens_the_stream_carries_weights_only(tiny_llama: Path) -> None:
    checkpoint = Checkpoint.open(tiny_llama)
    for block in LayerStream(checkpoint, None, targets_of(checkpoint), torch.device("cpu")):
        for group in block.groups():
            assert group.hessian is None
            for name in group.names:
                assert torch.equal(group.weight(name), checkpoint.read(f"{name}.weight").float())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert"}, "unknown model type `bert`"),
        ({"model_type": "misstral"}, "unknown model type `misstral`"),
        ({}, "unknown model type `None`"),
    ],
)
def test_models_that_cannot_be_done_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as refusal:
        find_family(config)
    assert refusal.value.hint


def test_every_family_file_declares_its_family() -> None:
    for name in FAMILIES:
        family = find_family({"model_type": name})
        assert len(family.linears) == len(set(family.linears)) >= (4 if len(family.slots()) > 1 else 2)
        assert family.block_prefix(3).endswith(".3.")
