"""Pruning on a GPU finds what it finds on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from marlin_tools.algorithms import PRUNERS, Hessian
from marlin_tools.algorithms.polish import row_losses
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.compress.prune import PruneSettings, prune
from marlin_tools.compress.quantize import QuantizeSettings, quantize
from marlin_tools.compress.tune import Tuning
from marlin_tools.data.tokens import TokenSet
from marlin_tools.quantized import is_2_4

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("preset", PRUNERS)
def test_one_weight(preset: str) -> None:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(512, 512, generator=generator) * torch.arange(1, 513) ** -0.5
    x = torch.randn(4096, 512, generator=generator) @ mix.T
    weight, matrix = torch.randn(96, 512, generator=generator) * 0.02, x.T @ x / len(x)
    here = PRUNERS[preset].mask_solver("layer", Hessian(matrix, 4096)).place(weight.float())
    there = PRUNERS[preset].mask_solver("layer", Hessian(matrix.cuda(), 4096)).place(weight.cuda().float())
    assert float((here.mask != there.mask.cpu()).float().mean()) < 0.01  # where two choices are as good as each other
    lost = [float(row_losses(weight, value.cpu(), matrix).sum()) for value in (here.value, there.value)]
    assert lost[1] == pytest.approx(lost[0], rel=3e-3)  # rows may end in other minima, no better and no worse


def test_a_model_with_training_by_block(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    text = torch.randint(2, 512, (6, 64), generator=torch.Generator().manual_seed(0))
    tokens = TokenSet(tuple(text), "random", packed=True, documents=1)
    out: Checkpoint = prune(tiny_model("llama"), tokens, PruneSettings(device="cuda", reconstruct=4), tmp_path / "out")
    assert all(is_2_4(out.read(name)) for name in out.names() if "proj" in name)


def test_the_second_gpu_does_as_the_first(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    text = torch.randint(2, 512, (6, 64), generator=torch.Generator().manual_seed(0))
    tokens = TokenSet(tuple(text), "random", packed=True, documents=1)
    ends = []
    for device in ("cuda:0", "cuda:1"):
        pruned = prune(tiny_model("llama"), tokens, PruneSettings(preset="max", device=device), tmp_path / device)
        settings = QuantizeSettings(sparsity="keep", tuning=Tuning(iters=4), device=device)
        ends.append(quantize(pruned, tokens, settings, tmp_path / f"int4-{device}"))
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(ends[0].read(name), ends[1].read(name)) for name in ends[0].names())
