"""Milliseconds per token inside vLLM, of one kind of weights: what the table in docs/serving.md was measured with.

    python scripts/bench_vllm.py fp16      # needs a GPU, and vLLM beside marlin-tools
    python scripts/bench_vllm.py machete   # vLLM's own kernel: the plugin is off
    python scripts/bench_vllm.py dense
    python scripts/bench_vllm.py sparse

A Llama of the shapes of llama2-7b with random weights, so nothing is downloaded. A process each, because vLLM keeps its GPU
memory until it ends. Prints one line of JSON.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

KINDS = ("fp16", "machete", "dense", "sparse")
BATCHES = (1, 8, 16, 32, 64, 128)
TIMES = 3
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fill_at_random(*, sparse: bool) -> None:
    """Let vLLM's dummy weights be random INT4 codes, of `sparse` ones two of four zero, plausible scales and normal numbers."""
    import torch
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    load = DummyModelLoader.load_weights

    def codes_into(packed: torch.Tensor) -> None:
        codes = torch.randint(0, 16, (packed.numel() * 2, 4), dtype=torch.uint8, device=packed.device)
        if sparse:
            for part in codes.split(1 << 22):
                part.scatter_(1, torch.rand(part.shape, device=part.device).argsort(dim=1)[:, :2], 8)
        pairs = codes[:, 0::2] | (codes[:, 1::2] << 4)
        packed.copy_(pairs.flatten().view(torch.int32).view(packed.shape))

    def load_weights(self: Any, model: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        load(self, model, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if name.endswith("weight_packed"):
                codes_into(parameter.data)
            elif name.endswith("weight_scale"):
                parameter.data.uniform_(0.001, 0.003)
            elif parameter.dtype == torch.float16 and parameter.dim() == 2:
                parameter.data.normal_(0, 0.02)

    DummyModelLoader.load_weights = load_weights


def measure(folder: str) -> dict[str, float]:
    """Milliseconds per token by batch, 64 tokens in and 64 out, and of prompts of 2048 tokens."""
    from vllm import LLM, SamplingParams

    sizes = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128]}
    model = LLM(
        folder,
        load_format="dummy",
        dtype="float16",
        skip_tokenizer_init=True,
        max_model_len=2304,
        gpu_memory_utilization=0.6,
        max_num_seqs=128,
        compilation_config=sizes,
    )
    draw = random.Random(0)

    def seconds(prompts: int, length: int, new: int) -> float:
        asked = [{"prompt_token_ids": [draw.randrange(3, 31000) for _ in range(length)]} for _ in range(prompts)]
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        model.generate(asked, how, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(128, 64, 8)
    found: dict[str, float] = {}
    for batch in BATCHES:
        whole = min(seconds(batch, 64, 64) for _ in range(TIMES))
        first = min(seconds(batch, 64, 1) for _ in range(TIMES))
        found[f"batch {batch}"] = (whole - first) / 63 * 1e3
    for prompts in (1, 4):
        seconds(prompts, 2048, 1)
        found[f"{prompts} x 2048"] = min(seconds(prompts, 2048, 1) for _ in range(TIMES)) * 1e3
    return {name: round(value, 3) for name, value in found.items()}


def main() -> int:
    """The kind that is asked for."""
    if len(sys.argv) != 2 or sys.argv[1] not in KINDS:
        print(f"usage: python scripts/bench_vllm.py {'|'.join(KINDS)}", file=sys.stderr)
        return 2
    kind = sys.argv[1]
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are filled in this very process
    if kind == "machete":
        os.environ["MARLIN_TOOLS_VLLM"] = "0"
    config: dict[str, Any] = dict(SHAPE)
    if kind != "fp16":
        from marlin_tools.formats import FORMATS

        config["quantization_config"] = FORMATS["compressed-tensors"].quantization_config(128, ["lm_head"])
    fill_at_random(sparse=kind == "sparse")
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(config))
        print(json.dumps({"kind": kind, **measure(folder)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
