"""A tiny teacher, the same model pruned, and text that the teacher has written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.data.tokens import TokenSet
from marlin_tools.training.finetune import FinetuneSettings, finetune

SETTINGS = {
    "tokens": 8 * 4 * 32,
    "batch": 4,
    "micro": 2,
    "held_out": 3,
    "evaluations": 2,
    "saves": 4,
    "rate": 3e-3,
    "device": "cpu",
}


SCRIPT = """
import sys
import torch
from marlin_tools.data.tokens import TokenSet
from marlin_tools.training.finetune import FinetuneSettings, finetune

teacher, pruned, out, stop, device = sys.argv[1:]

def emit(event):
    if stop != "0" and event.text == "steps" and event.done >= int(stop):
        raise SystemExit(3)

text = torch.randint(2, 512, (15, 32), generator=torch.Generator().manual_seed(0))
settings = FinetuneSettings(
    teacher=teacher, tokens=1024, batch=4, micro=2, held_out=3, evaluations=2, saves=4, rate=3e-4, device=device
)
finetune(pruned, TokenSet(tuple(text), "random", packed=True, documents=1), settings, out, emit=emit)
"""


@pytest.fixture(scope="session")
def teacher(tiny_model: Callable[..., Path]) -> Path:
    """Shared by the session: read it, or copy it first."""
    return tiny_model("llama")


@pytest.fixture(scope="session")
def pruned(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher with two of four weights left, by magnitude."""
    return prune(teacher, None, PruneSettings(preset="magnitude", device="cpu"), tmp_path_factory.mktemp("pruned") / "out").path


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Fifteen windows of 32 random tokens."""
    generator = torch.Generator().manual_seed(0)
    return TokenSet(tuple(torch.randint(2, 512, (15, 32), generator=generator)), "random", packed=True, documents=1)


@pytest.fixture
def run(tmp_path: Path, teacher: Path, pruned: Path, tokens: TokenSet) -> Callable[..., Checkpoint]:
    """`run("name", rate=..., ...)` trains the pruned model into `tmp_path/name` on the CPU."""

    def call(
        name: str = "out", *, model: Path = pruned, text: TokenSet | None = tokens, how: Any = None, **settings: Any
    ) -> Checkpoint:
        chosen = FinetuneSettings(**{"teacher": str(teacher), **SETTINGS, **settings})
        return finetune(model, text, chosen, tmp_path / name, **(how or {}))

    return call


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """`python train.py teacher pruned out 5 cpu` trains and ends at step 5 as if killed; 0 lets it finish."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def start(script: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`start(2, teacher, pruned, out, 5)` trains in two processes of `torchrun`."""

    def call(processes: int, *arguments: object, device: str = "cpu") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script)]
        if processes > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            command = [sys.executable, *launch, str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
        words = [*command, *map(str, arguments), device]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=240, check=False)

    return call
