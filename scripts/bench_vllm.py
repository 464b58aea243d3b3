"""Milliseconds per token inside vLLM, of one kind of weights: what the tables in docs/serving.md were measured with.

    python scripts/bench_vllm.py fp16      # needs a GPU, and vLLM beside marlin-tools
    python scripts/bench_vllm.py machete   # vLLM's own kernel: the plugin is off
    python scripts/bench_vllm.py dense
    python scripts/bench_vllm.py sparse
    python scripts/bench_vllm.py fp8       # INT4 under activations in FP8; bfloat16
    python scripts/bench_vllm.py cutlass   # the same on vLLM's own kernel
    python scripts/bench_vllm.py dense --profile kernels.json
    python scripts/bench_vllm.py dense --shape llama2-70b --layers 8 --tensor-parallel 2

Llamas of true shapes with random weights, so nothing is downloaded. A process each, because vLLM keeps its GPU memory until it
ends. Prints one line of JSON, and with --profile writes the time of every kernel of a token, and of prompts.
"""

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

KINDS = ("fp16", "machete", "dense", "sparse", "fp8", "cutlass")
FP8 = ("fp8", "cutlass")
STOCK = ("machete", "cutlass")
"""Kinds without the plugin."""
BATCHES = (1, 8, 16, 32, 64, 128)
PROMPTS = (1, 4)
LENGTH = 2048
"""Tokens of a prompt."""
PROFILED = (1, 16, 64)
TIMES = 3
SHAPES = {
    "llama2-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "llama2-70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
KEY_VALUE_HEADS = {"llama2-7b": 32, "llama2-70b": 8}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write_config(folder: Path, kind: str, shape: str, layers: int | None) -> None:
    """What vLLM has to know of a model whose weights are made up, `layers` blocks of it if not all."""
    config: dict[str, Any] = {**CONFIG, **SHAPES[shape], "num_key_value_heads": KEY_VALUE_HEADS[shape]}
    if layers:
        config["num_hidden_layers"] = layers
    if kind != "fp16":
        from marlin_tools.formats import FORMATS
        from marlin_tools.formats.config import with_activations

        quantized = FORMATS["compressed-tensors"].quantization_config(128, ["lm_head"])
        config["quantization_config"] = with_activations(quantized, "fp8" if kind in FP8 else "16bit")
        config["torch_dtype"] = dtype_of(kind)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def dtype_of(kind: str) -> str:
    """Of activations in memory: CUTLASS knows bfloat16 alone."""
    return "bfloat16" if kind in FP8 else "float16"


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
            elif parameter.is_floating_point() and parameter.dim() == 2:
                parameter.data.normal_(0, 0.02)

    DummyModelLoader.load_weights = load_weights


class Engine:
    """vLLM with one model, asked for tokens that end nothing."""

    def __init__(self, folder: str, ranks: int, dtype: str) -> None:
        from vllm import LLM

        self.draw = random.Random(0)
        self.model = LLM(
            folder,
            load_format="dummy",
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=2304,
            gpu_memory_utilization=0.6,
            max_num_seqs=128,
            tensor_parallel_size=ranks,
            compilation_config={"cudagraph_capture_sizes": list(BATCHES)},
        )
        self.seconds(128, 64, 8)

    def seconds(self, prompts: int, length: int, new: int) -> float:
        """How long `new` tokens after each of some prompts take."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": [self.draw.randrange(3, 31000) for _ in range(length)]} for _ in range(prompts)]
        how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        self.model.generate(asked, how, use_tqdm=False)
        return time.perf_counter() - begin

    def measure(self) -> dict[str, float]:
        """Milliseconds per token by batch, 64 tokens in and 64 out, and of prompts of 2048 tokens."""
        found: dict[str, float] = {}
        for batch in BATCHES:
            whole = min(self.seconds(batch, 64, 64) for _ in range(TIMES))
            first = min(self.seconds(batch, 64, 1) for _ in range(TIMES))
            found[f"batch {batch}"] = (whole - first) / 63 * 1e3
        for prompts in PROMPTS:
            self.seconds(prompts, LENGTH, 1)
            found[f"{prompts} x {LENGTH}"] = min(self.seconds(prompts, LENGTH, 1) for _ in range(TIMES)) * 1e3
        return {name: round(value, 3) for name, value in found.items()}

    def profile(self) -> dict[str, dict[str, Any]]:
        """Of a token for each batch, and of prompts, microseconds: each kernel's, their number, and the gaps between them."""
        tokens = {f"batch {batch}": self._kernels(batch, 64, {17: 1, 1: -1}, 16) for batch in PROFILED}
        return tokens | {f"{prompts} x {LENGTH}": self._kernels(prompts, LENGTH, {1: 1}, 1) for prompts in PROMPTS}

    def _kernels(self, batch: int, length: int, runs: dict[int, int], share: int) -> dict[str, Any]:
        """Of `runs`, by how many tokens they make, each with its sign: their sum over `share`."""
        from torch._C._autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        spent: Counter[str] = Counter()
        started: Counter[str] = Counter()
        between = 0.0
        for new, sign in runs.items():
            self.seconds(batch, length, new)
            with profile(activities=[ProfilerActivity.CUDA]) as record:
                self.seconds(batch, length, new)
            ran = [event for event in record.events() if event.device_type == DeviceType.CUDA]
            events = sorted((event.time_range.start, event.time_range.end, event.name) for event in ran)
            reached = events[0][0]
            for begin, end, name in events:
                spent[name] += sign * (end - begin)
                started[name] += sign
                between += sign * max(begin - reached, 0)
                reached = max(reached, end)
        kernels = [
            [name[:160], round(spent[name] / share, 2), round(started[name] / share, 2)]
            for name in sorted(spent, key=lambda name: -spent[name])
        ]
        return {"gaps": round(between / share, 1), "kernels": kernels}


def main() -> int:
    """The kind that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama2-7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="GPUS")
    parser.add_argument("--profile", type=Path, metavar="FILE")
    asked = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are filled in this very process,
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # or in those that are made of it
    if asked.kind in STOCK:
        os.environ["MARLIN_TOOLS_VLLM"] = "0"
    fill_at_random(sparse=asked.kind == "sparse")
    with TemporaryDirectory() as folder:
        write_config(Path(folder), asked.kind, asked.shape, asked.layers)
        engine = Engine(folder, asked.tensor_parallel, dtype_of(asked.kind))
        print(json.dumps({"kind": asked.kind, **engine.measure()}), flush=True)
        if asked.profile:
            asked.profile.write_text(json.dumps({"kind": asked.kind, **engine.profile()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
