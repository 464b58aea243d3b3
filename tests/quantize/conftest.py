"""What the tests of the quantize stage share: tokens, settings, and ways to look at a result."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.data.tokens import TokenSet


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Six windows of 64 random tokens."""
    generator = torch.Generator().manual_seed(0)
    return TokenSet(tuple(torch.randint(2, 512, (6, 64), generator=generator)), "random", packed=True, documents=1)


@pytest.fixture
def run(tmp_path: Path, tokens: TokenSet) -> Callable[..., Checkpoint]:
    """`run(model, "name", preset="fast", ...)` quantises into `tmp_path/name` on the CPU."""

    def call(model: Path, name: str = "out", *, resume: bool = True, overwrite: bool = False, **settings: object) -> Checkpoint:
        chosen = QuantizeSettings(**{"preset": "fast", "device": "cpu", **settings})
        return quantize(model, tokens, chosen, tmp_path / name, overwrite=overwrite, resume=resume)

    return call


@pytest.fixture(scope="session")
def digest() -> Callable[[Path], dict[str, str]]:
    """sha256 of every file of a result; manifest.json without its `times`."""

    def of(directory: Path) -> dict[str, str]:
        found = {}
        for file in sorted(directory.rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                if file.name == "manifest.json":
                    content = json.dumps({k: v for k, v in json.loads(content).items() if k != "times"}).encode()
                found[str(file.relative_to(directory))] = hashlib.sha256(content).hexdigest()
        return found

    return of
