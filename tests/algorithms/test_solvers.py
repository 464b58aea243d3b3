"""The sweep, the scale searches, the polish and the drift correction against the dumbest possible oracles."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, RTN, Gram, Hessian
from marlin_tools.algorithms.hessian import Correction, Drift
from marlin_tools.algorithms.polish import descend, polish, refit, row_losses
from marlin_tools.algorithms.scales import decode, encode
from marlin_tools.algorithms.sweep import sweep
from marlin_tools.distributed.cholesky import shared_cholesky
from marlin_tools.distributed.team import Team
from marlin_tools.errors import NumericalError
from marlin_tools.ops.solver import cholesky
from marlin_tools.ops.solver.cholesky import reversed_cholesky
from marlin_tools.ops.solver.kernels import PolishState

N, K, G = 24, 256, 128
MANY = 1 << 40  # tokens, which leave no doubt


@pytest.fixture
def problem() -> tuple[Tensor, Hessian]:
    """Correlated inputs with a steep spectrum, heavy-tailed weights."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(K, K, generator=generator) * torch.arange(1, K + 1) ** -0.5
    x = torch.randn(4096, K, generator=generator) @ mix.T
    gram = Gram(K, torch.device("cpu"))
    for chunk in x.split(1000):
        gram.add(chunk.view(1, *chunk.shape))
    weight = torch.randn(N, K, generator=generator) * 0.02 * (1 + torch.randn(N, K, generator=generator).abs() ** 3)
    return weight, replace(gram.hessian(), tokens=MANY)


