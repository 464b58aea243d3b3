"""How far a student is from its teacher.

    KL          mean over tokens of Σ p_teacher (log p_teacher - log p_student), over the whole vocabulary
    CE          mean of -log p_student of the token that really follows
    SquareHead  mean over some hidden states of |h_student - h_teacher|² / |h_teacher|², arXiv 2310.06927; tokens that are far
                longer than the others count for less (`stream/token_weights.py`)

The logits of a batch would be larger than everything else together, so `head_losses` never has more than a few thousand tokens
of them: for each chunk `ops/model/compare.py` computes both losses and their gradient, on a GPU in one kernel. What goes back
into the model is the gradient of its last hidden states.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.ops.model.compare import compare
from marlin_tools.stream.token_weights import token_weights

CHUNK = 8192
"""Tokens whose logits exist at a time."""


@dataclass(frozen=True)
class Head:
    """Hidden states -> logits: the weight [V, H], what some families multiply the product with, the cap and bias of others."""

    weight: Tensor
    cap: float | None = None
    scale: float = 1.0
    bias: Tensor | None = None

    def product(self, hidden_th: Tensor) -> Tensor:
        """[T, V] in float32, without the cap."""
        hidden_th = hidden_th.to(self.weight.dtype)
        if hidden_th.is_cuda:  # a product in 16 bits that comes out in 32
            logits = torch.mm(hidden_th, self.weight.T, out_dtype=torch.float32)
        else:
            logits = (hidden_th @ self.weight.T).float()
        logits = logits if self.bias is None else logits.add_(self.bias)
        return logits if self.scale == 1 else logits.mul_(self.scale)


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
    weight, caps = heads[0].weight, (heads[0].cap, heads[1].cap)
    for first in range(0, len(student), CHUNK):
        part = slice(first, first + CHUNK)
        losses, slope = compare(
            (heads[0].product(student[part]), heads[1].product(teacher[part])),  # unnamed, so that they are gone afterwards
            following[part],
            (kl, ce),
            scale=heads[0].scale / len(student),
            caps=caps,
            dtype=weight.dtype,
        )
        sums += losses.sum(dim=0, dtype=torch.float64)
        gradient[part] = (slope @ weight).to(gradient.dtype)
    whole = torch.zeros_like(student_blh)
    whole[:, :-1] = gradient.view(student_blh.shape[0], -1, student_blh.shape[2])
    means = sums / len(student)
    return HeadLosses(means[0], means[1], whole)


def square_head(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """SquareHead, the mean over the pairs of hidden states given."""
    losses = []
    for ours, theirs in zip(student, teacher, strict=True):
        weights = token_weights(theirs)
        away, whole = (ours.float() - theirs.float()) * weights, theirs.float() * weights
        losses.append(away.square().mean() / whole.square().mean())
    return torch.stack(losses).mean()
