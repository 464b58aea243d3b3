"""Two processes that share weights, gradients and optimiser state give what one gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forked import started
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import DeviceError, RecipeError
from marlin_tools.training.finetune import FinetuneSettings, check_pair
from marlin_tools.training.parallel import training_team


def test_two_processes_give_what_one_gives(
    run: Callable[..., Checkpoint], script: Path, teacher: Path, pruned: Path, tmp_path: Path
) -> None:
    def train(stop: int) -> tuple[list[int], list[str]]:
        arguments = [str(each) for each in (script, teacher, pruned, tmp_path / "two", stop, "cpu")]
        with started(2, arguments, tmp_path / f"until-{stop}.log") as processes:
            return [process.ended(240) for process in processes], [process.said for process in processes]

    one = run("one", rate=3e-4)
    ends, said = train(5)
    assert 3 == ends[0], said  # killed on its way
    assert (tmp_path / "two.partial" / "state" / "training.safetensors").is_file()
    ends, said = train(0)
    assert [0, 0] == ends, said
    two, before = (Checkpoint.open(path) for path in (tmp_path / "two", pruned))
    for name in one.names():
        torch.testing.assert_close(two.read(name).float(), one.read(name).float(), rtol=0, atol=2e-4)
        if "proj" in name:
            assert torch.equal(two.read(name) == 0, before.read(name) == 0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="process 1 has no GPU of its own"), training_team(torch.device("cuda", 0)):
        pass


def test_batches_must_divide_among_processes(monkeypatch: pytest.MonkeyPatch, teacher: Path, pruned: Path) -> None:
    """Every process takes every n-th micro-batch of a step; none may be left without."""
    pair = Checkpoint.open(pruned), Checkpoint.open(teacher)
    settings = FinetuneSettings(teacher=str(teacher), batch=4, micro=2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_pair(*pair, settings, quantized=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match="2 times 4 processes"):
        check_pair(*pair, settings, quantized=False)
