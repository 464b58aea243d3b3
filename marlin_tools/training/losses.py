"""How far a student is from its teacher.

    KL          mean over tokens of Σ p_teacher (log p_teacher - log p_student), over the whole vocabulary
    CE          mean of -log p_student of the token that really follows
    SquareHead  mean over some hidden states of |h_student - h_teacher|² / |h_teacher|², arXiv 2310.06927

The logits of a batch would be larger than everything else together, so `head_losses` never has more than a few thousand tokens
of them: for each chunk it computes both losses and, both being a softmax away from the logits, their gradient in closed form:
(p_student - p_teacher) and (p_student - onehot). What goes back into the model is the gradient of its last hidden states.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 8192
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits: the weight [V, H] and the cap that some families put on logits."""

    weight: Tensor
    cap: float | None = None

    def logits(self, hidden_th: Tensor) -> Tensor:
        """[T, V] in float32."""
        hidden_th = hidden_th.to(self.weight.dtype)
        if hidden_th.is_cuda:  # a product in 16 bits that comes out in 32
            raw = torch.mm(hidden_th, self.weight.T, out_dtype=torch.float32)
        else:
            raw = (hidden_th @ self.weight.T).float()
        return raw if self.cap is None else self.cap * torch.tanh(raw / self.cap)

    def back(self, gradient_tv: Tensor, logits_tv: Tensor) -> Tensor:
        """The gradient of the logits as one of the hidden states."""
        if self.cap is not None:
            gradient_tv = gradient_tv * (1 - (logits_tv / self.cap).square())
        return gradient_tv.to(self.weight.dtype) @ self.weight


@dataclass(frozen=True)
class HeadLosses:
    """Means over the tokens that have a successor, and the gradient of `weights · losses` for the hidden states [B, L, H]."""

    kl: Tensor
    ce: Tensor
    gradient: Tensor


@torch.no_grad()
def head_losses(
    student_blh: Tensor, teacher_blh: Tensor, ids_bl: Tensor, heads: tuple[Head, Head], *, kl: float = 1.0, ce: float = 0.0
) -> HeadLosses:
    """Compare the distributions that follow from the last hidden states; `heads` are the student's and the teacher's."""
    student, teacher = student_blh[:, :-1].flatten(0, 1), teacher_blh[:, :-1].flatten(0, 1)
    following = ids_bl[:, 1:].flatten()
    gradient = torch.empty_like(student)
    sums = torch.zeros(2, dtype=torch.float64, device=student.device)
    for first in range(0, len(student), CHUNK):
        part = slice(first, first + CHUNK)
        logits = heads[0].logits(student[part])
        log_p = torch.log_softmax(logits, dim=1)
        log_t = torch.log_softmax(heads[1].logits(teacher[part]), dim=1)
        p_teacher = log_t.exp()
        sums[0] += (p_teacher * (log_t - log_p)).sum(dtype=torch.float64)
        picked = following[part, None]
        sums[1] -= log_p.gather(1, picked).sum(dtype=torch.float64)
        slope = log_p.exp_().mul_(kl + ce).sub_(p_teacher, alpha=kl)
        if ce:
            slope.scatter_add_(1, picked, torch.full_like(picked, -ce, dtype=slope.dtype))
        gradient[part] = heads[0].back(slope.div_(len(student)), logits).to(gradient.dtype)
    whole = torch.zeros_like(student_blh)
    whole[:, :-1] = gradient.view(student_blh.shape[0], -1, student_blh.shape[2])
    means = sums / len(student)
    return HeadLosses(means[0], means[1], whole)


def square_head(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """SquareHead, the mean over the pairs of hidden states given."""
    losses = [
        (s.float() - t.float()).square().mean() / t.float().square().mean() for s, t in zip(student, teacher, strict=True)
    ]
    return torch.stack(losses).mean()
