"""What transformers, with the compressed-tensors library, makes of our export: the very numbers that we compute."""

import torch

from marlin_tools import backends


def test_transformers_rounds_activations_as_we_do(rounded):
    from transformers import AutoModelForCausalLM

    directory = rounded(settings={"format": "compressed-tensors", "activations": "fp8"})
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours, plain = (backends.load(directory, device="cpu", backend="reference", activations=each) for each in (None, "16bit"))
    tokens = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert torch.equal(ours(tokens).logits, logits)
        assert not torch.equal(plain(tokens).logits, logits)


def test_transformers_computes_what_we_compute(in_format):
    from transformers import AutoModelForCausalLM

    directory = in_format("compressed-tensors")
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ours = backends.load(directory, device="cpu", backend="reference")
    tokens = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
