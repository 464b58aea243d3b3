"""Two processes that share weights, gradients and optimiser state give what one gives."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from forked import started
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.distributed.team import Team
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


SPOILED = """
import sys
import torch
from marlin_tools.data.tokens import TokenSet
from marlin_tools.training.finetune import FinetuneSettings, finetune
from marlin_tools.training.loop import Trainer

teacher, pruned, out = sys.argv[1:]
take = Trainer.take

def norm(self):
    return self.student.model.model.norm.weight

def taking(self, heads):
    read = self.student.read

    def looking(ids):
        found = read(ids)
        used = norm(self).detach()
        kept = self._trained["model.norm.weight"].full_tensor()
        assert torch.equal(used, kept), f"step {self.step} reads another norm than the one that learns"
        return found

    self.student.read = looking
    losses = take(self, heads)
    self.student.read = read
    return losses

Trainer.take = taking
text = torch.randint(2, 512, (15, 32), generator=torch.Generator().manual_seed(0))
settings = FinetuneSettings(
    teacher=teacher, tokens=1024, batch=4, micro=2, held_out=3, evaluations=8, saves=1, rate=0.5, average=0.9, device="cpu"
)
finetune(pruned, TokenSet(tuple(text), "random", packed=True, documents=1), settings, out)
"""


def test_two_processes_go_back_to_the_best_state(teacher: Path, pruned: Path, tmp_path: Path) -> None:
    """All of it: also of what is in no block. And a step after a measurement reads what has learned, not the mean."""
    (tmp_path / "spoiled.py").write_text(SPOILED)
    arguments = [str(each) for each in (tmp_path / "spoiled.py", teacher, pruned, tmp_path / "out")]
    with started(2, arguments, tmp_path / "log") as processes:
        ends, said = [process.ended(240) for process in processes], [process.said for process in processes]
    assert [0, 0] == ends, said
    after, before = Checkpoint.open(tmp_path / "out"), Checkpoint.open(pruned)
    assert json.loads((after.path / "manifest.json").read_text())["best_step"] == 0
    assert [] == [name for name in before.names() if not torch.equal(before.read(name), after.read(name))]


KILLED = """
import os
import signal
import sys
from marlin_tools.cli import main
from marlin_tools.training.loop import Trainer

teacher, pruned, out, text, victim = sys.argv[1:]
take = Trainer.take

def dying(self, heads):
    if self.step == 3 and os.environ["RANK"] == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, heads)

Trainer.take = dying
main(["finetune", pruned, "--teacher", teacher, "--calib", text, "--num-samples", "12", "--seqlen", "32", "--batch", "4",
      "--micro", "2", "--tokens", "1024", "--device", "cpu", "-o", out])
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_is_killed_ends_the_other_in_one_line(teacher: Path, pruned: Path, tmp_path: Path, victim: int) -> None:
    """Even if what it waits for is an exchange of torch's own."""
    (tmp_path / "killed.py").write_text(KILLED)
    (tmp_path / "text.txt").write_text(" ".join(f"The {n} marlins and the {n * n % 97} boats." for n in range(300)))
    arguments = [str(each) for each in ("killed.py", teacher, pruned, tmp_path / "out", tmp_path / "text.txt", victim)]
    with started(2, [str(tmp_path / arguments[0]), *arguments[1:]], tmp_path / "log") as processes:
        ends, said = [process.ended(240) for process in processes], [process.said for process in processes]
    left = said[1 - victim]
    assert (-9, 2) == (ends[victim], ends[1 - victim]), left
    errors = [line for line in left.splitlines() if line.startswith(("error: ", "hint: ", "Traceback"))]
    assert 2 == len(errors), left
    assert errors[0].startswith(f"error: process {1 - victim}: another process is gone: ")
    assert errors[1] == "hint: what it said last is the cause; the same command goes on after the last saved state"


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:2. This is typical."), True),
        (RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, remote process exited"), True),
        (torch.distributed.DistBackendError("timed out"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("out of memory"), False),
    ],
)
def test_only_a_failed_exchange_is_another_process_gone(error: RuntimeError, translated: bool) -> None:
    with pytest.raises(DeviceError if translated else type(error)) as raised, Team(size=2).talking():
        raise error
    assert translated == str(raised.value).startswith("another process is gone: ")
    with pytest.raises(type(error)), Team().talking():
        raise error


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
