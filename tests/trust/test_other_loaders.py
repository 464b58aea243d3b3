"""What transformers, with the compressed-tensors library, makes of our export: the very numbers that we compute."""

import torch

from marlin_tools import backends


def test_transformers_computes_what_we_compute(in_format):
    from transformers import AutoModelForCausalLM

    directory = in_format("compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = backends.load(directory, device="cpu", backend="reference")
    tokens = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
