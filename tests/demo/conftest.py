"""The embedded model, read once, and the scripts that made it."""

import sys
from pathlib import Path
from typing import Any

import pytest

from marlin_tools.resources import demo_dir

sys.path.insert(
    0, str(Path(__file__).resolve().parents[2] / "scripts")
)  # they import each other as neighbours, as when they are run


@pytest.fixture(scope="session")
def demo() -> Path:
    return demo_dir()


@pytest.fixture(scope="session")
def tokenizer(demo: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo / "model")


@pytest.fixture(scope="session")
def model(demo: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo / "model", dtype=torch.float32).eval()
