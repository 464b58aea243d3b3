"""2:4 masks, SparseGPT, least squares on the kept positions, choosing them again, and INT4 on top, against direct oracles."""

from itertools import combinations, product

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, PRUNER_OF, PRUNERS, RTN, Hessian, Pruner
from marlin_tools.algorithms.alternation import Alternation
from marlin_tools.algorithms.hessian import Drift
from marlin_tools.algorithms.masks import magnitude, of_pair, pair_of, two_largest, wanda
from marlin_tools.algorithms.polish import row_losses
from marlin_tools.algorithms.support import fit, reselect
from marlin_tools.errors import NumericalError
from marlin_tools.quantized import are_2_4, is_2_4

N, K, G = 12, 256, 128
MANY = 1 << 40  # tokens, which leave no doubt


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, Hessian]:
    """Correlated inputs with a steep spectrum."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(K, K, generator=generator) * torch.arange(1, K + 1) ** -0.5
    x = torch.randn(4096, K, generator=generator) @ mix.T
    return torch.randn(N, K, generator=generator) * 0.02, Hessian(x.T @ x / len(x), MANY)


def test_what_many_matrices_are_is_what_each_is(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, late = torch.ones(40, 8), torch.zeros(40, 8)
    late[33, :3] = 1  # below the rows that are looked at first
    narrow = torch.ones(4, 6)
    for matrices in ([dense, late, torch.zeros(40, 8), dense], [late, torch.zeros(3, 8)], [narrow, narrow], []):
        assert are_2_4(matrices) == [is_2_4(each) for each in matrices]
    asked = []
    monkeypatch.setattr("marlin_tools.quantized.is_2_4", lambda matrix: asked.append(matrix) or is_2_4(matrix))
    are_2_4([dense, late, dense])
    assert [each is late for each in asked] == [True], "only what the first rows leave open is looked at as a whole"


def textbook_sparsegpt(weight: Tensor, matrix: Tensor) -> Tensor:
    """As published, column by column in float64: at every fourth the two smallest w² / U_jj² of four are given up."""
    w, h = weight.double().clone(), matrix.double()
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    kept = torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % 4 == 0:
            score = w[:, j : j + 4].square() / u.diagonal()[j : j + 4].square()
            for row in range(len(w)):
                kept[row, j + score[row].argsort()[:2]] = False
        q = torch.where(kept[:, j], w[:, j], 0.0)
        error = (w[:, j] - q) / u[j, j]
        w[:, j:] -= error[:, None] * u[j, j:]
        w[:, j] = q
    return w


def loss(weight: Tensor, value: Tensor, matrix: Tensor) -> Tensor:
    """(w - q) H (w - q)ᵀ of one row, in float64."""
    error = (weight - value).double()
    return error @ matrix.double() @ error


def test_masks_keep_the_two_best_of_four(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    norms = hessian.diagonal.sqrt()
    for mask, score in ((magnitude(weight), weight.abs()), (wanda(weight, hessian.diagonal), weight.abs() * norms)):
        for row in range(N):
            for quad in range(0, K, 4):
                best = sorted(range(quad, quad + 4), key=lambda j, row=row, score=score: -float(score[row, j]))[:2]
                assert mask[row, quad : quad + 4].nonzero().flatten().tolist() == sorted(j - quad for j in best)


def test_equal_scores_keep_the_earlier_columns() -> None:
    for score in product(range(3), repeat=4):
        best = sorted(range(4), key=lambda j, score=score: (-score[j], j))[:2]
        assert two_largest(torch.tensor([score])).tolist() == [[j in best for j in range(4)]], score


def test_pairs_and_masks_are_each_others_inverse() -> None:
    mask = torch.zeros(1, 24, dtype=torch.bool)
    for index, pair in enumerate(combinations(range(4), 2)):
        mask[0, [4 * index + column for column in pair]] = True
    assert pair_of(mask).tolist() == [list(range(6))]
    assert torch.equal(of_pair(pair_of(mask)).view(1, 24), mask)


@pytest.mark.parametrize(
    ("row", "is_one"),
    [([0.0, 0, 1, 2, 3, 4, 0, 0], True), ([0, 0, 0, 0, 0, 1, 0, 0], True), ([1, 2, 3, 0, 0, 0, 0, 0], False), ([1, 0], False)],
)
def test_what_counts_as_2_4(row: list[float], is_one: bool) -> None:
    assert is_2_4(torch.tensor([row])) is is_one


def test_the_sparsegpt_preset_is_the_published_algorithm(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    pruned = PRUNERS["sparsegpt"].prune("layer", weight, hessian)
    expected = textbook_sparsegpt(weight, hessian.damped(0.01))
    assert torch.equal(pruned.dense != 0, expected != 0)
    torch.testing.assert_close(pruned.dense.double(), expected, rtol=1e-3, atol=1e-6)


def test_fit_is_least_squares_on_the_kept_positions(problem: tuple[Tensor, Hessian]) -> None:
    """The minimum over v of ‖X (w - v)‖² with v zero off the mask, by the textbook: X_S v_S = X w."""
    weight, hessian = problem
    mask = magnitude(weight)
    damped = hessian.damped(0.01)
    fitted = fit(weight, weight * mask, mask, damped, tolerance=1e-9)
    x = torch.linalg.cholesky(damped.double(), upper=True)
    for row in range(N):
        expected = torch.linalg.lstsq(x[:, mask[row]], x @ weight[row].double()).solution
        torch.testing.assert_close(fitted[row, mask[row]].double(), expected, rtol=1e-3, atol=5e-5)
    assert not bool(fitted[~mask].any())


def test_fit_never_makes_a_row_worse(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    mask, damped = magnitude(weight), hessian.damped(0.01)
    best = fit(weight, weight * mask, mask, damped)
    again = fit(weight, best, mask, damped)
    assert bool((row_losses(weight, again, damped) <= row_losses(weight, best, damped)).all())


def test_reselect_is_what_trying_all_pairs_finds() -> None:
    """One row, quad after quad, four times over: six pairs of positions with their best values, all other quads as they are."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 16, generator=generator)
    matrix, weight = x.T @ x / 64, torch.randn(1, 16, generator=generator)
    start = weight * magnitude(weight)
    expected = start[0].clone()
    for quad in 4 * list(range(0, 16, 4)):
        trials = []
        for pair in combinations(range(quad, quad + 4), 2):
            trial, columns = expected.clone(), list(pair)
            trial[quad : quad + 4] = 0
            wanted = ((weight[0] - trial).double() @ matrix.double())[columns]
            trial[columns] = torch.linalg.solve(matrix.double()[columns][:, columns], wanted).float()
            trials.append(trial)
        expected = min(trials, key=lambda trial: float(loss(weight[0], trial, matrix)))
    value, mask = reselect(weight, start, magnitude(weight), matrix)
    torch.testing.assert_close(value[0], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(mask, value != 0)


def test_every_exact_step_lowers_the_loss(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    steps = [
        PRUNERS["magnitude"],
        PRUNERS["wanda"],
        PRUNERS["sparsegpt"],
        Pruner(reselect=0),
        Pruner(reselect=1),
        Pruner(),
        PRUNERS["max"],
    ]
    errors = [float(step.prune("layer", weight, hessian).losses.output.sum()) for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[5] < 0.85 * errors[2]
    assert errors[6] < 0.98 * errors[5]


def test_alternation_chooses_row_by_row(problem: tuple[Tensor, Hessian], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other rows there are, and whether inverses are kept or computed again."""
    weight, hessian = problem
    damped = hessian.damped(0.01)
    values, mask = Alternation(damped).choose(weight.float())
    monkeypatch.setattr("marlin_tools.algorithms.alternation._KEPT", 0)
    again = Alternation(damped)
    for rows in (slice(0, 5), slice(5, N)):
        part, kept = again.choose(weight[rows].float())
        assert torch.equal(kept, mask[rows])
        torch.testing.assert_close(part, values[rows], rtol=1e-4, atol=1e-6)


def test_where_columns_know_nothing_of_each_other_alternation_ends_at_the_best_mask(problem: tuple[Tensor, Hessian]) -> None:
    weight, energy = problem[0].float(), torch.linspace(0.1, 9, K)
    placed = PRUNERS["max"].mask_solver("layer", Hessian(energy.diag(), MANY)).place(weight)
    assert torch.equal(placed.mask, wanda(weight, energy + 0.01 * energy.mean()))
    torch.testing.assert_close(placed.value, weight * placed.mask, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("preset", PRUNERS)
def test_every_pruner_gives_two_of_four(problem: tuple[Tensor, Hessian], preset: str) -> None:
    weight, hessian = problem
    placed = PRUNERS[preset].mask_solver("layer", hessian).place(weight.float())
    assert bool((placed.mask.view(N, K // 4, 4).sum(dim=2) == 2).all())
    assert not bool(placed.value[~placed.mask].any())


def test_wanda_and_magnitude_change_no_kept_weight(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    for preset in ("wanda", "magnitude"):
        placed = PRUNERS[preset].mask_solver("layer", hessian).place(weight.float())
        assert torch.equal(placed.value, weight * placed.mask)
    assert not PRUNERS["magnitude"].needs_data
    assert PRUNERS["magnitude"].prune("layer", weight, None).losses.output is None


def test_dead_channels_do_no_harm(problem: tuple[Tensor, Hessian]) -> None:
    """A channel that never fires costs nothing to give up."""
    weight, hessian = problem
    matrix = hessian.matrix.clone()
    matrix[8:10] = 0
    matrix[:, 8:10] = 0
    placed = Pruner().mask_solver("layer", Hessian(matrix, 1)).place(weight.float())
    assert bool(torch.isfinite(placed.value).all())
    assert is_2_4(placed.value)


def test_drift_moves_the_aim(problem: tuple[Tensor, Hessian]) -> None:
    """What is owed is added to the output before anything is pruned, so the sparse weight comes closer to it."""
    weight, hessian = problem
    owed = torch.randn(N, K, generator=torch.Generator().manual_seed(4)) * 0.02 @ hessian.matrix
    drifting = Hessian(hessian.matrix, hessian.tokens, Drift(outputs=owed))
    wanted = weight + torch.linalg.solve(hessian.damped(0.01), owed, left=False)
    missed = [
        float(row_losses(wanted, Pruner(drift=share).prune("layer", weight, drifting).dense, hessian.matrix).sum())
        for share in (0.0, 0.5, 1.0)
    ]
    assert missed == sorted(missed, reverse=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_int4_with_a_mask_forces_every_zero(problem: tuple[Tensor, Hessian], preset: str) -> None:
    weight, hessian = problem
    pruner = PRUNERS[PRUNER_OF[preset]]
    sparse = pruner.mask_solver("layer", hessian).place(weight.float())
    solved = PRESETS[preset].solve(
        "layer", weight, hessian, G, torch.float16, pruner.mask_solver("layer", hessian, sparse.mask)
    )
    assert bool((solved.linear.codes[~sparse.mask] == 8).all())
    assert solved.linear.is_2_4()


def test_a_mask_that_keeps_less_than_two_is_kept_too(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    mask = magnitude(weight)
    mask[:, :8] = False
    mask[:, 9:40:4] = False
    solved = GPTQ().solve("layer", weight, hessian, G, torch.float16, Pruner().mask_solver("layer", hessian, mask))
    assert bool((solved.linear.codes[~mask] == 8).all())


def test_joint_rows_with_a_mask_keep_it_and_the_others_get_one(problem: tuple[Tensor, Hessian]) -> None:
    """Rows of a q that is pruned already and a k that is not: they are solved together."""
    weight, hessian = problem
    fixed = magnitude(weight)
    fixed[N // 2 :] = False
    sparse = torch.where(torch.arange(N)[:, None] < N // 2, weight * fixed, weight)
    solved = GPTQ().solve("layer", sparse, hessian, G, torch.float16, Pruner().mask_solver("layer", hessian, fixed))
    assert bool((solved.linear.codes[: N // 2][~fixed[: N // 2]] == 8).all())
    assert solved.linear.is_2_4()


def test_joint_int4_beats_rounding_what_sparsegpt_left(problem: tuple[Tensor, Hessian]) -> None:
    """Aiming at the dense weight makes up for a part of what the published two steps lose."""
    weight, hessian = problem
    left = PRUNERS["sparsegpt"].mask_solver("layer", hessian).place(weight.float())
    kept = PRUNERS["sparsegpt"].mask_solver("layer", hessian, left.mask)
    published = PRESETS["marlin"].solve("layer", left.value, hessian, G, torch.float16, kept).linear.dequantize()
    joint = GPTQ().solve("layer", weight, hessian, G, torch.float16, Pruner().mask_solver("layer", hessian)).linear.dequantize()
    assert float(row_losses(weight, joint, hessian.matrix).sum()) < 0.85 * float(
        row_losses(weight, published, hessian.matrix).sum()
    )


def test_the_sweep_with_a_mask_is_gptq_with_forced_zeros(problem: tuple[Tensor, Hessian]) -> None:
    """Column by column in float64: a column off the mask becomes zero, and later columns pay for all of it."""
    weight, hessian = problem
    mask = magnitude(weight)
    solver = GPTQ(order="natural", scales="absmax", signed=False, polish=0, drift=0)
    pruner = Pruner(mask="magnitude", fit=False, reselect=0, drift=0)
    solved = solver.solve("layer", weight, hessian, G, torch.float16, pruner.mask_solver("layer", hessian, mask)).linear
    u = torch.linalg.cholesky(torch.linalg.inv(hessian.damped(0.01).double()), upper=True)
    w, scales = (weight * mask).double(), solved.scales.double()
    codes = torch.full_like(w, 8)
    for j in range(K):
        scale = scales[:, j // G]
        codes[:, j] = torch.where(mask[:, j], torch.clamp(torch.round(w[:, j] / scale) + 8, 0, 15), 8)
        w[:, j:] -= ((w[:, j] - (codes[:, j] - 8) * scale) / u[j, j])[:, None] * u[j, j:]
    assert float((codes != solved.codes).double().mean()) < 1e-3


def test_rtn_prunes_by_magnitude_before_it_rounds(problem: tuple[Tensor, Hessian]) -> None:
    weight, _ = problem
    solved = RTN().solve("layer", weight, None, G, torch.float16, PRUNERS["magnitude"].mask_solver("layer", None)).linear
    plain = RTN().solve("layer", weight * magnitude(weight), None, G, torch.float16).linear
    assert torch.equal(solved.codes, plain.codes)


def test_settings_that_need_data_say_so(problem: tuple[Tensor, Hessian]) -> None:
    with pytest.raises(ValueError, match="needs a Hessian"):
        Pruner().prune("layer", problem[0], None)
    with pytest.raises(ValueError, match="reselect"):
        Pruner(reselect=-1)


@pytest.mark.parametrize("mask", ["default", "max"])
def test_activations_whose_squares_underflow_are_refused(problem: tuple[Tensor, Hessian], mask: str) -> None:
    weight, hessian = problem
    faint = Hessian(hessian.matrix * 1e-40, hessian.tokens)
    solver = PRUNERS[mask].mask_solver("layer", faint)
    with pytest.raises(NumericalError, match="`layer`: the solution is not finite"):
        PRUNERS[mask].prune("layer", weight, faint)
    with pytest.raises(NumericalError, match="`layer`: the solution is not finite"):
        RTN().solve("layer", weight, faint, G, torch.float16, solver)
