"""The same on GPUs: in bfloat16, and shared by two of them."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marlin_tools.checkpoint.reader import Checkpoint

pytestmark = pytest.mark.gpu


def zeros_are_kept(before: Checkpoint, after: Checkpoint) -> bool:
    return all(torch.equal(before.read(name) == 0, after.read(name) == 0) for name in before.names() if "proj" in name)


def test_the_student_learns_and_keeps_its_zeros(run: Callable[..., Checkpoint], pruned: Path) -> None:
    out = run(device="cuda", rate=1e-3, tokens=60 * 4 * 32)
    held_out = json.loads((out.path / "manifest.json").read_text())["held_out_kl"]
    assert held_out[-1][1] < 0.97 * held_out[0][1]
    assert zeros_are_kept(Checkpoint.open(pruned), out)


def test_recomputing_gives_the_same_losses(run: Callable[..., Checkpoint]) -> None:
    kept, recomputed = (run(name, device="cuda", rate=1e-3, recompute=name == "b") for name in ("a", "b"))
    first, second = (json.loads((out.path / "manifest.json").read_text())["held_out_kl"] for out in (kept, recomputed))
    assert first[-1][1] == pytest.approx(second[-1][1], rel=0.02)


def test_two_gpus_give_what_one_gives(
    start: Callable[..., subprocess.CompletedProcess[str]], teacher: Path, pruned: Path, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for processes in (1, 2):
        done = start(processes, teacher, pruned, tmp_path / str(processes), 0, device="cuda")
        assert done.returncode == 0, done.stderr
    one, two = (Checkpoint.open(tmp_path / str(processes)) for processes in (1, 2))
    assert zeros_are_kept(Checkpoint.open(pruned), two)
    first, second = (json.loads((out.path / "manifest.json").read_text())["held_out_kl"] for out in (one, two))
    assert first[-1][1] == pytest.approx(second[-1][1], rel=0.02)
