"""What calibration says about one group of linears: H = mean over tokens of x xᵀ, and the factor that the sweep needs.

Rounding a weight row w to q costs (w - q) H (w - q)ᵀ in squared output error, so H is all that the solver sees of the data.
Every token weighs the same, whatever sequence it came from.

The sweep needs one triangular factor, H + damping = R Rᵀ with R *upper* triangular: the Cholesky factor of the index-reversed
matrix. GPTQ's usual route (Cholesky, inverse, Cholesky of the inverse) ends at U = R⁻¹, so R gives the same codes for a quarter
of the work and without ever inverting anything.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin_tools.errors import NumericalError

_ESCALATION = 10.0
_MAX_DAMP = 10.0


class Gram:
    """Accumulates Σ x xᵀ over activations. Products are exact in float32; chunks are summed in float32 in stream order."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.total = torch.zeros(k, k, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """`x` is [..., K]; all leading dimensions are tokens."""
        x = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.total.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def hessian(self, drift: "Drift | None" = None) -> "Hessian":
        """The mean over all tokens seen."""
        if self.tokens == 0:
            raise ValueError("no activations were added")
        return Hessian(self.total / self.tokens, self.tokens, drift)


@dataclass(frozen=True)
class Drift:
    """How far the activations have moved away from the original model's, as seen by one group.

    inputs    [K, K] mean of (x_original - x) xᵀ
    residual  [N, K] mean of (h_original - h) xᵀ for a linear whose output is added to the residual stream h, else None
    """

    inputs: Tensor
    residual: Tensor | None


@dataclass(frozen=True)
class Hessian:
    """`matrix` float32 [K, K] = mean of x xᵀ over `tokens` tokens; `drift` if the original model ran alongside."""

    matrix: Tensor
    tokens: int
    drift: Drift | None = None

    @property
    def diagonal(self) -> Tensor:
        """Mean energy of each input channel [K]."""
        return self.matrix.diagonal()

    def energy_order(self) -> Tensor:
        """Columns by falling energy; equal energies keep their order. Columns early in the sweep get the least error."""
        return torch.argsort(self.diagonal, descending=True, stable=True)

    def permuted(self, order: Tensor) -> "Hessian":
        """The same Hessian with its columns renamed."""
        return Hessian(self.matrix[order][:, order], self.tokens)

    def damped(self, damp: float) -> Tensor:
        """H with `damp` times its mean energy on the diagonal; a channel that never fired gets the mean energy."""
        diagonal = self.diagonal
        mean = float(diagonal.mean())
        matrix = self.matrix.clone()
        matrix.diagonal().add_(torch.where(diagonal <= 0, mean if mean > 0 else 1.0, 0.0) + damp * mean)
        return matrix

    def factorise(self, damp: float, name: str) -> "Factor":
        """R with R Rᵀ = damped H. Raises the damping tenfold until the factorisation succeeds, then gives up by name."""
        if not bool(torch.isfinite(self.matrix).all()):
            raise NumericalError(
                f"`{name}`: the calibration activations are not finite",
                hint="the model overflows in this precision; try `--device cpu`, which computes in float32",
            )
        used = damp
        while used <= _MAX_DAMP:
            reversed_lower, info = torch.linalg.cholesky_ex(self.damped(used).double().flip(0, 1))
            if int(info) == 0:
                return Factor(reversed_lower.flip(0, 1).float().contiguous(), used)
            used = max(used * _ESCALATION, 1e-4)
        raise NumericalError(
            f"`{name}`: the Hessian cannot be factorised, even with damping {used / _ESCALATION:g}",
            hint="use more or more varied calibration text (`--num-samples`), or leave the layer out with `--ignore`",
        )


@dataclass(frozen=True)
class Factor:
    """`upper` is R [K, K]; `damp` is the damping that made it possible."""

    upper: Tensor
    damp: float

    def feedback(self) -> Tensor:
        """M = R / diag(R), unit upper triangular: M[j, i] is how much of column j's error column i has to pay."""
        return self.upper / self.upper.diagonal()


def corrected(weight_nk: Tensor, hessian: Hessian, share: float, damp: float) -> Tensor:
    """The weight to aim at so that the output moves back by `share` of its drift from the original model's output.

    The best linear correction solves T (H + damping) = W (H + damping) + share · (W · drift_x + drift_h): a least-squares fit
    of what the original model would have put out here, on the inputs that really arrive.
    """
    if hessian.drift is None or share == 0:
        return weight_nk
    owed_nk = weight_nk @ hessian.drift.inputs
    if hessian.drift.residual is not None:
        owed_nk += hessian.drift.residual
    lower = torch.linalg.cholesky(hessian.damped(damp).double())
    return weight_nk + share * torch.cholesky_solve(owed_nk.T.double(), lower).T.float()
