"""The reference runtime on a GPU: the checkpoint's own type, the same bits from both forms, the CPU's evaluation."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from marlin_tools.backends import load
from marlin_tools.distributed.device import free_memory
from marlin_tools.evaluation.evaluate import EvaluateSettings, evaluate
from marlin_tools.evaluation.generate import GenerateSettings, generate

pytestmark = pytest.mark.gpu
IDS = torch.randint(0, 512, (2, 100), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS.cuda(), use_cache=False).logits


@pytest.mark.parametrize("backend", ("reference", "reference-packed"))
def test_both_forms_give_the_bits_of_transformers(tiny_llama, write_int4, backend):
    packed, plain = write_int4(tiny_llama, "compressed-tensors")
    model = load(packed, device="cuda", backend=backend)
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float16, attn_implementation="sdpa").cuda()

    assert torch.float16 == model.dtype
    assert torch.equal(logits(expected), logits(model))


def test_evaluation_agrees_with_the_cpu(tiny_llama, write_int4, tmp_path):
    packed, _ = write_int4(tiny_llama, "compressed-tensors")
    (tmp_path / "held.txt").write_text("The skipper counted them twice off the point. " * 60)
    task = f"ppl:{tmp_path / 'held.txt'}"
    on_gpu, on_cpu = (
        evaluate(packed, EvaluateSettings(tasks=(task,), seqlen=64, device=device), baseline=tiny_llama)
        for device in ("cuda", "cpu")
    )

    for metric in ("perplexity", "kl"):
        assert pytest.approx(on_cpu.score(task, metric).value, rel=0.01) == on_gpu.score(task, metric).value


def test_generation_is_the_same_every_time(tiny_llama):
    settings = GenerateSettings(device="cuda", max_new_tokens=8, temperature=1.0, seed=3)

    assert generate(tiny_llama, "Nine", settings) == generate(tiny_llama, "Nine", settings)


def test_memory_that_torch_keeps_for_itself_counts_as_free():
    device = torch.device("cuda", 0)
    before = free_memory(device)
    block = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    during = free_memory(device)
    del block

    assert during <= before - (1 << 30)
    assert free_memory(device) >= during + (1 << 30)
