"""Our runtime gives, bit for bit, what transformers gives with the dequantised weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from marlin_tools.backends import load
from marlin_tools.backends.reference import PackedLinear, at_load
from marlin_tools.formats import FORMATS
from marlin_tools.quantized import QuantizedLinear

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True, "sliding_window": 64},
    "gemma3_text": {"tie_word_embeddings": True, "sliding_window": 64},
}
IDS = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def expected(folder: Path, dtype=torch.float32):
    """As transformers computes it: with caps on attention's logits, which SDPA knows nothing of, eagerly."""
    capped = '"attn_logit_softcapping": 50' in (folder / "config.json").read_text()
    how = "eager" if capped else "sdpa"
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=how))


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_checkpoints_run_as_in_transformers(tiny_model, family):
    folder = tiny_model(family, **FAMILIES[family])

    assert torch.equal(expected(folder), logits(load(folder, device="cpu")))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("backend", ("reference", "reference-packed"))
def test_every_family_runs_quantized(tiny_model, write_int4, family, backend):
    packed, plain = write_int4(tiny_model(family, **FAMILIES[family]), "compressed-tensors")

    assert torch.equal(expected(plain), logits(load(packed, device="cpu", backend=backend)))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", ("reference", "reference-packed"))
@pytest.mark.parametrize("group_size", (128, -1))
def test_every_format_runs(tiny_llama, write_int4, name, backend, group_size):
    packed, plain = write_int4(tiny_llama, name, group_size)

    assert torch.equal(expected(plain), logits(load(packed, device="cpu", backend=backend)))


def test_layers_that_stayed_dense_are_used_as_they_are(tiny_llama, write_int4):
    packed, plain = write_int4(tiny_llama, "gptq", ignore="down_proj")

    assert torch.equal(expected(plain), logits(load(packed, device="cpu", backend="reference-packed")))


def test_shards_are_read(tiny_llama, tmp_path):
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float16)
    whole.save_pretrained(tmp_path / "sharded", max_shard_size="1MB")

    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(expected(tiny_llama), logits(load(tmp_path / "sharded", device="cpu")))


def test_another_dtype_can_be_asked_for(tiny_llama):
    model = load(tiny_llama, device="cpu", dtype=torch.bfloat16)

    assert torch.bfloat16 == model.dtype
    assert torch.equal(expected(tiny_llama, torch.bfloat16), logits(model))


def test_packed_codes_take_half_a_byte_each(tiny_llama, write_int4):
    model = load(write_int4(tiny_llama, "marlin")[0], device="cpu", backend="reference-packed")
    linears = [module for module in model.modules() if isinstance(module, PackedLinear)]
    weights = sum(linear.in_features * linear.out_features for linear in linears)

    assert 14 == len(linears)
    assert weights // 2 == sum(linear.pairs.nbytes for linear in linears)
    assert weights // 128 * 2 == sum(linear.scales.nbytes for linear in linears)


@pytest.mark.parametrize("build", (at_load, PackedLinear))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("n", "k"), ((1, 1), (3, 5), (8, 12)))
def test_a_single_linear_of_any_size(build, dtype, n, k):
    random = torch.Generator().manual_seed(n)
    weight = QuantizedLinear(torch.randint(0, 16, (n, k), generator=random, dtype=torch.uint8), torch.rand(n, 1).half(), k)
    bias, x = torch.rand(n, generator=random), torch.rand(2, k, generator=random).to(dtype)
    plain = torch.nn.functional.linear(x, weight.dequantize(dtype), bias.to(dtype))

    assert torch.equal(plain, build(weight, bias, torch.device("cpu"), dtype)(x))
