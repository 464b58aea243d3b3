"""The solver on a GPU against the solver on a CPU: same weights and Hessian in, same codes out, ties aside."""

import dataclasses

import pytest
import torch
from torch import Tensor

from marlin_tools.algorithms import GPTQ, PRESETS, Gram, Hessian, Pruner
from marlin_tools.algorithms.hessian import Drift
from marlin_tools.algorithms.masks import magnitude
from marlin_tools.algorithms.polish import polish, row_losses
from marlin_tools.algorithms.pruning import TwoOfFour
from marlin_tools.algorithms.scales import conditional, decode, diagonal, encode
from marlin_tools.algorithms.support import fit, reselect
from marlin_tools.algorithms.sweep import sweep
from marlin_tools.ops.solver import products
from marlin_tools.ops.solver.cholesky import reversed_cholesky
from marlin_tools.quantized import QuantizedLinear, quads

pytestmark = pytest.mark.gpu

TIE = 1e-4
"""Of a scale: how near to a rounding boundary a value must lie for two right answers to differ."""

MANY = 1 << 40
"""Tokens, which leave no doubt."""

FEW = 0.005
"""Share of rows that may differ."""

RARE = 2e-4
"""Share of codes that may differ where a row goes on from a tie: one code of a row that turns pulls others along."""

SCARCE = 1e-2
"""The same where scales are refitted: one that lies near a boundary of float16 is a tie as well, and moves a whole group."""


def problem(n: int = 1024, k: int = 1024, *, seed: int = 0) -> tuple[Tensor, Hessian]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) * torch.arange(1, k + 1) ** -0.5
    x = torch.randn(4 * k, k, generator=generator) @ mix.T
    x[:, :3] *= 30  # a few channels that dwarf the others
    gram = Gram(k, torch.device("cpu"))
    gram.add(x)
    weight = torch.randn(n, k, generator=generator) * 0.02 * (1 + torch.randn(n, k, generator=generator).abs())
    return weight, dataclasses.replace(gram.hessian(), tokens=MANY)


def on_gpu(hessian: Hessian) -> Hessian:
    drift = hessian.drift
    if drift is not None:
        drift = Drift(*(None if m is None else m.cuda() for m in (drift.inputs, drift.outputs)))
    return Hessian(hessian.matrix.cuda(), hessian.tokens, drift)


def rows_that_differ(left: Tensor, right: Tensor) -> Tensor:
    return (left.cpu().double() != right.cpu().double()).any(dim=1).nonzero().flatten()


def share_that_differs(what: str, left: Tensor, right: Tensor) -> float:
    """Of the codes; printed with that of the rows."""
    codes = float((left.cpu().double() != right.cpu().double()).double().mean())
    print(f"{what}: {codes:.1e} of the codes differ, in {len(rows_that_differ(left, right))} of {len(left)} rows")
    return codes


