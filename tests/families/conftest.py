"""Tiny models of every type that can be worked on; nothing in them is 0 or 1."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.stream.layer_stream import LayerStream
from tiny_models import CASES, TEXT, VOCABULARY
from tiny_nested import NESTED_CASES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `model_type` runs for every type."""
    marked = [mark for mark in metafunc.definition.iter_markers("parametrize") if "model_type" in str(mark.args[0])]
    if "model_type" in metafunc.fixturenames and not marked:
        metafunc.parametrize("model_type", [*CASES, *NESTED_CASES])


def _eager(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    return AutoModelForMultimodalLM if model_type in NESTED_CASES else AutoModelForCausalLM


_NAMES = {
    "backbone.embedding.": "backbone.embeddings.",
    "language_model.model.model.": "language_model.model.",
    "language_model.model.encoder.": "language_model.model.",
}
"""What transformers calls tensors as it writes them, where nobody reads them by that, and what they are called on the hub."""


def _name_as_on_the_hub(file: Path) -> None:
    """As transformers reads it, and engines do."""
    tensors = load_file(file)
    found = {name: begin for name in tensors for begin in _NAMES if name.startswith(begin)}
    if found:
        named = {_NAMES[begin] + name.removeprefix(begin): tensors.pop(name) for name, begin in found.items()}
        save_file(tensors | named, file, {"format": "pt"})


def _write_words(folder: Path) -> None:
    """A tokenizer that knows the words of one sentence, and one for all others."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "?", *"The boat left the harbour at dawn".split()]
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "?"}
    PreTrainedTokenizerFast(tokenizer_object=known, **marks).save_pretrained(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of this type."""
    from transformers import AutoConfig

    folders: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in folders:
            settings = NESTED_CASES.get(model_type) or {**TEXT, **CASES[model_type]}
            model = _eager(model_type).from_config(
                AutoConfig.for_model(model_type.partition("-")[0], **settings), dtype=torch.float32
            )
            generator = torch.Generator().manual_seed(0)
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(noise.mul_(0.1).add_(0.5) if tensor.ndim == 1 else noise.mul_(0.15))
            folders[model_type] = tmp_path_factory.mktemp(f"tiny-{model_type}-")
            model.half().save_pretrained(folders[model_type])
            _name_as_on_the_hub(folders[model_type] / "model.safetensors")
            _write_words(folders[model_type])
        return folders[model_type]

    return make


@pytest.fixture(scope="session")
def quantized(made: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """The same in INT4, rounded to nearest."""
    results: dict[str, Checkpoint] = {}

    def make(model_type: str) -> Checkpoint:
        if model_type not in results:
            folder = tmp_path_factory.mktemp(f"int4-{model_type}-") / "out"
            results[model_type] = quantize(made(model_type), None, QuantizeSettings(preset="rtn", group_size=32), folder)
        return results[model_type]

    return make


def _reader(model_type: str) -> Callable[..., Any]:
    """What reads a model of this type. Qwen2.5-Omni's own way asks for voices even if it has none."""
    if model_type != "qwen2_5_omni":
        return _eager(model_type).from_pretrained
    from transformers import PreTrainedModel, Qwen2_5OmniForConditionalGeneration

    return partial(PreTrainedModel.from_pretrained.__func__, Qwen2_5OmniForConditionalGeneration)


@pytest.fixture(scope="session")
def eager() -> Callable[[str, Path], torch.nn.Module]:
    """A model of this type as transformers loads it, computed in the plainest way."""

    def load(model_type: str, path: Path) -> torch.nn.Module:
        plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = _reader(model_type)(path, dtype=torch.float32, **plain).eval()
        if (thinker := getattr(model, "thinker", None)) is not None:
            for hook in [*model._forward_pre_hooks.values()]:
                hook(model, ())  # of compressed-tensors, which waits for the whole to be called
            model = thinker
        return torch.nn.Module.float(model)  # of a quantised model, what was dequantised too

    return load


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Three sequences, of two lengths."""
    generator = torch.Generator().manual_seed(0)
    sequences = tuple(torch.randint(2, VOCABULARY, (n,), generator=generator) for n in (40, 40, 23))
    return TokenSet(sequences, "test", False, 3)


@pytest.fixture(scope="session")
def same_logits(eager: Callable[[str, Path], torch.nn.Module], tokens: TokenSet) -> Callable[[str, Path], None]:
    """Compare what the stream makes of a model of this type with what transformers makes of it."""

    @torch.no_grad()
    def compare(model_type: str, path: Path) -> None:
        stream = LayerStream(Checkpoint.open(path), tokens, frozenset(), torch.device("cpu"))
        for block in stream:
            block.skip()
        ids, logits = stream.logits(40)
        expected = eager(model_type, path)(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))

    return compare
