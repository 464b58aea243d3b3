"""What calibration says about one group of linears: H = mean over tokens of x xᵀ, and the factor that the sweep needs.

Rounding a weight row w to q costs (w - q) H (w - q)ᵀ in squared output error, so H is all that the solver sees of the data.
Every token counts alike, whatever sequence it came from, unless it is far longer than the others (`stream/token_weights.py`).

The sweep needs one triangular factor, H + damping = R Rᵀ with R *upper* triangular: the Cholesky factor of the index-reversed
matrix. GPTQ's usual route (Cholesky, inverse, Cholesky of the inverse) ends at U = R⁻¹, so R gives the same codes for a quarter
of the work and without ever inverting anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from marlin_tools.errors import NumericalError
from marlin_tools.ops.solver.cholesky import blocks_of, inverse_of, reversed_cholesky
from marlin_tools.ops.solver.products import Parts, cross, gram, mirror, product

_ESCALATION = 10.0
_MAX_DAMP = 10.0


class Sharing(Protocol):
    """How several workers share what is done once for a whole matrix; `ALONE` does it here."""

    def each_row(self, n: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """All `n` rows of what `compute` gives for some."""

    def cholesky(self, matrix_kk: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """As `reversed_cholesky`."""


class _Alone:
    """One worker."""

    def each_row(self, n: int, compute: Callable[[slice], Tensor]) -> Tensor:
        """All rows at once."""
        return compute(slice(0, n))

    def cholesky(self, matrix_kk: Tensor) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """The plain way."""
        return reversed_cholesky(matrix_kk)


ALONE: Sharing = _Alone()
"""Nobody to share with."""


class Gram:
    """Accumulates Σ x xᵀ over activations. Products are exact in float32; chunks are summed in float32 in stream order."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.total = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """`x` is [..., K]; all leading dimensions are tokens."""
        x = x.reshape(-1, x.shape[-1])
        gram(self.total, x)
        self.tokens += x.shape[0]

    def hessian(self) -> "Hessian":
        """The mean over all tokens seen."""
        if self.tokens == 0:
            raise ValueError("no activations were added")
        mirror(self.total)
        return Hessian(self.total / self.tokens, self.tokens)


class CrossGram:
    """Accumulates Σ left rightᵀ over pairs of activations of the same tokens."""

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.total = torch.zeros(n, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, left: Tensor, right: Tensor) -> None:
        """[..., N] and [..., K]."""
        left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
        cross(self.total, left, right)
        self.tokens += left.shape[0]

    def mean(self) -> Tensor:
        """The mean over all tokens seen."""
        return self.total / self.tokens


@dataclass(frozen=True)
class Drift:
    """How far the activations have moved away from the original model's, as seen by one group: one of two matrices.

    inputs    [K, K] mean of (x_original - x) xᵀ, for linears of which only the inputs are compared
    outputs   [N, K] mean of (y_original - y) xᵀ, y what the weights as they are make of the input, plus the residual stream
              that it is added to

    Of several processes, each knows the rows that it is to work with.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None


@dataclass(frozen=True)
class Hessian:
    """`matrix` float32 [K, K] = mean of x xᵀ over `tokens` tokens; `drift` if the original model ran alongside.

    `noise` is a part of every damping, and `spread` says how much of it all channels get alike: see `unsure`.
    """

    matrix: Tensor
    tokens: int
    drift: Drift | None = None
    noise: float | Tensor = 0.0
    spread: float | Tensor = 0.0

    def unsure(self, noise: float) -> "Hessian":
        """The same, believed less: as if noise had been seen besides, `noise` tokens for each input.

        What few tokens say about pairs of channels is mostly chance, and error feedback would follow it. In that noise channels
        know nothing of each other, and each is as strong as it was seen. With few tokens for each input that is chance as well:
        each is as strong as the mean besides, by a share that fades with the square of the tokens.
        """
        few = len(self.matrix) / self.tokens
        return replace(self, noise=noise * few, spread=min(1.0, few))

    @property
    def diagonal(self) -> Tensor:
        """Mean energy of each input channel [K]."""
        return self.matrix.diagonal()

    def energy_order(self) -> Tensor:
        """Columns by falling energy; equal energies keep their order. Columns early in the sweep get the least error."""
        return torch.argsort(self.diagonal, descending=True, stable=True)

    @cached_property
    def _mean(self) -> Tensor:
        """Mean energy of all channels."""
        return self.diagonal.mean()

    def ridge(self, damp: float) -> Tensor:
        """What damping adds to the diagonal [K]: `damp` times its mean, and noise; a silent channel gets the mean besides."""
        mean, noise = self._mean, self.noise
        silent = torch.where(self.diagonal <= 0, torch.where(mean > 0, mean, 1.0), 0.0)
        everywhere = (damp + noise * self.spread) * mean.double()
        return silent + (everywhere + noise * self.diagonal.double()).float()

    def damped(self, damp: float) -> Tensor:
        """H with `ridge` added."""
        matrix = self.matrix.clone()
        matrix.diagonal().add_(self.ridge(damp))
        return matrix

    def factorize(self, damp: float, name: str, order: Tensor | None = None, sharing: Sharing = ALONE) -> "Factor":
        """R with R Rᵀ = damped H, its columns in this order.

        Raises the damping tenfold until the factorisation succeeds, then gives up by name.
        """
        if not bool(torch.isfinite(torch.linalg.vector_norm(self.matrix, torch.inf))):
            raise NumericalError(
                f"`{name}`: the calibration activations are not finite",
                hint="the model overflows in this precision: if float16, use a copy in bfloat16; or `--device cpu` (float32)",
            )
        used = damp
        while used <= _MAX_DAMP:
            factor, failed = self.attempt(used, order, sharing)
            if int(failed) == 0:
                return factor
            used = max(used * _ESCALATION, 1e-4)
        raise NumericalError(
            f"`{name}`: the Hessian cannot be factorised, even with damping {used / _ESCALATION:g}",
            hint="use more or more varied calibration text (`--num-samples`), or leave the layer out with `--ignore`",
        )

    def attempt(self, damp: float, order: Tensor | None = None, sharing: Sharing = ALONE) -> "tuple[Factor, Tensor]":
        """The same with this damping and nothing else, without waiting for the device; and 0 if that is a factor."""
        ridge = self.ridge(damp)
        matrix = (self.matrix if order is None else self.matrix[order][:, order]).double()
        matrix.diagonal().add_(ridge if order is None else ridge[order])
        upper, corners, failed = sharing.cholesky(matrix)
        del matrix
        return Factor(upper.float().contiguous(), damp, [corner.float() for corner in corners]), failed


