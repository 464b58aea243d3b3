"""By how much each token of the residual stream counts.

What a branch adds to the residual stream is next read through a norm, which divides each token by its own length: an error
counts relative to that. Most tokens of a text are about as long as each other, and counting all alike is as good. But many
models make a first token, on which attention rests where it has nothing to look at, a hundred times as long as the others.
Its square is then nine tenths of all squares of a text, and whatever is fitted to that text is fitted to one token.
"""

import torch
from torch import Tensor

LONGEST = 4.0
"""Times the median length; longer tokens count as if they were so long."""


def token_weights(hidden: Tensor) -> Tensor:
    """Factors [..., 1], at most 1, for tokens [..., H]: they make none longer than `LONGEST` allows."""
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    limit = LONGEST * length.median()
    return torch.where((length > limit) & (limit > 0), limit / length, 1.0)
