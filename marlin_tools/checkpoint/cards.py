"""What a model would be, without its weights: enough to plan with, offline and at once.

A card is the part of a config.json that decides shapes, written down here for the models that recipes name. transformers' own
modules, made on the meta device, say which tensors follow from it, so a card and a checkpoint have the same names and shapes.
A model of the hub that has no card is planned from its config.json, a few kilobytes.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from marlin_tools.checkpoint.headers import TensorInfo
from marlin_tools.checkpoint.reader import ALIASES, Checkpoint, hub_repository, read_config
from marlin_tools.checkpoint.skeleton import say_in_full
from marlin_tools.errors import ErrorTranslation, ModelError
from marlin_tools.resources import expanded

SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
"""What decides the shapes of a dense model's linears."""

_KEYS = (*SIZES, "vocab_size", "max_position_embeddings")


def _card(model_type: str, dtype: str, sizes: tuple[int, ...], *, tied: bool = False, **more: Any) -> dict[str, Any]:
    named = dict(zip(_KEYS, sizes, strict=True))
    return {"model_type": model_type, "dtype": dtype, "tie_word_embeddings": tied, **named, **more}


def _experts(count: int, chosen: int, inner: int | None = None, **more: Any) -> dict[str, Any]:
    sizes = {"moe_intermediate_size": inner} if inner else {}
    return {"num_experts" if inner else "num_local_experts": count, "num_experts_per_tok": chosen, **sizes, **more}


def _gemma3(*sizes: int) -> dict[str, Any]:
    """Gemma 3 with its eyes, which are the same in all sizes."""
    text = _card("gemma3_text", "bfloat16", sizes, tied=True, sliding_window=1024)
    eyes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    seen = {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14, "vision_use_head": False, **eyes}
    return {
        "model_type": "gemma3",
        "dtype": "bfloat16",
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": seen,
    }


def _qwen3_5(*sizes: int) -> dict[str, Any]:
    """Three gated delta nets, then one attention; transformers knows their sizes, and those of the eyes."""
    text = _card("qwen3_5_text", "bfloat16", sizes)
    return {"model_type": "qwen3_5", "dtype": "bfloat16", "text_config": text, "vision_config": {"out_hidden_size": sizes[0]}}


def _scout() -> dict[str, Any]:
    """Llama 4 Scout with its eyes."""
    sizes = (5120, 8192, 48, 40, 8, 128, 202048, 10485760)
    experts = _experts(16, 1, intermediate_size_mlp=16384, interleave_moe_layer_step=1)
    text = _card("llama4_text", "bfloat16", sizes, **experts)
    eyes = {"hidden_size": 1408, "intermediate_size": 5632, "num_hidden_layers": 34, "num_attention_heads": 16}
    bridge = dict.fromkeys(("projector_input_dim", "projector_output_dim", "vision_output_dim"), 4096)
    seen = {"model_type": "llama4_vision_model", "image_size": 336, "patch_size": 14, **eyes, **bridge}
    return {"model_type": "llama4", "dtype": "bfloat16", "text_config": text, "vision_config": seen}


CARDS: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": _card("llama", "float16", (4096, 11008, 32, 32, 32, 128, 32000, 4096)),
    "meta-llama/Llama-2-13b-hf": _card("llama", "float16", (5120, 13824, 40, 40, 40, 128, 32000, 4096)),
    "meta-llama/Llama-2-70b-hf": _card("llama", "float16", (8192, 28672, 80, 64, 8, 128, 32000, 4096)),
    "meta-llama/Meta-Llama-3-8B": _card("llama", "bfloat16", (4096, 14336, 32, 32, 8, 128, 128256, 8192)),
    "meta-llama/Llama-3.1-8B": _card("llama", "bfloat16", (4096, 14336, 32, 32, 8, 128, 128256, 131072)),
    "meta-llama/Llama-3.1-70B": _card("llama", "bfloat16", (8192, 28672, 80, 64, 8, 128, 128256, 131072)),
    "meta-llama/Llama-3.2-1B": _card("llama", "bfloat16", (2048, 8192, 16, 32, 8, 64, 128256, 131072), tied=True),
    "mistralai/Mistral-7B-v0.3": _card("mistral", "bfloat16", (4096, 14336, 32, 32, 8, 128, 32768, 32768)),
    "Qwen/Qwen2.5-0.5B": _card("qwen2", "bfloat16", (896, 4864, 24, 14, 2, 64, 151936, 32768), tied=True),
    "Qwen/Qwen2.5-7B": _card("qwen2", "bfloat16", (3584, 18944, 28, 28, 4, 128, 152064, 131072)),
    "Qwen/Qwen3-8B": _card("qwen3", "bfloat16", (4096, 12288, 36, 32, 8, 128, 151936, 40960)),
    "Qwen/Qwen3-30B-A3B": _card(
        "qwen3_moe", "bfloat16", (2048, 6144, 48, 32, 4, 128, 151936, 40960), **_experts(128, 8, 768, norm_topk_prob=True)
    ),
    "Qwen/Qwen3-235B-A22B": _card(
        "qwen3_moe", "bfloat16", (4096, 12288, 94, 64, 4, 128, 151936, 40960), **_experts(128, 8, 1536, norm_topk_prob=True)
    ),
    "openai/gpt-oss-20b": _card(
        "gpt_oss", "bfloat16", (2880, 2880, 24, 64, 8, 64, 201088, 131072), **_experts(32, 4, sliding_window=128)
    ),
    "openai/gpt-oss-120b": _card(
        "gpt_oss", "bfloat16", (2880, 2880, 36, 64, 8, 64, 201088, 131072), **_experts(128, 4, sliding_window=128)
    ),
    "mistralai/Mixtral-8x7B-v0.1": _card("mixtral", "bfloat16", (4096, 14336, 32, 32, 8, 128, 32000, 32768), **_experts(8, 2)),
    "microsoft/phi-4": _card("phi3", "bfloat16", (5120, 17920, 40, 40, 10, 128, 100352, 16384)),
    "Qwen/Qwen3.5-9B": _qwen3_5(4096, 12288, 32, 16, 4, 256, 248320, 32768),
    "meta-llama/Llama-4-Scout-17B-16E": _scout(),
    "google/gemma-3-4b-it": _gemma3(2560, 10240, 34, 8, 4, 256, 262208, 131072),
    "google/gemma-3-27b-it": _gemma3(5376, 21504, 62, 32, 16, 128, 262208, 131072),
    "google/gemma-2-9b": _card("gemma2", "float32", (3584, 14336, 42, 16, 8, 256, 256000, 8192), tied=True),
}


