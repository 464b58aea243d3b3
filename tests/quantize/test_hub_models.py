"""Models of the hub, by alias, from a cache as `huggingface_hub` leaves it; never the network."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlin_tools.checkpoint.reader import ALIASES, Checkpoint
from marlin_tools.errors import ModelError
from marlin_tools.formats.stored import StoredLinears

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], Path]:
    """Put a model directory into a hub cache of this test's own, under the name of a repository."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def put(model: Path, repository: str) -> Path:
        entry = cache / f"models--{repository.replace('/', '--')}"
        (entry / "refs").mkdir(parents=True)
        (entry / "refs" / "main").write_text(COMMIT)
        return Path(shutil.copytree(model, entry / "snapshots" / COMMIT))

    return put


def test_an_alias_is_quantized_from_the_cache(
    tiny_llama: Path, cached: Callable[[Path, str], Path], run: Callable[..., Checkpoint]
) -> None:
    snapshot = cached(tiny_llama, "meta-llama/Llama-2-7b-hf")
    checkpoint = Checkpoint.open("llama2-7b")

    assert checkpoint.path == snapshot
    assert checkpoint.origin == "llama2-7b"
    assert len(StoredLinears(run("llama2-7b")).names) == 14


def test_a_revision_is_the_one_that_is_named(tiny_llama: Path, cached: Callable[[Path, str], Path]) -> None:
    snapshot = cached(tiny_llama, "meta-llama/Llama-2-7b-hf")

    for ref in (f"llama2-7b@{COMMIT}", f"meta-llama/Llama-2-7b-hf@{COMMIT}", "llama2-7b@main"):
        assert Checkpoint.open(ref).path == snapshot
        assert Checkpoint.open(ref).origin == ref
    with pytest.raises(ModelError, match=f"`meta-llama/Llama-2-7b-hf` at revision `{'f' * 40}` is not in the local cache"):
        Checkpoint.open(f"llama2-7b@{'f' * 40}")


def test_a_model_that_cannot_be_done_is_refused_by_its_config(tiny_llama: Path, cached: Callable[[Path, str], Path]) -> None:
    """config.json is judged before any weights are looked for: here there are none."""
    snapshot = cached(tiny_llama, "someone/mixture")
    (snapshot / "model.safetensors").unlink()

    def refuse(config: dict[str, Any]) -> None:
        raise ModelError(f"no {config['model_type']}", hint="another")

    with pytest.raises(ModelError, match="no llama"):
        Checkpoint.open("someone/mixture", accept=refuse)
    with pytest.raises(ModelError, match="holds no"):
        Checkpoint.open("someone/mixture")


def test_aliases_name_repositories() -> None:
    assert all(repository.count("/") == 1 for repository in ALIASES.values())
    assert "demo" not in ALIASES
    assert Checkpoint.open("demo").config["model_type"] == "llama"


def test_the_hub_cache_names_files_by_their_hash(tmp_path: Path, tiny_llama: Path) -> None:
    """A blob's name is its sha256, so that large files need not be read to be recognised."""
    import hashlib

    linked = tmp_path / "models--o--n" / "snapshots" / "0123"
    shutil.copytree(tiny_llama, linked)
    (tmp_path / "models--o--n" / "blobs").mkdir()
    blob = tmp_path / "models--o--n" / "blobs" / hashlib.sha256((linked / "model.safetensors").read_bytes()).hexdigest()
    (linked / "model.safetensors").rename(blob)
    (linked / "model.safetensors").symlink_to(blob)

    assert Checkpoint.open(linked).fingerprint == Checkpoint.open(tiny_llama).fingerprint


def test_a_result_that_is_not_there_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(ModelError, match="there is no directory `runs/nothing`"):
        Checkpoint.open("runs/nothing")
