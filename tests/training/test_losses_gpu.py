"""The losses on a GPU, where one kernel computes them and their gradient, against the same in torch on a CPU."""

import pytest
import torch
from torch import Tensor

from marlin_tools.ops.model.compare import OUTPUTS, compare
from marlin_tools.training import losses
from marlin_tools.training.losses import Head, head_losses

pytestmark = pytest.mark.gpu

H, V = 64, 152064


def problem(tokens: int, v: int, dtype: torch.dtype, cap: float | None) -> tuple[Tensor, Tensor, Tensor, tuple[Head, Head]]:
    """Hidden states of one sequence, ids, heads; a teacher that is near its student."""
    generator = torch.Generator().manual_seed(v)
    student = torch.randn(1, tokens + 1, H, generator=generator).to(dtype)
    teacher = (student + 0.3 * torch.randn(student.shape, generator=generator)).to(dtype)
    weight = (torch.randn(v, H, generator=generator) * 0.4).to(dtype)
    return student, teacher, torch.randint(0, v, (1, tokens + 1), generator=generator), (Head(weight, cap), Head(weight, cap))


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("v", [V, 32001, 7])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_it_finds_what_a_cpu_finds(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, v: int, cap: float | None) -> None:
    monkeypatch.setattr(losses, "CHUNK", 128)
    student, teacher, ids, heads = problem(300, v, dtype, cap)
    on_gpu = tuple(Head(head.weight.cuda(), cap) for head in heads)
    found = [head_losses(student.cuda(), teacher.cuda(), ids.cuda(), on_gpu, kl=0.8, ce=0.1) for _ in range(3)]
    on_cpu = tuple(Head(head.weight.float(), cap) for head in heads)  # whose product is not rounded to 16 bits
    expected = head_losses(student.float(), teacher.float(), ids, on_cpu, kl=0.8, ce=0.1)

    torch.testing.assert_close(found[0].kl.cpu(), expected.kl, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0].ce.cpu(), expected.ce, rtol=1e-5, atol=1e-6)
    assert float(expected.kl) > 0.01
    gradient = found[0].gradient.cpu().float()
    # float16 has no room for what is below 2^-25, as most of a gradient is that is divided by the tokens
    share = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-1}[dtype]
    assert float((gradient - expected.gradient).norm()) < share * float(expected.gradient.norm())
    for again in found[1:]:
        for one, other in ((again.kl, found[0].kl), (again.ce, found[0].ce), (again.gradient, found[0].gradient)):
            assert torch.equal(one, other)


@pytest.mark.parametrize("v", [V, 50257, 4099, 3])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_of_the_same_logits(dtype: torch.dtype, v: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(v)
    student = torch.randn(37, v, generator=generator, device="cuda") * 3
    teacher = student + torch.randn(37, v, generator=generator, device="cuda")
    following = torch.randint(0, v, (37,), generator=generator, device="cuda")
    found = compare((student, teacher), following, (0.8, 0.1), scale=0.5, dtype=dtype)
    expected = compare((student.cpu(), teacher.cpu()), following.cpu(), (0.8, 0.1), scale=0.5)
    torch.testing.assert_close(found[0].cpu(), expected[0], rtol=1e-5, atol=2e-5)
    rounding, finest = torch.finfo(dtype).eps / 2, 2**-25 if dtype == torch.float16 else 0
    torch.testing.assert_close(found[1].cpu().float(), expected[1], rtol=rounding + 2e-5, atol=finest + 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_token(value: float) -> None:
    student, teacher = torch.randn(2, 4, 32001, device="cuda")
    student[1, 32000], teacher[3, 5] = value, value
    found, _ = compare((student, teacher), torch.zeros(4, dtype=torch.int64, device="cuda"), (1.0, 0.1), scale=1.0)
    assert found.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2, [True] * 2]


def test_memory_is_that_of_two_chunks_of_logits_and_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", 128)
    student, teacher, ids, heads = problem(300, V, torch.bfloat16, None)
    here = (student.cuda(), teacher.cuda(), ids.cuda(), tuple(Head(head.weight.cuda()) for head in heads))
    head_losses(*here)  # cuBLAS keeps some
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head_losses(*here)
    assert torch.cuda.max_memory_allocated() - before < 3.2 * 128 * V * 4
