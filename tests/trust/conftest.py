"""Quantised checkpoints of every format, and copies of them that can be damaged."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from marlin_tools.compress.export import export
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet
from marlin_tools.verification.verify import verify


@pytest.fixture(scope="session")
def original(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in `gptq`, calibrated, so that it has a reference to be compared with."""
    random = torch.Generator().manual_seed(0)
    windows = tuple(torch.randint(2, 512, (96,), generator=random) for _ in range(4))
    tokens = TokenSet(sequences=windows, source="noise", packed=True, documents=4)
    settings = QuantizeSettings(preset="fast", format="gptq", device="cpu")
    return quantize(tiny_model("llama"), tokens, settings, tmp_path_factory.mktemp("trust") / "gptq").path


@pytest.fixture(scope="session")
def in_format(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The same model in another format. The directories are shared: read them, or copy them first."""
    made = {"gptq": original}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = export(original, name, tmp_path_factory.mktemp("trust") / name).path
        return made[name]

    return make


@pytest.fixture
def copy(in_format: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model in some format, to be damaged."""

    def make(name: str = "gptq") -> Path:
        return Path(shutil.copytree(in_format(name), tmp_path / f"copy-{name}"))

    return make


@pytest.fixture
def rounded(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A tiny model rounded to nearest, which needs no calibration: `rounded("llama", num_key_value_heads=2)`."""

    def make(model_type: str = "llama", *, settings: dict | None = None, source: Path | None = None, **changes) -> Path:
        model = source or tiny_model(model_type, **changes)
        chosen = QuantizeSettings(**{"preset": "rtn", "format": "gptq", "device": "cpu"} | (settings or {}))
        return quantize(model, None, chosen, tmp_path / f"rounded-{chosen.format}").path

    return make


@pytest.fixture
def sparse(tiny_llama: Path, rounded: Callable[..., Path]) -> Path:
    """A tiny Llama in `gptq` that is 2:4 sparse throughout: of every four weights, the first two are zero."""
    with editing(tiny_llama, "model.norm.weight") as tensors:
        for name, weight in tensors.items():
            if name.endswith("_proj.weight"):
                weight.view(*weight.shape[:-1], -1, 4)[..., :2] = 0
    return rounded(source=tiny_llama)


@contextmanager
def editing(directory: Path, name: str) -> Iterator[dict[str, Tensor]]:
    """The tensors of the file that holds `name`, written back on leaving; the index, if there is one, is made to fit."""
    index = directory / "model.safetensors.index.json"
    places = json.loads(index.read_text()) if index.is_file() else {"weight_map": {name: "model.safetensors"}}
    shard = places["weight_map"][name]
    tensors = load_file(directory / shard)
    yield tensors
    save_file(tensors, directory / shard, metadata={"format": "pt"})
    others = {key: file for key, file in places["weight_map"].items() if file != shard}
    if index.is_file():
        index.write_text(json.dumps({**places, "weight_map": others | dict.fromkeys(tensors, shard)}))


@pytest.fixture
def edit():
    return editing


@pytest.fixture
def edit_json():
    """Change a JSON file in place."""

    def change(path: Path, **values) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.fixture
def tensors_of() -> Callable[[Path], dict[str, Tensor]]:
    """Everything that a model directory holds."""

    def read(directory: Path) -> dict[str, Tensor]:
        return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}

    return read


@pytest.fixture
def foreign(in_format: Callable[[str], Path], tensors_of, tmp_path: Path) -> Path:
    """What another tool's `gptq` checkpoint looks like: one file, no manifest, useless zero biases, a second config file."""
    source = in_format("gptq")
    target = tmp_path / "foreign"
    target.mkdir()
    tensors = tensors_of(source)
    codes = {name: tensor for name, tensor in tensors.items() if name.endswith(".qweight")}
    biases = {name.replace("qweight", "bias"): torch.zeros(tensor.shape[1]).half() for name, tensor in codes.items()}
    save_file(tensors | biases, target / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target)
    settings = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "quant_method": "gptq", "damp_percent": 0.01}
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": settings}
    (target / "config.json").write_text(json.dumps(config))
    (target / "quantize_config.json").write_text(json.dumps(settings))
    return target


@pytest.fixture
def failures() -> Callable[[Path], dict[str, str]]:
    """What `verify` finds wrong: details by check."""

    def look(directory: Path) -> dict[str, str]:
        verification = verify(directory)
        assert verification.ok == all(check.ok for check in verification.checks)
        return {check.name: check.detail for check in verification.checks if not check.ok}

    return look


def without_hashes(directory: Path) -> Path:
    """Drop the hashes from its manifest: any damage changes a file, and each check shall stand alone."""
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "files"}))
    return directory


@pytest.fixture
def forget_hashes() -> Callable[[Path], Path]:
    return without_hashes


@pytest.fixture
def damaged(copy: Callable[..., Path]) -> Path:
    """A `gptq` copy without hashes, about to be damaged."""
    return without_hashes(copy())
