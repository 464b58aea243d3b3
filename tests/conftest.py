"""What every test can count on: no network, no cache but its own, one thread per worker, and tiny models with legal shapes."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

_hub = TemporaryDirectory(prefix="marlin-tools-tests-")
# Before anything imports huggingface_hub or torch: both read these once. Child processes inherit them.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    HF_HOME=_hub.name,
    TOKENIZERS_PARALLELISM="false",
)
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism


def pytest_unconfigure() -> None:
    _hub.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped, with the reason, where there is no device; `make test-gpu` refuses to run there at all."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


class NetworkUsedError(RuntimeError):
    """A test reached for the network; not an OSError, so that no retry loop can swallow it."""


def _check(host: Any) -> None:
    if host not in {"127.0.0.1", "::1", "localhost", None}:
        raise NetworkUsedError(f"a test tried to reach `{host}`")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine can be connected to, and no name but its own can be looked up."""
    look_up = socket.getaddrinfo

    def guard(connect: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(self: socket.socket, address: Any) -> Any:
            if isinstance(address, tuple):  # a path is a Unix socket
                _check(address[0])
            return connect(self, address)

        return guarded

    def guarded_look_up(host: Any, *args: Any, **kwargs: Any) -> Any:
        _check(host)
        return look_up(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", guard(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_look_up)


# ---- tiny models ------------------------------------------------------------------------------------------------------

VOCABULARY = 512
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TEXT = "The boat left the harbour at dawn. Nine marlins were seen off the point, and the skipper counted them twice.\n"


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE that can spell any text: 2 marks, 256 bytes, and as many merges as the text above yields."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>").save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("llama", tie_word_embeddings=True)`: a checkpoint of that `model_type` with seeded random weights and biases.

    The directory is shared by the whole session: read it, or copy it first.
    """
    made: dict[str, Path] = {}

    def make(model_type: str, **changes: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        key = f"{model_type} {sorted(changes.items())}"
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{model_type}-")
            config = AutoConfig.for_model(model_type, **(SHAPE | changes))
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
                for name, parameter in model.named_parameters():
                    if name.endswith("bias") and not parameter.any():  # who forgets a bias of zeros does nothing wrong
                        torch.nn.init.normal_(parameter, std=0.1)
            model.save_pretrained(folder)
            write_tokenizer(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiled kernels, shared by the processes of a run and, if `KERNEL_CACHE` names a folder, with other runs."""
    from marlin_tools.ops.runtime.cubin_cache import CubinCache

    own = tmp_path_factory.getbasetemp()
    usual = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "kernels"
    return CubinCache(Path(os.environ.get("KERNEL_CACHE", usual)))


def _copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@pytest.fixture
def tiny_llama(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """A Llama of two blocks, the test's own copy: hidden 256, 4 heads of 64, MLP 512, 512 tokens, float16."""
    return _copied(tiny_model("llama"), tmp_path / "tiny-llama")


@pytest.fixture
def tiny_mistral(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """The same shapes as a Mistral with a sliding window shorter than its context."""
    return _copied(tiny_model("mistral", sliding_window=64), tmp_path / "tiny-mistral")


@pytest.fixture
def tiny_qwen2(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """The same shapes as a Qwen2: q, k and v have biases, and the head is tied to the embedding."""
    return _copied(tiny_model("qwen2", tie_word_embeddings=True), tmp_path / "tiny-qwen2")


@pytest.fixture
def tiny_qwen3(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """The same shapes as a Qwen3: q and k are normalised per head."""
    return _copied(tiny_model("qwen3"), tmp_path / "tiny-qwen3")
