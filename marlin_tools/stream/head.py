"""What turns the last hidden states of a model into logits."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OutputHead:
    """The last norm, the weight [V, H] and bias, and what some families do to logits: multiply them, and cap them."""

    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    factor: float
    cap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits in float32."""
        logits = (self.norm(hidden) @ self.weight.T).float()
        logits = logits if self.bias is None else logits + self.bias.to(logits)
        logits = logits * self.factor
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