@dataclass(frozen=True)
class Factor:
    """`upper` is R [K, K]; `damp` is the damping that made it possible.

    corners   the inverses of R's diagonal blocks, if somebody knows them
    """

    upper: Tensor
    damp: float
    corners: Sequence[Tensor] = ()

    def feedback(self, first: int = 0, last: int | None = None) -> Tensor:
        """M = R / diag(R), unit upper triangular: M[j, i] is how much of column j's error column i has to pay.

        Only the columns from `first` to `last`, without the rows below the diagonal block, where it is zero.
        """
        return self.upper[:last, first:last] / self.upper.diagonal()[first:last]

    @cached_property
    def _corner_inverses(self) -> Sequence[Tensor]:
        """The inverse of every diagonal block."""
        return self.corners or [inverse_of(self.upper[block, block].double()).float() for block in blocks_of(len(self.upper))]

    def divide(self, right_nk: Tensor) -> Tensor:
        """X with X · R Rᵀ = right, block by block: first Z Rᵀ = right from the last column back, then X R = Z forward."""
        upper, k = self.upper, self.upper.shape[0]
        result = right_nk.clone()
        done = Parts.like(result)
        blocks, inverses = blocks_of(k), self._corner_inverses
        for block, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
            rest = slice(block.stop, k)
            owed = result[:, block] - product(done[rest], upper[block, rest].T)
            result[:, block] = product(owed, inverse.T)
            done.put(block, result[:, block])
        for block, inverse in zip(blocks, inverses, strict=True):
            past = slice(0, block.start)
            owed = result[:, block] - product(done[past], upper[past, block])
            result[:, block] = product(owed, inverse)
            done.put(block, result[:, block])
        return result


class Correction:
    """What the weights of a group have to become so that their outputs move back by `share` of their drift.

    The best linear correction T of weights W solves T (H + damping) = W (H + damping) + share · owed: a least-squares fit of
    what the original model would have put out here, on the inputs that really arrive. What is owed because of the inputs alone
    is W · drift, so then a single matrix, drift · (H + damping)⁻¹, serves all rows. `factor` is that of H with its columns in
    `order`.
    """

    def __init__(self, drift: Drift, factor: Factor, order: Tensor, share: float, sharing: Sharing = ALONE) -> None:
        self._outputs, self._factor, self._order, self._share = drift.outputs, factor, order, share
        self._of_inputs = None
        if drift.inputs is not None:
            inputs = drift.inputs
            self._of_inputs = sharing.each_row(len(inputs), lambda rows: self._divided(inputs[rows]))

    def aim(self, weight_nk: Tensor, rows: slice | Tensor) -> Tensor:
        """The float32 weight to aim at, for these rows of the group; `weight` is what they are."""
        if self._of_inputs is not None:
            change_nk = product(Parts.of(weight_nk), self._of_inputs)
        else:
            assert self._outputs is not None, "drift of nothing"
            change_nk = self._divided(self._outputs[rows])
        return change_nk.mul_(self._share).add_(weight_nk)

    def _divided(self, owed_mk: Tensor) -> Tensor:
        change_mk = torch.empty_like(owed_mk)
        change_mk[:, self._order] = self._factor.divide(owed_mk[:, self._order])
        return change_mk
