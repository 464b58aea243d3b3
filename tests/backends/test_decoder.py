"""Decoding token by token gives the logits of transformers' own forward over the whole text."""

import pytest
import torch
from torch import nn

from marlin_tools.backends import decoder as module
from marlin_tools.backends import load
from marlin_tools.backends.decoder import Decoder, refusal
from marlin_tools.backends.native import NativeFp8Linear, NativeLinear, build, build_fp8, join
from marlin_tools.ops import pack
from marlin_tools.ops.linear.w4a8 import LEAST_ROWS
from marlin_tools.ops.model import decode
from marlin_tools.quantized import QuantizedLinear, round_inputs, rounded, rounds_inputs

FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {},
}


def replace(network, weights, dtype=torch.float16):
    """Our linears in the place of those that `weights` names."""
    for name, weight in weights.items():
        linear = network.get_submodule(name)
        network.set_submodule(name, build(weight, linear.bias, linear.weight.device, dtype))


def worst_difference(model, batch=2, read=5, steps=4):
    """Between decoded logits and those of one forward over all tokens, relative to the largest."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, read + steps), generator=torch.Generator().manual_seed(3))
    tokens = tokens.to(model.device)
    with torch.inference_mode():
        expected = model(tokens).logits.float()
    decoder = Decoder(model, batch, 16)
    worst = 0.0
    for _ in range(2):  # a decoder starts over as often as it is asked to
        logits = [decoder.read(tokens[:, :read])]
        logits += [decoder.step(tokens[:, read + i]).clone() for i in range(steps)]
        found = torch.stack(logits, 1).float()
        worst = max(worst, (found - expected[:, read - 1 :]).abs().max().item())
    return worst / expected.abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_same_logits_as_a_forward(tiny_model, family):
    model = load(tiny_model(family, **FAMILIES[family]), device="cpu", dtype=torch.float32)
    assert worst_difference(model) < 1e-5


def test_model_is_still_itself_afterwards(tiny_llama):
    """Joined weights are shared: nothing is held twice, and the model computes as before."""
    model = load(tiny_llama, device="cpu", dtype=torch.float32)
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        expected = model(tokens).logits
        held = Decoder(model, 1, 16)
        attention = model.model.layers[0].self_attn
        whole = held._blocks[0]._joint.whole
        assert attention.q_proj.weight.data_ptr() == whole.weight.data_ptr()
        assert attention.v_proj.weight.data_ptr() > whole.weight.data_ptr()
        assert torch.equal(expected, model(tokens).logits)


def quantized(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    return QuantizedLinear(codes, (torch.randn((n, k // 128), generator=generator) * 0.02).half(), 128)


@pytest.mark.parametrize("bias", [True, False])
def test_joined_linears_give_their_outputs_side_by_side(bias):
    network = nn.ModuleList([nn.Linear(256, n, bias=bias).half() for n in (128, 64, 64)])
    replace(network, {str(i): quantized(n, 256, i) for i, n in enumerate((128, 64, 64))})
    x = torch.randn(3, 256).half()
    expected = torch.cat([part(x) for part in network], dim=-1)
    whole = join(list(network))

    assert torch.equal(expected, whole(x))
    assert torch.equal(expected, torch.cat([part(x) for part in network], dim=-1))
    assert network[1].codes.data_ptr() == whole.codes[2:].data_ptr()


def test_linears_that_round_their_input_go_on_doing_so(tiny_llama):
    model = load(tiny_llama, device="cpu", dtype=torch.float32)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.down_proj):
            round_inputs(linear)
    assert worst_difference(model) < 1e-5


def test_joined_packed_linears_round_as_their_parts_do():
    parts = [build_fp8(quantized(64, 256, seed), None, torch.device("cpu"), torch.float16) for seed in (0, 1)]
    whole = join(parts)
    assert rounds_inputs(whole)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).half()
    expected = torch.cat([part.forward(rounded(x)) for part in parts], dim=1)
    torch.testing.assert_close(whole(x), expected, rtol=1e-3, atol=1e-3)


def test_on_hopper_many_tokens_are_rounded_and_few_are_not():
    """What a CPU computes with the operators that a GPU has kernels for."""
    weights = [quantized(64, 256, seed) for seed in (0, 1)]
    parts = [NativeFp8Linear(pack(weight)) for weight in weights]
    x = torch.randn(LEAST_ROWS + 1, 256, generator=torch.Generator().manual_seed(0)).half()
    dense = torch.cat([weight.dequantize() for weight in weights])
    exact, eight = (each.float() @ dense.T for each in (x, rounded(x.float())))
    many, few = join(parts)(x).float(), join(parts)(x[: LEAST_ROWS - 1]).float()
    assert (few - exact[: LEAST_ROWS - 1]).abs().max() < 0.1 * (few - eight[: LEAST_ROWS - 1]).abs().max()
    assert (many - eight).abs().max() < 0.1 * (many - exact).abs().max()


def test_unlike_linears_are_not_joined():
    network = nn.ModuleList([nn.Linear(256, 128).half(), nn.Linear(256, 96).half()])
    replace(network, {"0": quantized(128, 256, 0), "1": quantized(96, 256, 1)})
    assert join(list(network)) is None  # 96 outputs fill one tile and a half
    assert isinstance(network[0], NativeLinear)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("gemma2", {}, "model type `gemma2`"),
        ("llama", {"hidden_act": "gelu"}, "gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        ("mistral", {"sliding_window": 8}, "sees 8 tokens, fewer than 16"),
        ("llama", {"max_position_embeddings": 12}, "12 positions, fewer than 16"),
    ],
)
def test_refuses_what_it_would_get_wrong(tiny_model, family, change, reason):
    model = load(tiny_model(family, **change), device="cpu", dtype=torch.float32)
    assert reason in refusal(model, 16)
    with pytest.raises(ValueError, match="cannot be decoded"):
        Decoder(model, 1, 16)


def test_a_window_that_is_not_used_is_no_obstacle(tiny_model):
    model = load(tiny_model("qwen2", sliding_window=8, use_sliding_window=False), device="cpu", dtype=torch.float32)
    assert refusal(model, 16) is None


# ---- the kernels ----------------------------------------------------------------------------------------------------------


def close(found, expected, dtype):
    assert found.dtype == expected.dtype
    assert not found.isnan().any()
    limit = 4 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
    assert (found.float().cpu() - expected.float()).abs().max() <= limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 4096), (3, 8), (7, 8192), (128, 576), (2, 16384)])
def test_add_norm_and_gate_on_a_gpu(dtype, rows, columns):
    torch.manual_seed(rows)
    residual, branch = (torch.randn((rows, columns), dtype=dtype) for _ in range(2))
    weight = torch.rand(columns).to(dtype)
    for added in (branch, None):
        ours, theirs = residual.cuda(), residual.clone()
        found = decode.add_norm(ours, None if added is None else added.cuda(), weight.cuda(), 1e-5)
        close(found, decode.add_norm(theirs, added, weight, 1e-5), dtype)
        close(ours, theirs, dtype)
    both = torch.randn((rows, 2 * columns), dtype=dtype) * 4
    close(decode.gate(both.cuda()), decode.gate(both), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head", decode.HEAD_SIZES)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads"), [(1, 32, 32), (2, 8, 2), (3, 7, 1), (5, 16, 2), (128, 32, 32), (1, 12, 2)]
)
@pytest.mark.parametrize("normed", [True, False])
def test_attend_on_a_gpu(dtype, head, batch, heads, key_heads, normed):
    """From the first token to a full cache; what lies behind the position is poison."""
    torch.manual_seed(head + batch)
    capacity = 96 if batch > 8 else 1200
    keys, values = (torch.randn((batch, key_heads, capacity, head), dtype=dtype) for _ in range(2))
    angles = torch.rand((capacity, head // 2)).repeat(1, 2) * 6
    norms = [torch.rand(head).to(dtype) for _ in range(2)] if normed else [None, None]
    rotation = decode.Rotation(angles.cos().to(dtype), angles.sin().to(dtype), *norms, 1e-6)
    there = decode.Rotation(*(t if t is None else t.cuda() for t in (rotation.cosines, rotation.sines, *norms)), 1e-6)
    for at in (0, 1, 30, 31, 32, 95, 513, 1199):
        if at >= capacity:
            continue
        joint = torch.randn((batch, heads + 2 * key_heads, head), dtype=dtype)
        position = torch.tensor([at], dtype=torch.int32)
        poisoned = [t.cuda() for t in (keys, values)]
        for t in poisoned:
            t[:, :, at:] = float("nan")
        here = [t.clone() for t in (keys, values)]
        found = decode.attend(joint.cuda(), *poisoned, position.cuda(), there, head**-0.5)
        again = decode.attend(joint.cuda(), *poisoned, position.cuda(), there, head**-0.5)
        close(found, decode.attend(joint, *here, position, rotation, head**-0.5), dtype)
        assert torch.equal(found, again)
        for ours, theirs in zip(poisoned, here, strict=True):
            close(ours[:, :, : at + 1], theirs[:, :, : at + 1], dtype)
            assert ours[:, :, at + 1 :].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_graph_gives_the_logits_of_a_forward(tiny_model, family, dtype):
    sizes = {"head_dim": 64, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    model = load(tiny_model(family, **FAMILIES[family], **sizes), device="cuda", dtype=dtype)
    assert worst_difference(model) < 16 * torch.finfo(dtype).eps
    names = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in name}
    weights = {name: quantized(m.out_features, m.in_features, i) for i, (name, m) in enumerate(names.items())}
    replace(model, {name: weight.to("cuda") for name, weight in weights.items()}, dtype)
    assert worst_difference(model, batch=3, read=9, steps=6) < 16 * torch.finfo(dtype).eps


@pytest.mark.gpu
def test_refuses_on_a_gpu_what_the_kernels_cannot_read():
    x = torch.randn(2, 64, device="cuda")
    with pytest.raises(TypeError, match="float16 or bfloat16"):
        decode.add_norm(x, None, x[0], 1e-5)
    with pytest.raises(ValueError, match="columns must be a multiple of 8"):
        decode.add_norm(x.half()[:, :60].contiguous(), None, x.half()[0, :60].contiguous(), 1e-5)
    with pytest.raises(ValueError, match="weight must be contiguous"):
        decode.add_norm(x.half(), None, torch.randn(128, device="cuda").half()[::2], 1e-5)


def test_module_says_what_it_is_for():
    assert set(FAMILIES) == set(module.MODEL_TYPES)
