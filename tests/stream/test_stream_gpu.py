"""The stream on a GPU: wherever activations wait, the result is the same; and it agrees with the CPU."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from marlin_tools.algorithms import PRESETS
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.tokens import TokenSet
from marlin_tools.families import find_family
from marlin_tools.stream.activations import MemoryBudget
from marlin_tools.stream.layer_stream import LayerStream
from marlin_tools.stream.shortcuts import shorten_norms, shorten_rotations

pytestmark = pytest.mark.gpu


def quantized(
    path: Path, device: str, monkeypatch: pytest.MonkeyPatch, room: MemoryBudget | None, dtype: str | None = None
) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(path)
    checkpoint.config["dtype"] = dtype or checkpoint.config["dtype"]
    family = find_family(checkpoint.config)
    targets = frozenset(family.block_prefix(i) + name for i in range(2) for name in family.linears)
    generator = torch.Generator().manual_seed(0)
    tokens = TokenSet(tuple(torch.randint(2, 512, (48, 64), generator=generator)), "random", packed=True, documents=1)
    if room is not None:
        monkeypatch.setattr(LayerStream, "_room_for", lambda *_: room)
    stream = LayerStream(checkpoint, tokens, targets, torch.device(device), with_original=True, chunk_tokens=512)
    codes = {}
    for block in stream:
        for group in block.groups():
            solved = PRESETS["default"].solve(group.names[0], group.stacked(), group.hessian, 128, torch.float16)
            for name, rows in group.rows():
                group.replace(name, solved.value(group.weight(name).dtype)[rows])
                codes[name] = solved.linear.codes[rows].cpu()
    codes["logits"] = stream.logits(64)[1]
    assert stream.original is not None
    stream.hidden = stream.original
    codes["original"] = stream.logits(64)[1]
    return codes


def test_room_changes_nothing(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = quantized(tiny_llama, "cuda:0", monkeypatch, MemoryBudget(residual=True, inputs=True))
    for room in (MemoryBudget(inner=0), MemoryBudget(inner=1_200_000), MemoryBudget(residual=False)):
        other = quantized(tiny_llama, "cuda:0", monkeypatch, room)
        for name, value in everything.items():
            assert torch.equal(value, other[name]), (room, name)


def divergence(left: Tensor, right: Tensor) -> float:
    left, right = (torch.log_softmax(x, dim=-1) for x in (left, right))
    return float((left.exp() * (left - right)).sum(dim=-1).mean())


def test_gpu_and_cpu_agree(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same arithmetic: on a GPU the stream is as wide as the model, on a CPU it is always float32."""
    gpu, cpu = (quantized(tiny_llama, device, monkeypatch, None, "float32") for device in ("cuda:0", "cpu"))
    shares = {name: float((cpu[name] != gpu[name]).float().mean()) for name in cpu if name not in {"logits", "original"}}
    print("codes that differ:", {name: f"{share:.1e}" for name, share in shares.items()})
    assert max(list(shares.values())[:3]) < 2e-4  # q, k, v of the first block: what they read has not met a rounded weight

    assert divergence(cpu["original"], gpu["original"]) < 1e-6
    lost = [divergence(x["original"], x["logits"]) for x in (cpu, gpu)]
    print(f"lost on a CPU {lost[0]:.5f}, on a GPU {lost[1]:.5f}, between them {divergence(cpu['logits'], gpu['logits']):.5f}")
    assert lost[1] == pytest.approx(lost[0], rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shortcuts_are_what_the_model_does(dtype: torch.dtype) -> None:
    """On a Llama wide enough for them, taken and not taken."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=512, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4
    )
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    assert shorten_norms(model, torch.device("cuda", 0), dtype) == 3
    generator = torch.Generator("cuda").manual_seed(0)
    norm, attention = model.model.layers[0].input_layernorm, model.model.layers[0].self_attn
    for module in (norm, attention):
        module.to_empty(device="cuda")
        for parameter in module.parameters():
            parameter.data.normal_(0, 0.05, generator=generator)
    rotary = LlamaRotaryEmbedding(config).to("cuda")
    x = torch.randn(3, 96, 1024, generator=generator, device="cuda").to(dtype)
    angles = rotary(x, torch.arange(96, device="cuda")[None])
    with torch.no_grad():
        short = norm(x)
        own_out = attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
        assert shorten_rotations(attention, torch.device("cuda"), dtype) == 1
        short_out = attention(hidden_states=x, position_embeddings=angles, attention_mask=None)[0]
    own = norm(x.requires_grad_()).detach()  # where gradients are wanted, the model's own code runs
    assert torch.equal(short_out, own_out)
    assert float((short == own).float().mean()) > 0.99
    torch.testing.assert_close(short, own, rtol=2 * torch.finfo(dtype).eps, atol=0)
