"""How to run a model: one command for every engine that loads it."""

from collections.abc import Iterator

from marlin_tools.report.result import Result

_COMMANDS = {
    "vLLM": "vllm serve DIR",
    "SGLang": "python -m sglang.launch_server --model-path DIR",
    "transformers": "python -c \"from transformers import AutoModelForCausalLM as A; A.from_pretrained('DIR')\"",
    "GPTQModel": "python -c \"from gptqmodel import GPTQModel; GPTQModel.load('DIR')\"",
    "marlin-tools": 'marlin-tools generate DIR --prompt "..."',
}


def commands(result: Result) -> Iterator[str]:
    """In the order of the table of engines; in another format if this one is served by nobody."""
    loading = [engine["engine"] for engine in result.facts["engines"] if engine["loads"]]
    for engine in loading:
        if engine in _COMMANDS:
            yield _COMMANDS[engine]
    if not {"vLLM", "SGLang"} & set(loading):
        yield "marlin-tools export DIR --format compressed-tensors -o DIR-ct   # for vLLM and SGLang, the same weights"
