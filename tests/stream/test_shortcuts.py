"""Shortcuts away from a GPU: none is taken, and the model's own code is called as it would be."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from marlin_tools.ops.model.rotation import can_rotate
from marlin_tools.stream import shortcuts
from marlin_tools.stream.shortcuts import shorten_norms, shorten_rotations


def model() -> LlamaForCausalLM:
    config = LlamaConfig(hidden_size=1024, intermediate_size=64, num_hidden_layers=1, num_attention_heads=8, vocab_size=64)
    with torch.device("meta"):
        return LlamaForCausalLM._from_config(config, dtype=torch.float16)


def test_nothing_changes_on_a_cpu() -> None:
    llama = model()
    kinds = [type(module) for module in llama.modules()]
    assert shorten_norms(llama, torch.device("cpu"), torch.float16) == 0
    assert [type(module) for module in llama.modules()] == kinds
    assert shorten_rotations(llama, torch.device("cpu"), torch.float16) == 0
    assert [type(module) for module in llama.modules()] == kinds


@torch.no_grad()
def test_only_our_own_copy_rotates_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(own: Callable[..., Any], *given: Any) -> Any:
        called.append("ours")
        return own(*given)

    monkeypatch.setattr(shortcuts, "_rotated", noted)
    shortcuts._rotating_shortly.cache_clear()
    theirs, ours = model(), model()
    before = dict(vars(sys.modules[type(theirs.model.layers[0].self_attn).__module__]))
    assert shorten_rotations(ours, torch.device("cuda"), torch.float16) == 1
    ids = torch.arange(8)[None]
    outputs = []
    for each in (theirs, ours):
        each.float().to_empty(device="cpu")
        for parameter in each.parameters():
            torch.nn.init.constant_(parameter, 0.01)
        each.model.rotary_emb = type(each.model.rotary_emb)(each.config)
        outputs.append(each(ids).logits)
        assert called == ([] if each is theirs else ["ours"])
    assert torch.equal(*outputs)
    assert dict(vars(sys.modules[type(theirs.model.layers[0].self_attn).__module__])) == before
    shortcuts._rotating_shortly.cache_clear()


def test_what_the_kernel_cannot_do_is_left_to_the_model() -> None:
    q, k = torch.randn(2, 4, 8, 64), torch.randn(2, 2, 8, 64)
    cos, sin = torch.rand(1, 8, 64), torch.rand(1, 8, 64)
    assert not can_rotate(q, k, cos, sin)
    assert shortcuts._rotated(lambda *given: given[:2], q, k, cos, sin) == (q, k)


def test_only_norms_of_that_kind_are_tried() -> None:
    assert [shortcuts._might_be_short(m) for m in (torch.nn.LayerNorm(1024), torch.nn.RMSNorm(1024))] == [False, False]
    assert sum(shortcuts._might_be_short(m) for m in model().modules()) == 3


def test_a_shortened_norm_is_the_models_where_it_cannot_be_short() -> None:
    norm = model().model.norm.to_empty(device="cpu").float()
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 1024)
    expected = norm(x)
    norm.__class__ = shortcuts._shortened(type(norm))
    with torch.no_grad():
        assert torch.equal(norm(x), expected)
    assert norm(x).requires_grad
    assert list(dict(norm.named_parameters())) == ["weight"]
