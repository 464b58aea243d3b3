"""What a step follows, and what is measured: the same that plain models give, window by window."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.data.tokens import TokenSet
from marlin_tools.events import silent
from marlin_tools.training.compressed import compress
from marlin_tools.training.loop import Trainer, schedule, sequences_of

Run = Callable[..., Checkpoint]
Begin = Callable[..., Trainer]


class StopError(Exception):
    """Before the first step."""


@pytest.fixture
def begin(run: Run, monkeypatch: pytest.MonkeyPatch) -> Begin:
    """`begin(clip=..., ...)`: a trainer that is ready for its first step."""

    def call(**settings: Any) -> Trainer:
        made: list[Trainer] = []

        def stop(self: Trainer, *_: Any) -> None:
            made.append(self)
            raise StopError

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "run", stop)
            with pytest.raises(StopError):
                run(**settings)
        return made[0]

    return call


def divergence(student: Any, teacher: Any) -> Tensor:
    """KL, mean over the tokens that have a successor."""
    p, q = (F.log_softmax(each.logits[:, :-1].float(), dim=-1) for each in (student, teacher))
    return (q.exp() * (q - p)).sum(dim=-1).mean()


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize("clip", [1e6, 1e-3])
def test_a_step_follows_the_gradient_of_all_that_counts(
    begin: Begin, pruned: Path, teacher: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    trainer = begin(kl=0.5, ce=0.3, square_head=2.0, every=1, clip=clip, rate=1e-3)
    trainer.step = 5
    found: dict[str, Tensor] = {}
    monkeypatch.setattr(trainer._adam, "step", lambda: found.update({n: p.grad.clone() for n, p in trainer._trained.items()}))
    told = trainer.take(trainer.heads())

    student, original = plain(pruned), plain(teacher)
    chosen = sequences_of(5, 12, 4, 0)  # of fifteen windows, three are held out
    losses = torch.zeros(3)
    for part in (chosen[:2], chosen[2:]):
        ids = torch.stack([tokens.sequences[i] for i in part])
        ours = student(ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = original(ids, output_hidden_states=True)
        pairs = list(zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True))
        square = torch.stack([(s - t).square().mean() / t.square().mean() for s, t in pairs]).mean()
        follows = F.cross_entropy(ours.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        losses = losses + torch.stack((divergence(ours, theirs), follows, square)) / 2
    (losses * torch.tensor([0.5, 0.3, 2.0])).sum().backward()

    torch.testing.assert_close(told, losses.detach())
    expected = {}
    for name in found:
        owner, _, leaf = name.rpartition(".")
        if leaf == "values":
            positions: Any = trainer.student.model.get_submodule(owner).positions
            expected[name] = compress(student.get_submodule(owner).weight.grad, positions)
        else:
            expected[name] = student.get_parameter(name).grad
    length = float(torch.stack([each.norm() for each in expected.values()]).norm())
    assert length > 0.01
    share = min(1.0, clip / length)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name] * share, rtol=1e-3, atol=1e-5 * share)
    assert {group["lr"] for group in trainer._adam.param_groups} == {1e-3 * schedule(5, trainer.steps, trainer.settings)}


@torch.no_grad()
def test_what_is_measured_is_the_mean_over_all_that_is_held_out(
    begin: Begin, pruned: Path, teacher: Path, tokens: TokenSet
) -> None:
    """Two forwards, of two windows and of one."""
    trainer = begin(held_out=3, micro=2)
    trainer.measure(trainer.heads(), silent)
    ids = torch.stack(tokens.sequences[-3:])
    assert trainer.measured == [(0, pytest.approx(float(divergence(plain(pruned)(ids), plain(teacher)(ids))), rel=1e-4))]


def test_what_is_held_out_is_never_trained_on(begin: Begin, tokens: TokenSet) -> None:
    """The last of the text that is given; what the teacher writes is trained on."""
    alone, both = begin(), begin(sampled=2, seqlen=32)
    text = torch.stack(tokens.sequences)
    for trainer, written in ((alone, 0), (both, 2)):
        assert torch.equal(trainer._held_out, text[-3:])
        assert torch.equal(trainer._train[written:], text[:-3])
        assert len(trainer._train) == 12 + written