def textbook_gptq(weight: Tensor, matrix: Tensor, scales: Tensor, order: list[int], search=None) -> tuple[Tensor, Tensor]:
    """GPTQ as published, one column at a time in float64: invert, Cholesky of the inverse, push errors to the right."""
    size = weight.shape[1] // scales.shape[1]
    w, h = weight.double()[:, order].clone(), matrix.double()[order][:, order]
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    codes, scales = torch.zeros_like(w), scales.double().clone()
    for i in range(w.shape[1]):
        if search is not None and i % size == 0:
            scales[:, i // size] = search(w[:, i : i + size], u[i : i + size, i : i + size])
        s = scales[:, order[i] // size]
        codes[:, i] = torch.clamp(torch.round(w[:, i] / s) + 8, 0, 15)
        error = (w[:, i] - (codes[:, i] - 8) * s) / u[i, i]
        w[:, i:] -= error[:, None] * u[i, i:]
    unsorted = torch.zeros_like(codes)
    unsorted[:, order] = codes
    return unsorted, scales


def clip_search(w: Tensor, u: Tensor) -> Tensor:
    """The paper's group clipping in words: 76 candidates, each judged by ‖δ U⁻¹‖²."""
    best, best_cost = None, None
    for step in range(76):
        s = ((1 - step / 100) * 2 * w.abs().amax(dim=1) / 15).half().double()
        delta = (torch.clamp(torch.round(w / s[:, None]) + 8, 0, 15) - 8) * s[:, None] - w
        cost = torch.linalg.solve_triangular(u, delta, upper=True, left=False).square().sum(dim=1)
        best = s if best is None else torch.where(cost < best_cost, s, best)
        best_cost = cost if best_cost is None else torch.minimum(cost, best_cost)
    return best


def mismatches(a: Tensor, b: Tensor) -> int:
    return int((a.double() != b.double()).sum())


def test_gram_is_the_mean_of_x_xt() -> None:
    chunks = [torch.randn(3, 5, 16), torch.randn(1, 7, 16)]
    gram = Gram(16, torch.device("cpu"))
    for chunk in chunks:
        gram.add(chunk)
    rows = torch.cat([chunk.view(-1, 16) for chunk in chunks]).double()

    assert gram.hessian().tokens == 22
    torch.testing.assert_close(gram.hessian().matrix.double(), rows.T @ rows / 22, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", ["natural", "energy"])
def test_sweep_gives_the_codes_of_textbook_gptq(problem: tuple[Tensor, Hessian], order: str) -> None:
    weight, hessian = problem
    solver = GPTQ(order=order, scales="absmax", signed=False, polish=0, drift=0)
    solved = solver.solve("layer", weight, hessian, G, torch.float16)
    columns = hessian.energy_order().tolist() if order == "energy" else list(range(K))
    expected, _ = textbook_gptq(weight, hessian.damped(0.01), solved.linear.scales.double(), columns)

    assert mismatches(solved.linear.codes, expected) <= 2  # float32 against float64: ties only


def test_marlin_preset_is_the_published_recipe(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    solved = PRESETS["marlin"].solve("layer", weight, hessian, G, torch.float16)
    codes, scales = textbook_gptq(weight, hessian.damped(0.1), torch.zeros(N, K // G), list(range(K)), clip_search)

    assert mismatches(solved.linear.scales, scales) <= 1
    same = (solved.linear.scales.double() == scales).all(dim=1)
    assert mismatches(solved.linear.codes[same], codes[same]) <= 2


@pytest.mark.parametrize("size", [32, 64])
def test_marlin_preset_with_smaller_groups(problem: tuple[Tensor, Hessian], size: int) -> None:
    """Their scales are chosen a block of 128 columns at a time: not quite as if one at a time, and as good."""
    weight, hessian = problem
    matrix = hessian.damped(0.1)
    solved = PRESETS["marlin"].solve("layer", weight, hessian, size, torch.float16).linear
    codes, scales = textbook_gptq(weight, matrix, torch.zeros(N, K // size), list(range(K)), clip_search)
    assert mismatches(solved.scales[:, 0], scales[:, 0]) <= 1

    textbook = (codes - 8) * scales.repeat_interleave(size, dim=1)
    lost = [
        float(row_losses(weight.double(), value, matrix.double()).sum()) for value in (solved.dequantize().double(), textbook)
    ]
    assert lost[0] == pytest.approx(lost[1], rel=0.02)
    of_128 = PRESETS["marlin"].solve("layer", weight, hessian, 128, torch.float16).linear.dequantize()
    assert lost[0] < float(row_losses(weight.double(), of_128.double(), matrix.double()).sum())


def test_factor_predicts_the_loss(problem: tuple[Tensor, Hessian]) -> None:
    """Σ R_ii² (t_i - q_i)² is tr(E H Eᵀ): what the sweep minimises is the real output error."""
    weight, hessian = problem
    factor = hessian.factorize(0.01, "layer")
    seen: list[Tensor] = []

    class Rule:
        grid, looks, chooses = None, False, False

        def enter(self, start: int, weight_nb: Tensor, factor_bb: Tensor) -> None: ...

        def column(self, j: int, target_n: Tensor) -> Tensor:
            value = decode(encode(target_n, torch.tensor(0.01)), torch.tensor(0.01))
            seen.append((target_n - value) * factor.upper[j, j])
            values.append(value)
            return value

    values: list[Tensor] = []
    sweep(weight, factor, Rule())
    real = row_losses(weight, torch.stack(values, dim=1), hessian.damped(0.01))
    torch.testing.assert_close(torch.stack(seen, dim=1).square().sum(dim=1), real, rtol=1e-3, atol=0)


def test_what_is_lost_is_a_share_of_what_was_there(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    solved = PRESETS["fast"].solve("layer", weight, hessian, G, torch.float16)
    value, nothing = solved.linear.dequantize(), torch.zeros_like(weight)
    lost, there = (float(row_losses(weight, each, hessian.matrix).sum()) for each in (value, nothing))

    assert solved.output_error == pytest.approx(lost / there, rel=1e-3)
    assert solved.weight_error == pytest.approx(float((weight - value).square().sum() / weight.square().sum()), rel=1e-3)


def test_every_step_towards_default_lowers_the_error(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    steps = [
        RTN(),
        GPTQ(order="natural", scales="absmax", signed=False, polish=0, drift=0),
        GPTQ(order="energy", scales="diagonal", signed=False, polish=0, drift=0),
        GPTQ(order="energy", scales="diagonal", signed=True, polish=0, drift=0),
        PRESETS["default"],
    ]
    errors = [step.solve("layer", weight, hessian, G, torch.float16).output_error for step in steps]

    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("group_size", [G, K])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_presets_produce_storable_scales(
    problem: tuple[Tensor, Hessian], preset: str, group_size: int, dtype: torch.dtype
) -> None:
    weight, hessian = problem
    linear = PRESETS[preset].solve("layer", weight, hessian, group_size, dtype).linear

    assert linear.scales.shape == (N, K // group_size)
    assert bool((linear.scales != 0).all())
    assert torch.equal(linear.scales.to(dtype).half(), linear.scales)


def test_negative_scales_can_be_forbidden(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    free = GPTQ().solve("layer", weight, hessian, G, torch.float16).linear.scales
    forced = GPTQ(signed=False).solve("layer", weight, hessian, G, torch.float16).linear.scales

    assert bool((free < 0).any())
    assert bool((forced > 0).all())


def test_a_weight_beyond_float16_is_refused() -> None:
    with pytest.raises(NumericalError, match="beyond float16"):
        RTN().solve("layer", torch.full((1, 128), 1e6), None, 128, torch.float16)


def test_groups_of_one_sign_and_of_zeros_keep_their_range() -> None:
    """The published code halves the range of a group without negative weights; ours does not."""
    weight = torch.cat([torch.rand(4, 128) + 0.5, torch.zeros(4, 128)])
    hessian = Hessian(torch.eye(128), 1000)
    for preset in PRESETS.values():
        value = preset.solve("layer", weight, hessian, 128, torch.float16).linear.dequantize()

        assert float((value[:4] - weight[:4]).abs().max()) < 0.16
        assert float(value[4:].abs().max()) == 0


def test_dead_channels_do_no_harm(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    matrix = hessian.matrix.clone()
    matrix[5], matrix[:, 5] = 0, 0
    solved = GPTQ().solve("layer", weight, Hessian(matrix, 100), G, torch.float16)
    value = solved.linear.dequantize()

    assert solved.damp == 0.01
    assert bool(torch.isfinite(value).all())
    assert float((value[:, 5] - weight[:, 5]).abs().max()) < 0.5 * float(weight.abs().max())


@pytest.mark.parametrize("settings", [GPTQ(), GPTQ(polish=0)])
def test_few_tokens_are_not_believed(problem: tuple[Tensor, Hessian], settings: GPTQ) -> None:
    """What they say by chance costs more, by all tokens, than it gains by them."""
    weight, hessian = problem
    root = torch.linalg.cholesky(hessian.matrix.double()).float()
    draws = [torch.randn(K // 2, K, generator=torch.Generator().manual_seed(seed)) @ root.T for seed in range(4)]

    def lost(x: Tensor, noise: float) -> float:
        few, solver = Hessian(x.T @ x / len(x), len(x)), settings.model_copy(update={"noise": noise})
        error = solver.solve("layer", weight, few, G, torch.float16).linear.dequantize() - weight
        return float(((error @ hessian.matrix) * error).sum())

    shares = [lost(x, settings.noise) / lost(x, 0) for x in draws]
    assert (max(shares) < 1, sum(shares) < 0.95 * len(shares)) == (True, True), shares


def test_noise_shrinks_what_pairs_of_channels_say_to_each_other(problem: tuple[Tensor, Hessian]) -> None:
    (weight, hessian), doubt = problem, 1.1
    shrunk = hessian.matrix / doubt + hessian.diagonal.diag() * (1 - 1 / doubt)
    damp = (0.01 + 0.1 * 0.1) / doubt  # a tenth of an input for each token: all channels get that much of the noise alike
    found = GPTQ(damp=0.01, noise=1).solve("layer", weight, Hessian(hessian.matrix, 10 * K), G, torch.float16).linear
    same = GPTQ(damp=damp, noise=0).solve("layer", weight, Hessian(shrunk, 10 * K), G, torch.float16).linear
    assert float((found.codes == same.codes).float().mean()) > 0.99


def test_a_strong_channel_does_not_make_the_others_doubtful() -> None:
    diagonal = torch.ones(K).index_fill(0, torch.tensor([7]), 1e4)
    believed = Hessian(diagonal.diag(), 1000 * K).unsure(1).ridge(1e-9)
    torch.testing.assert_close(believed, 0.001 * diagonal, rtol=0.1, atol=0)


@pytest.mark.parametrize(("tokens", "few", "alike"), [(K // 2, 2.0, 2.0), (K, 1.0, 1.0), (4 * K, 0.25, 0.0625)])
def test_noise_is_a_share_of_each_channel_and_of_the_mean(tokens: int, few: float, alike: float) -> None:
    diagonal = torch.linspace(0.1, 2, K)
    ridge = Hessian(diagonal.diag(), tokens).unsure(1).ridge(0.01)
    torch.testing.assert_close(ridge, few * diagonal + (0.01 + alike) * diagonal.mean())


def test_a_singular_hessian_is_solved(problem: tuple[Tensor, Hessian]) -> None:
    weight, _ = problem
    x = torch.randn(3, K)
    solved = GPTQ(noise=0).solve("layer", weight, Hessian(x.T @ x / 3, 3), G, torch.float16)

    assert solved.output_error is not None
    assert solved.output_error < 1e-2


def test_damping_is_raised_until_the_factorization_succeeds(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    indefinite = hessian.matrix - 0.05 * hessian.diagonal.mean() * torch.eye(K)
    solved = GPTQ(drift=0, damp=0.01).solve("layer", weight, Hessian(indefinite, MANY), G, torch.float16)

    assert solved.damp == pytest.approx(0.1)


def test_a_hopeless_hessian_names_the_layer(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    with pytest.raises(NumericalError, match=r"`model\.layers\.3\.mlp\.down_proj`: .* even with damping 10\n"):
        GPTQ().solve("model.layers.3.mlp.down_proj", weight, Hessian(-hessian.matrix, 10), G, torch.float16)
    broken = hessian.matrix.clone()
    broken[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"not finite\n.*a copy in bfloat16; or `--device cpu`"):
        GPTQ().solve("layer", weight, Hessian(broken, 10), G, torch.float16)


def test_descent_is_what_brute_force_coordinate_descent_finds() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(64, 8, generator=generator)
    hessian, weight = x.T @ x / 64, torch.randn(3, 8, generator=generator)
    scales = torch.full((3, 8), 0.15)
    codes = encode(weight, scales)
    expected = codes.clone()
    for row in range(3):
        for j in range(8):
            trials = []
            for code in range(16):
                expected[row, j] = code
                trials.append(float(row_losses(weight, decode(expected, scales), hessian)[row]))
            expected[row, j] = min(range(16), key=trials.__getitem__)

    state = PolishState(weight, codes.clone(), torch.full((3, 1), 0.15), weight - decode(codes, scales))
    descend(state, state.errors @ hessian, hessian, 0)
    assert torch.equal(state.codes, expected)
    torch.testing.assert_close(state.errors, weight - decode(expected, scales))


def test_polish_never_raises_the_loss_of_a_row(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    linear = GPTQ(polish=0, drift=0).solve("layer", weight, hessian, G, torch.float16).linear
    codes, scales = linear.codes.float(), linear.scales.float()
    losses = [row_losses(weight, decode(codes, scales.repeat_interleave(G, dim=1)), hessian.matrix)]
    for cycles in (1, 2, 4):
        better = polish(weight, codes, scales, hessian.matrix, torch.float16, cycles)
        losses.append(row_losses(weight, decode(better[0], better[1].repeat_interleave(G, dim=1)), hessian.matrix))
    for before, after in pairwise(losses):
        assert bool((after <= before * (1 + 1e-4)).all())
    assert float(losses[-1].sum()) < 0.97 * float(losses[0].sum())


def test_refit_finds_the_least_squares_scale(problem: tuple[Tensor, Hessian]) -> None:
    """The other group stays as it is; what is fitted is what it leaves over."""
    weight, hessian = problem
    linear = RTN().solve("layer", weight, None, G, torch.float16).linear
    codes, scales, first = linear.codes.float(), linear.scales.float(), slice(0, G)
    errors = weight - linear.dequantize()
    fitted = refit(
        scales[:, 0], codes[:, first], (errors @ hessian.matrix)[:, first], hessian.matrix[first, first], torch.float16
    )
    root = torch.linalg.cholesky(hessian.damped(1e-6).double(), upper=True)
    for row in range(N):
        column, goal = torch.zeros(K), weight[row].clone()
        column[first] = codes[row, first] - 8
        goal[G:] = errors[row, G:]
        best = torch.linalg.lstsq(root @ column.double()[:, None], root @ goal.double()[:, None]).solution
        torch.testing.assert_close(fitted[row].double(), best[0, 0], rtol=1e-3, atol=0)


def test_a_mask_is_kept_by_the_polish(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    linear = GPTQ(polish=0, drift=0).solve("layer", weight, hessian, G, torch.float16).linear
    mask = torch.rand(N, K, generator=torch.Generator().manual_seed(3)) < 0.5
    codes = torch.where(mask, linear.codes, 8).float()
    polished, _ = polish(weight, codes, linear.scales.float(), hessian.matrix, torch.float16, 3, mask)

    assert bool((polished[~mask] == 8).all())
    assert bool((polished[mask] != codes[mask]).any())


def test_correction_is_the_least_squares_fit_of_the_original_output() -> None:
    generator = torch.Generator().manual_seed(2)
    x0 = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    x = x0 + 0.2 * torch.randn(500, 12, generator=generator, dtype=torch.float64)
    h0, h = (torch.randn(500, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    inputs, outputs = (x0 - x).T @ x / 500, (x0 @ weight.T + h0 - x @ weight.T - h).T @ x / 500
    hessian, order = Hessian((x.T @ x / 500).float(), 500), torch.randperm(12, generator=generator)
    factor = hessian.factorize(1e-9, "layer", order)
    for drift, goal in [
        (Drift(inputs=inputs.float()), x0 @ weight.T),
        (Drift(outputs=outputs.float()), x0 @ weight.T + h0 - h),
    ]:
        target = Correction(drift, factor, order, 1.0).aim(weight.float(), slice(None))
        torch.testing.assert_close(target.double(), torch.linalg.lstsq(x, goal).solution.T, rtol=1e-4, atol=1e-4)
        half = Correction(drift, factor, order, 0.5).aim(weight.float(), slice(None))
        torch.testing.assert_close(half, (weight.float() + target) / 2)
        torch.testing.assert_close(Correction(drift, factor, order, 1.0).aim(weight[2:5].float(), slice(2, 5)), target[2:5])


def test_a_factor_that_processes_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "_FACTOR_BLOCK", 16)
    rows = torch.randn(100, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    matrix = rows.T @ rows
    upper, corners, info = shared_cholesky(matrix.clone(), Team(cuts=True))
    assert int(info) == 0
    torch.testing.assert_close(upper, reversed_cholesky(matrix)[0])
    for start, corner in zip((0, 16, 32), corners, strict=True):
        block = slice(start, start + len(corner))
        torch.testing.assert_close(corner @ upper[block, block], torch.eye(len(corner), dtype=torch.float64))
    assert int(shared_cholesky(-matrix, Team(cuts=True))[2]) != 0


def test_contradicting_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="natural"):
        GPTQ(scales="conditional", order="energy", signed=False)
    with pytest.raises(ValueError, match="sequential"):
        GPTQ(sequential=False, drift=0.5)


def test_stacked_rows_split_into_their_own_results(problem: tuple[Tensor, Hessian]) -> None:
    weight, hessian = problem
    whole = GPTQ().solve("layer", weight, hessian, G, torch.float16)
    lower = whole.map(lambda rows: rows[8:])
    alone = GPTQ().solve("layer", weight[8:], hessian, G, torch.float16)

    assert torch.equal(lower.linear.codes, alone.linear.codes)
    assert torch.equal(lower.linear.scales, alone.linear.scales)
    assert lower.output_error == pytest.approx(alone.output_error, rel=1e-5)
