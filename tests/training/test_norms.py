"""Fused norms: the model's own without autocast, the same numbers under it, and no norm that computes something else."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from marlin_tools.training.norms import fuse_norms

H = 64


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=H, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.2)
    return model


def losses_and_gradients(model: nn.Module, *, narrow: bool) -> list[torch.Tensor]:
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        loss = model(ids).logits.float().logsumexp(dim=-1).square().mean()
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]


def test_without_autocast_nothing_changes(model: LlamaForCausalLM) -> None:
    fused = copy.deepcopy(model)
    assert fuse_norms(fused, H) == 5
    for own, here in zip(losses_and_gradients(model, narrow=False), losses_and_gradients(fused, narrow=False), strict=True):
        assert torch.equal(own, here)


def test_under_autocast_the_numbers_are_those_of_the_own_norms(model: LlamaForCausalLM) -> None:
    fused = copy.deepcopy(model)
    fuse_norms(fused, H)
    own, here = losses_and_gradients(model, narrow=True), losses_and_gradients(fused, narrow=True)
    torch.testing.assert_close(own[0], here[0])
    for a, b in zip(own, here, strict=True):
        assert float((a - b).norm()) < 0.02 * float(a.norm())


def test_linears_read_what_the_norm_has_rounded(model: LlamaForCausalLM) -> None:
    fuse_norms(model, H)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.norm(torch.randn(3, H)).dtype == torch.bfloat16


def test_a_norm_behind_a_branch_keeps_the_type_of_the_residual_stream(model: LlamaForCausalLM) -> None:
    assert fuse_norms(model, H, behind={"post_attention_layernorm"}) == 3
    with torch.autocast("cpu", torch.bfloat16):
        assert model.model.layers[0].post_attention_layernorm(torch.randn(3, H)).dtype == torch.float32


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    class ShiftedRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + self.weight

    others = nn.ModuleList([ShiftedRMSNorm(H), nn.LayerNorm(H), LlamaRMSNorm(H // 2)])
    kinds = [*map(type, others)]
    assert fuse_norms(others, H) == 0
    assert [*map(type, others)] == kinds
