"""Run a quantised model in transformers on our kernels: one import, then transformers as always. A CPU takes the reference.

python examples/quantize.py && python examples/in_transformers.py [DIRECTORY]
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import marlin_tools.transformers  # noqa: F401 (from here on `from_pretrained` loads our formats packed)

PROMPT = "Loren bought a gold coat. Question: What colour is Loren's coat? Answer:"


def main(directory: str = "runs/example") -> None:
    """Load, say what the linears are, continue a text."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, device_map=device)
    linear = model.model.layers[0].self_attn.q_proj
    print(f"{type(linear).__name__} on {device}, {model.get_memory_footprint() / 1e6:.1f} MB")

    asked = tokenizer(PROMPT, return_tensors="pt").to(device)
    with torch.no_grad():
        told = model.generate(**asked, max_new_tokens=8, do_sample=False)
    print(tokenizer.decode(told[0], skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