def distance_from_tie(weight: Tensor, hessian: Hessian, damp: float, linear: QuantizedLinear, row: int, j: int) -> float:
    """How far from a rounding boundary the target of column `j` of the sweep lies, in scales, by float64 arithmetic."""
    columns = hessian.energy_order().cpu()
    upper, _, _ = reversed_cholesky(hessian.damped(damp).cpu().double()[columns][:, columns])
    feedback = upper / upper.diagonal()
    errors = (weight.cpu().double()[row] - linear.dequantize().cpu().double()[row])[columns]
    target = weight.cpu()[row, columns[j]].double() + errors[:j] @ feedback[:j, j]
    place = target / linear.scales[row, columns[j] // linear.group_size].cpu().double()
    return abs(abs(float(place - place.round())) - 0.5)


@pytest.mark.parametrize("order", ["natural", "energy"])
@pytest.mark.parametrize("group_size", [64, 128, 1024])
@pytest.mark.parametrize("k", [1024, 1280 + 64])
def test_sweep_differs_in_ties_only(order: str, group_size: int, k: int) -> None:
    if k % group_size:
        group_size = {128: 32, 1024: k}[group_size]
    weight, hessian = problem(k=k)
    settings = GPTQ(order=order, scales="absmax", signed=False, polish=0, drift=0)
    cpu = settings.solve("layer", weight, hessian, group_size, torch.float16).linear
    gpu = settings.solve("layer", weight.cuda(), on_gpu(hessian), group_size, torch.float16).linear

    assert torch.equal(cpu.scales, gpu.scales.cpu())
    columns = hessian.energy_order() if order == "energy" else torch.arange(k)
    upper, _, _ = reversed_cholesky(hessian.damped(0.01).double()[columns][:, columns])
    feedback = upper / upper.diagonal()
    errors = (weight.double() - cpu.dequantize().double())[:, columns]
    different = rows_that_differ(cpu.codes, gpu.codes)
    assert len(different) <= FEW * len(weight)
    for row in different.tolist():
        first = int((cpu.codes[row, columns] != gpu.codes[row, columns].cpu()).nonzero()[0])
        target = weight[row, columns[first]].double() + errors[row, :first] @ feedback[:first, first]
        place = target / cpu.scales[row, columns[first] // group_size].double()
        assert abs(abs(float(place - place.round())) - 0.5) < TIE, (row, first)


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("signed", [True, False])
def test_scale_search(group_size: int, dtype: torch.dtype, signed: bool) -> None:
    weight, hessian = problem()
    groups, energy = weight.view(1024, -1, group_size), hessian.diagonal.reshape(-1, group_size)
    cpu = diagonal(groups, energy, dtype, signed=signed)
    gpu = diagonal(groups.cuda(), energy.cuda(), dtype, signed=signed).cpu()

    assert torch.equal(gpu.to(dtype).float(), gpu)
    different = (cpu != gpu).nonzero()
    assert len(different) <= 0.002 * cpu.numel()
    for row, group in different.tolist():  # only between scales that are as good as each other
        held = groups[row, group]
        errors = [(decode(encode(held, s), s) - held).double() for s in (cpu[row, group], gpu[row, group])]
        costs = [(error**2 * energy[group]).sum() for error in errors]
        assert float(costs[1]) == pytest.approx(float(costs[0]), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_clip_search(dtype: torch.dtype, size: int) -> None:
    weight, hessian = problem(n=1000, k=256)
    factor = hessian.factorize(0.1, "layer").upper
    for start in (0, 128, 256 - size):
        block = slice(start, start + size)
        cpu = conditional(weight[:, block].contiguous(), factor[block, block], dtype)
        gpu = conditional(weight[:, block].cuda().contiguous(), factor.cuda()[block, block], dtype).cpu()
        assert int((cpu != gpu).sum()) <= 2


@pytest.mark.parametrize("group_size", [32, 64, 128, 256, 1024])
@pytest.mark.parametrize("masked", [False, True])
def test_polish(group_size: int, masked: bool) -> None:
    weight, hessian = problem()
    linear = GPTQ(polish=0, drift=0).solve("layer", weight, hessian, group_size, torch.float16).linear
    codes, scales, mask = linear.codes.float(), linear.scales.float(), None
    if masked:
        mask = torch.rand(codes.shape, generator=torch.Generator().manual_seed(1)) < 0.5
        codes = torch.where(mask, codes, 8)
    for rounds in (1, 3):
        cpu = polish(weight, codes, scales, hessian.matrix, torch.float16, rounds, mask)
        moved = (weight.cuda(), codes.cuda(), scales.cuda(), hessian.matrix.cuda())
        gpu = polish(*moved, torch.float16, rounds, None if mask is None else mask.cuda())
        limit = 5 * SCARCE if masked else RARE  # scales begin far from where the masked codes want them, so all of them move
        assert share_that_differs(f"group {group_size}, masked {masked}, {rounds} rounds", cpu[0], gpu[0]) <= limit
        losses = [
            row_losses(weight, decode(c.cpu().float(), s.cpu().repeat_interleave(group_size, dim=1)), hessian.matrix).sum()
            for c, s in (cpu, gpu)
        ]
        assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-3 if masked else 1e-4)
        if mask is not None:
            assert bool((gpu[0].cpu()[~mask] == 8).all())


def rows_of_equal_masks(cpu: Tensor, gpu: Tensor) -> Tensor:
    """A quad where two choices are as good as each other may turn, and pulls others along."""
    assert bool((quads(gpu).sum(dim=2) == 2).all())
    equal = (cpu == gpu.cpu()).all(dim=1)
    share_that_differs("masks", cpu, gpu)
    assert int((~equal).sum()) <= 4 * FEW * len(cpu)
    return equal


@pytest.mark.parametrize("k", [1024, 1280 + 68])
def test_choose(k: int) -> None:
    weight, hessian = problem(k=k)
    rule = TwoOfFour(weight, hessian.factorize(0.01, "layer"))
    sweep(weight, hessian.factorize(0.01, "layer"), rule)
    gpu = Pruner(fit=False, reselect=0).mask_solver("layer", on_gpu(hessian)).place(weight.cuda())
    rows = rows_of_equal_masks(rule.mask, gpu.mask)
    torch.testing.assert_close(gpu.value.cpu()[rows], rule.values[rows], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("k", [1024, 1280 + 68])
def test_reselect_and_fit(k: int) -> None:
    weight, hessian = problem(k=k)
    mask, damped = magnitude(weight), hessian.damped(0.01)
    here = reselect(weight, weight * mask, mask, damped)
    moved = weight.cuda(), (weight * mask).cuda(), mask.cuda(), damped.cuda()
    there = reselect(*moved)
    rows = rows_of_equal_masks(here[1], there[1])
    close = torch.isclose(there[0].cpu()[rows], here[0][rows], rtol=1e-2, atol=1e-4).all(dim=1)
    assert int((~close).sum()) <= 2 * FEW * len(weight)  # a quad may turn and turn back
    assert torch.equal(moved[1].cpu(), weight * mask)  # what it began from is not touched
    losses = [
        row_losses(weight, value.cpu(), damped).sum()
        for value in (here[0], there[0], fit(weight, *here, damped), fit(moved[0], here[0].cuda(), here[1].cuda(), moved[3]))
    ]
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-3)
    assert float(losses[3]) == pytest.approx(float(losses[2]), rel=1e-3)
    assert float(losses[2]) < 0.99 * float(losses[0])


@pytest.mark.parametrize("preset", ["marlin", "fast", "default"])
def test_presets_end_to_end(preset: str) -> None:
    weight, hessian = problem(k=1280)
    generator = torch.Generator().manual_seed(2)
    drift = Drift(outputs=weight @ hessian.matrix * 0.02 * torch.randn(1280, generator=generator))
    hessian = dataclasses.replace(hessian, drift=drift if PRESETS[preset].drift else None)
    cpu = PRESETS[preset].solve("layer", weight, hessian, 128, torch.float16)
    gpu = PRESETS[preset].solve("layer", weight.cuda(), on_gpu(hessian), 128, torch.float16)
    assert share_that_differs(preset, cpu.linear.codes, gpu.linear.codes) <= (SCARCE if preset == "default" else RARE)
    assert gpu.output_error == pytest.approx(cpu.output_error, rel=1e-3)
    assert gpu.weight_error == pytest.approx(cpu.weight_error, rel=1e-3)


def test_slabs_are_invisible(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = problem(n=256)
    whole = GPTQ(drift=0).solve("layer", weight.cuda(), on_gpu(hessian), 128, torch.float16)
    monkeypatch.setattr("marlin_tools.algorithms.gptq.SLAB", 100 * 1024)
    parts = GPTQ(drift=0).solve("layer", weight.cuda(), on_gpu(hessian), 128, torch.float16)

    assert len(rows_that_differ(whole.linear.codes, parts.linear.codes)) <= 3
    assert parts.output_error == pytest.approx(whole.output_error, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k", [512, 4096 + 384])
def test_gram_of_narrow_activations_is_exact(dtype: torch.dtype, k: int) -> None:
    """Nothing is lost but what a tensor core cuts off when it adds; judged by float64."""
    x = (torch.randn(4096, k, device="cuda") * torch.logspace(-2, 2, k, device="cuda")).to(dtype)
    gram = Gram(k, x.device)
    gram.add(x[:1000])
    gram.add(x[1000:])
    exact = x.double().T @ x.double() / 4096
    size = exact.diagonal().sqrt()
    assert torch.equal(gram.hessian().matrix, gram.hessian().matrix.T)
    assert float(((gram.hessian().matrix - exact).abs() / (size[:, None] * size)).max()) < 3e-5


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_codes_from_a_narrow_gram_are_those_from_float64(seed: int) -> None:
    """Rows differ from a tie on. Channels that dwarf others carry what tensor cores cut off to them, so a few ties are wide."""
    generator = torch.Generator().manual_seed(seed)
    weight, _ = problem(n=512, seed=seed)
    mix = torch.randn(1024, 1024, generator=generator) * torch.arange(1, 1025) ** -0.5
    narrow = (torch.randn(8192, 1024, generator=generator) @ mix.T).half().cuda()
    gram = Gram(1024, narrow.device)
    for chunk in narrow.split(2048):
        gram.add(chunk)
    exact = Hessian((narrow.double().T @ narrow.double() / 8192).float(), 8192)
    settings = PRESETS["fast"].model_copy(update={"noise": 0})
    made = [settings.solve("layer", weight.cuda(), h, 128, torch.float16).linear for h in (gram.hessian(), exact)]
    assert share_that_differs("tensor-core Gram against float64", made[0].codes, made[1].codes) <= SCARCE
    rows = rows_that_differ(made[0].codes, made[1].codes).tolist()
    assert len(rows) <= 0.05 * len(weight)
    losses = [float(row_losses(weight.cuda(), q.dequantize(), exact.matrix).sum()) for q in made]
    assert losses[0] == pytest.approx(losses[1], rel=3e-3)

    energy = (exact.diagonal + exact.ridge(settings.damp)).view(-1, 128).double()
    moved = (made[0].scales != made[1].scales).nonzero().tolist()
    assert len(moved) <= FEW * made[0].scales.numel()
    for row, group in moved:  # only between scales that are as good as each other
        held = weight.cuda()[row].view(-1, 128)[group]
        errors = [(decode(encode(held, s), s) - held).double() for s in (q.scales[row, group].float() for q in made)]
        costs = [float((error**2 * energy[group]).sum()) for error in errors]
        assert costs[1] == pytest.approx(costs[0], rel=1e-4)
    order = exact.energy_order().cpu()
    different = (made[0].codes != made[1].codes).cpu()[:, order]
    distances = [
        distance_from_tie(weight, exact, settings.damp, made[1], row, int(different[row].nonzero()[0]))
        for row in rows
        if row not in {row for row, _ in moved}
    ]
    wide = [distance for distance in distances if distance > TIE]
    print(f"{len(rows)} rows, {len(moved)} scales; the first of a row is at most {max(distances, default=0.0):.1e} from a tie")
    assert len(wide) <= max(1, len(rows) // 10)
    assert max(wide, default=0.0) < 0.1


def test_product_is_as_good_as_float32() -> None:
    left, right = torch.randn(512, 4096, device="cuda"), torch.randn(4096, 512, device="cuda")
    exact = left.double() @ right.double()
    split, plain = ((p - exact).abs().max() for p in (products.product(left, right), left @ right))
    rough = (products.rough_product(left, right) - exact).abs().max()
    print(f"largest error: split {float(split):.2e}, float32 {float(plain):.2e}, 11 bits {float(rough):.2e}")
    assert float(split) < 32 * float(plain)  # a tensor core cuts off what others round
    assert float(rough) > 20 * float(plain)  # else the tensor cores were not used


@pytest.mark.parametrize("k", [512, 2500])
def test_blocked_factor(k: int) -> None:
    _, hessian = problem(n=8, k=k)
    matrix = hessian.damped(0.01).double()
    upper, corners, info = reversed_cholesky(matrix.cuda())
    assert int(info) == 0
    for number, corner in enumerate(corners):
        block = slice(1024 * number, 1024 * number + len(corner))
        unit = torch.eye(len(corner), dtype=torch.float64, device=corner.device)
        torch.testing.assert_close(upper[block, block] @ corner, unit, rtol=0, atol=1e-8)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close((upper @ upper.T).cpu(), matrix, rtol=1e-9, atol=1e-9 * float(matrix.abs().max()))
    _, _, info = reversed_cholesky(-matrix.cuda())
    assert int(info) != 0


def test_divide() -> None:
    weight, hessian = problem(n=64, k=2500)
    factor = hessian.factorize(0.01, "layer")
    expected = weight.double() @ torch.linalg.inv(hessian.damped(0.01).double())
    for device in ("cpu", "cuda"):
        moved = dataclasses.replace(factor, upper=factor.upper.to(device))
        torch.testing.assert_close(
            moved.divide(weight.to(device)).cpu().double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )
