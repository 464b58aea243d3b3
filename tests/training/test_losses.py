"""Losses and their gradients in chunks against the plain definition, all logits at once, differentiated by torch."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from marlin_tools.training import losses
from marlin_tools.training.losses import Head, head_losses, square_head

B, L, H, V = 3, 11, 16, 40


def plain(student: Tensor, teacher: Tensor, ids: Tensor, heads: tuple[Head, Head]) -> tuple[Tensor, Tensor]:
    """(KL, CE) as they are defined."""

    def logits(hidden: Tensor, head: Head) -> Tensor:
        product = hidden @ head.weight.T * head.scale
        return cap * torch.tanh(product / cap) if (cap := head.cap) else product

    log_p, log_t = (
        torch.log_softmax(logits(hidden, head), dim=-1)[:, :-1] for hidden, head in zip((student, teacher), heads, strict=True)
    )
    kl = (log_t.exp() * (log_t - log_p)).sum(dim=-1).mean()
    return kl, F.nll_loss(log_p.flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (3.0, 1.0), (None, 0.3), (3.0, 2.0)])
@pytest.mark.parametrize(("kl", "ce"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_losses_and_gradient(monkeypatch: pytest.MonkeyPatch, cap: float | None, scale: float, kl: float, ce: float) -> None:
    monkeypatch.setattr(losses, "CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(B, L, H, generator=generator) for _ in range(2))
    heads = tuple(Head(torch.randn(V, H, generator=generator), cap, scale * (1 + i)) for i in range(2))
    ids = torch.randint(0, V, (B, L), generator=generator)
    found = head_losses(student, teacher, ids, heads, kl=kl, ce=ce)
    student.requires_grad_()
    expected = plain(student, teacher, ids, heads)
    (kl * expected[0] + ce * expected[1]).backward()
    torch.testing.assert_close((found.kl.float(), found.ce.float()), tuple(each.detach() for each in expected))
    torch.testing.assert_close(found.gradient, student.grad)


def test_a_student_that_is_the_teacher_has_nothing_to_learn() -> None:
    hidden, head = torch.randn(B, L, H), Head(torch.randn(V, H))
    found = head_losses(hidden, hidden, torch.zeros(B, L, dtype=torch.int64), (head, head))
    assert abs(float(found.kl)) < 1e-6
    assert float(found.gradient.abs().max()) < 1e-6


def test_square_head_is_relative_to_the_teacher() -> None:
    states = [torch.randn(2, 5, H), 100 * torch.randn(2, 5, H)]
    torch.testing.assert_close(square_head([1.1 * s for s in states], states), torch.tensor(0.01))


def test_square_head_is_not_about_one_token_that_is_far_longer_than_the_others() -> None:
    theirs = torch.randn(1, 9, H)
    theirs = theirs / theirs.norm(dim=-1, keepdim=True)
    theirs[0, 0] *= 1000
    ours = theirs.clone()
    ours[0, 1:] *= 1.1
    found = square_head([ours], [theirs])  # nine tokens count for 16, eight of them are a tenth off
    torch.testing.assert_close(found, torch.tensor(0.01 * 8 / (8 + 4.0**2)))