class Card(Checkpoint):
    """A checkpoint of which names, shapes and sizes are known, and nothing can be read."""

    def __init__(self, config: dict[str, Any], origin: str) -> None:
        self.path = Path(origin)
        self.origin = origin
        self.config = config
        self._tensors = {}  # so none of them says what type that is
        self._tensors = _tensors(config, self.dtype)


def shapes_of(name: str, layers: int = 0) -> dict[str, Any]:
    """The card of a language model that stands alone; it must have as many as `layers` blocks."""
    repository = ALIASES.get(name, name)
    flat = {each for each, card in CARDS.items() if "text_config" not in card}
    if repository not in flat:
        known = [alias for alias, each in ALIASES.items() if each in flat]
        raise ModelError(f"no shapes are known for `{name}`", hint=f"known: {', '.join(known)}")
    if layers > (blocks := int(CARDS[repository]["num_hidden_layers"])):
        raise ModelError(f"`{name}` has {blocks} blocks, fewer than {layers}", hint="lower `--layers`")
    return CARDS[repository]


def sketch(ref: str | Path | Checkpoint, accept: Callable[[dict[str, Any]], object] | None) -> Checkpoint:
    """The model that `ref` names, from disk if it is there, else from its card or its config.json; no weights are fetched."""
    if isinstance(ref, Checkpoint):
        return ref
    if str(ref) == "demo" or expanded(ref).is_dir():
        return Checkpoint.open(ref, accept)
    repository, revision = hub_repository(str(ref))
    if (cached := _cached(repository, revision, str(ref))) is not None:
        if accept is not None:
            accept(cached.config)
        return cached
    config = CARDS.get(repository) or _config_of_the_hub(repository, revision)
    if accept is not None:
        accept(config)
    return Card(config, str(ref))


def _cached(repository: str, revision: str | None, origin: str) -> Checkpoint | None:
    """The model in the hub's cache, if all of it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Checkpoint(Path(snapshot_download(repository, revision=revision, local_files_only=True)), origin)
    except (LocalEntryNotFoundError, ModelError):
        return None


def _config_of_the_hub(repository: str, revision: str | None) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        file = Path(hf_hub_download(repository, "config.json", revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"`{repository}` has no built-in shape card, is not in the local cache, and its config.json cannot be fetched",
            hint=f"check the spelling, the network and HF_TOKEN; models with a card: {', '.join(CARDS)}",
        ) from error
    return read_config(file.parent)


def _tensors(config: dict[str, Any], dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint with this config has, under the names that transformers would store them by."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.core_model_loading import revert_weight_conversion

    known = {key: value for key, value in config.items() if key not in {"model_type", "dtype", "torch_dtype"}}
    with (
        ErrorTranslation(ModelError, "config.json is not understood by transformers", "update transformers"),
        torch.device("meta"),
    ):
        settings = AutoConfig.for_model(config["model_type"], **deepcopy(known))
        say_in_full(settings)
        nested = settings.get_text_config() is not settings
        model = (AutoModelForMultimodalLM if nested else AutoModelForCausalLM).from_config(settings, dtype=dtype)
        head = model.get_output_embeddings()  # tied by config.json, or because models of this type are
        tied = {"lm_head.weight"} if head is not None and head.weight is model.get_input_embeddings().weight else set()
        tensors = revert_weight_conversion(model, {n: t for n, t in model.state_dict().items() if n not in tied})
    return {
        name: TensorInfo(Path(), tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }
