"""Serve a quantised model in vLLM: it finds our kernels by itself, nothing has to be set. Needs vLLM and a GPU.

    pip install vllm .
    python examples/quantize.py && python examples/in_vllm.py [DIRECTORY]

The same as a server: `vllm serve runs/example`. Ends with code 77 where vLLM is not installed.
"""

import sys
from importlib.util import find_spec

import marlin_tools as mt

PROMPTS = ["Loren bought a gold coat. Question: What colour is Loren's coat? Answer:"]
ABSENT = 77


def main(directory: str = "runs/example") -> int:
    """Ask whether vLLM loads it, before vLLM is started; then have it continue some texts."""
    checked = mt.verify(directory)
    engine = next(each for each in checked.engines if each.engine == "vLLM")
    print(f"{directory} in vLLM {engine.version}: {'loads' if engine.loads else 'does not load'}")
    if not (checked.ok and engine.loads):
        return 1
    if find_spec("vllm") is None:
        print("vLLM is not installed here: pip install vllm", file=sys.stderr)
        return ABSENT

    from vllm import LLM, SamplingParams

    llm = LLM(model=directory)
    for answer in llm.generate(PROMPTS, SamplingParams(temperature=0.0, max_tokens=8)):
        print(answer.prompt + answer.outputs[0].text)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
