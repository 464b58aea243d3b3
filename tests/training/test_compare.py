"""KL, CE and their gradient against the definition in float64: in torch, and the kernel's own text run on a CPU."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from marlin_tools.ops import TARGETS
from marlin_tools.ops.model import compare as module
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.resources import kernels_dir

HOST = Path(__file__).with_name("host")
GUARD = 64  # elements before and after an output that must stay as they were
T = 5  # rows enough for each way that one can lie between multiples of 16 bytes
SCALE = 0.25
Caps = tuple[float | None, float | None]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Any]:
    """The kernel for a type of gradients as a function of (argument, blocks, threads)."""
    if not shutil.which("g++"):
        pytest.skip("no host compiler")
    folder = tmp_path_factory.mktemp("host")

    @cache
    def compile_for(dtype: torch.dtype) -> Any:
        text = folder / f"{module.OUTPUTS[dtype]}.cpp"
        text.write_text(
            f'#include "compare.cpp"\n#include "training/compare.cu"\n'
            'extern "C" void run(const void* argument, int blocks, int threads) '
            f"{{ host::run(&compare_kernel<{module.OUTPUTS[dtype]}>, argument, blocks, threads); }}\n"
        )
        # a vector that is not where vectors must be is an illegal instruction
        options = ["-std=c++17", "-O1", "-w", "-shared", "-fPIC", "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
        subprocess.run(
            ["g++", *options, f"-I{HOST}", f"-I{kernels_dir()}", "-o", text.with_suffix(".so"), text], check=True, timeout=120
        )
        return ctypes.CDLL(str(text.with_suffix(".so"))).run

    return compile_for


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Outputs come NaN-filled, between guard bands that are checked at the end."""
    bands = []

    def new_empty(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype or tensor.dtype)
        bands.append((whole, size))
        return whole[GUARD : GUARD + size].view(shape)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", new_empty)
        yield
    assert len(bands) >= 2
    for whole, size in bands:
        assert bool(whole[:GUARD].isnan().all())
        assert bool(whole[GUARD + size :].isnan().all())


def on_host(compiled: Callable[[torch.dtype], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What asks for the kernel gets it on the CPU."""
    types = {module._kernel(dtype, "sm_80"): dtype for dtype in module.OUTPUTS}

    def start(kernel: Kernel, ctas: int, on: Tensor, *values: float) -> None:
        compiled(types[kernel])(kernel.arguments.layout.pack(*values), ctas, kernel.threads)

    monkeypatch.setattr(module.driver, "start", start)
    monkeypatch.setattr(module, "target_of", lambda _device: "sm_80")


@pytest.fixture(params=["torch", "kernel"])
def found(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor]]:
    """`compare`, in torch or as the kernel does it."""

    def in_torch(
        logits: tuple[Tensor, Tensor], following: Tensor, weights: tuple[float, float], caps: Caps, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return module.compare(logits, following, weights, scale=SCALE, caps=caps, dtype=dtype)

    if request.param == "torch":
        return in_torch
    compiled = request.getfixturevalue("compiled")
    request.getfixturevalue("poisoned")

    on_host(compiled, monkeypatch)

    def in_kernel(
        logits: tuple[Tensor, Tensor], following: Tensor, weights: tuple[float, float], caps: Caps, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        module._check(*logits, following, dtype)
        return module._in_one_kernel(logits, following, weights, SCALE, caps, dtype)

    return in_kernel


def plain(logits: tuple[Tensor, Tensor], following: Tensor, weights: tuple[float, float], caps: Caps) -> tuple[Tensor, Tensor]:
    """As it is defined, in float64, differentiated by torch."""
    student, teacher = (z.double() for z in logits)
    student.requires_grad_()
    s, t = (cap * torch.tanh(z / cap) if cap else z for z, cap in zip((student, teacher), caps, strict=True))
    log_p, log_t = s - s.logsumexp(1, keepdim=True), t - t.logsumexp(1, keepdim=True)
    losses = torch.stack([(log_t.exp() * (log_t - log_p)).sum(1), -log_p[torch.arange(len(s)), following]], dim=1)
    (SCALE * (losses @ torch.tensor(weights, dtype=torch.float64)).sum()).backward()
    assert student.grad is not None
    return losses.detach(), student.grad


def problem(v: int, size: float = 3.0, rows: int = T) -> tuple[tuple[Tensor, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(v)
    student, noise = (torch.randn(rows, v, generator=generator) * size for _ in range(2))
    following = torch.randint(0, v, (rows,), generator=generator)
    if rows == T:
        following[:2] = torch.tensor([0, v - 1])
    return (student, 0.7 * student + 0.5 * noise), following


def assert_near(
    expected: tuple[Tensor, Tensor], actual: tuple[Tensor, Tensor], dtype: torch.dtype, size: float, weight: float
) -> None:
    """Losses as differences of logits this large allow; the gradient up to its rounding and that of the exponentials."""
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=2e-6, atol=2e-6 * max(size, 1))
    finest = 2**-24 if dtype == torch.float16 else 0
    rounding = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        actual[1].double(), expected[1], rtol=rounding + 5e-6, atol=finest / 2 + 1e-6 * max(size, 1) ** 0.5 * weight * SCALE
    )


@pytest.mark.parametrize("dtype", module.OUTPUTS, ids=str)
@pytest.mark.parametrize("v", [1, 2, 3, 5, 37, 1000, 2049, 9001, 12290])
def test_widths_and_types(found: Callable[..., tuple[Tensor, Tensor]], v: int, dtype: torch.dtype) -> None:
    logits, following = problem(v)
    weights = (0.7, 0.2)
    actual = found(logits, following, weights, (None, None), dtype)
    assert_near(plain(logits, following, weights, (None, None)), actual, dtype, 20, 0.9)


@pytest.mark.parametrize("caps", [(None, None), (4.0, 3.0), (30.0, None), (None, 5.0)])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.2)])
def test_weights_and_caps(found: Callable[..., tuple[Tensor, Tensor]], weights: tuple[float, float], caps: Caps) -> None:
    logits, following = problem(1003)
    actual = found(logits, following, weights, caps, torch.float32)
    assert_near(plain(logits, following, weights, caps), actual, torch.float32, 20, 1)


@pytest.mark.parametrize("caps", [(None, None), (30.0, 30.0)])
def test_large_logits(found: Callable[..., tuple[Tensor, Tensor]], caps: Caps) -> None:
    """Up to 10^4 of either sign: what underflows, underflows, and nothing overflows."""
    logits, following = problem(4099)
    logits = tuple(z / z.abs().max() * 1e4 for z in logits)
    logits[1][3] = logits[0][3] + 1e4  # the same distribution
    actual = found(logits, following, (0.7, 0.2), caps, torch.float32)
    expected = plain(logits, following, (0.7, 0.2), caps)
    assert_near(expected, actual, torch.float32, 1e4, 0.9)
    if caps == (None, None):
        assert abs(float(actual[0][3, 0])) < 1e-3
        assert float(expected[0][0, 0]) > 10


def test_sums_follow_a_largest_logit_that_comes_last(found: Callable[..., tuple[Tensor, Tensor]]) -> None:
    logits, following = problem(9001)
    logits = tuple(z.sort(dim=1).values * 10 for z in logits)
    actual = found(logits, following, (0.7, 0.2), (None, None), torch.float32)
    assert_near(plain(logits, following, (0.7, 0.2), (None, None)), actual, torch.float32, 100, 0.9)


def test_equal_logits_have_no_gradient(found: Callable[..., tuple[Tensor, Tensor]]) -> None:
    (student, _), following = problem(2051)
    losses, gradient = found((student, student.clone()), following, (1.0, 0.0), (None, None), torch.bfloat16)
    assert float(losses[:, 0].abs().max()) < 1e-6
    assert float(gradient.abs().max()) < 1e-8


@pytest.mark.parametrize("caps", [(None, None), (30.0, 30.0)])
@pytest.mark.parametrize("whose", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite(found: Callable[..., tuple[Tensor, Tensor]], value: float, whose: int, caps: Caps) -> None:
    """Wherever it is: in the columns before the vectors, in a vector, behind them. The other tokens do not notice."""
    logits, following = problem(1003)
    clean = plain(logits, following, (0.7, 0.2), caps)
    for row, column in ((1, 0), (2, 500), (3, 1002)):
        logits[whose][row, column] = value
    losses, gradient = found(logits, following, (0.7, 0.2), caps, torch.float32)
    assert bool(losses[1:4].isnan().all())
    kept = [0, 4]
    expected = (clean[0][kept], clean[1][kept])
    assert_near(expected, (losses[kept], gradient[kept]), torch.float32, 20, 0.9)


def test_no_tokens(found: Callable[..., tuple[Tensor, Tensor]]) -> None:
    logits, following = problem(7, rows=0)
    losses, gradient = found(logits, following, (1.0, 0.1), (None, None), torch.bfloat16)
    assert list(losses.shape) == [0, 2]
    assert list(gradient.shape) == [0, 7]


@pytest.mark.parametrize("following", [-1, 40, 1 << 40])
def test_a_token_outside_the_vocabulary_is_not_read(
    compiled: Callable[[torch.dtype], Any], monkeypatch: pytest.MonkeyPatch, following: int
) -> None:
    logits, _ = problem(40, rows=1)
    on_host(compiled, monkeypatch)
    losses, _ = module._in_one_kernel(logits, torch.tensor([following]), (1, 0.1), SCALE, (None, None), torch.float32)
    assert bool(losses.isnan().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, t, f: (s, t.double(), f), "teacher is torch.float64"),
        (lambda s, t, f: (s, t[:, 1:], f), r"teacher is torch.float32 \[5, 39\]"),
        (lambda s, t, f: (s, t, f.int()), "following is torch.int32"),
        (lambda s, t, f: (s.T.contiguous().T, t, f), "student must be contiguous"),
        (lambda s, t, f: (s[0, 1:9].view(1, 8), t[:1, :8].contiguous(), f[:1]), "multiple of 16 bytes"),
    ],
)
def test_what_the_kernel_cannot_read_is_refused(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    (student, teacher), following = problem(40)
    with pytest.raises(ValueError, match=message):
        module._check(*change(student, teacher, following), torch.float32)


def test_other_types_of_gradients_are_refused() -> None:
    (student, teacher), following = problem(40)
    with pytest.raises(TypeError, match="got torch"):
        module._check(student, teacher, following, torch.float64)


@pytest.mark.parametrize(
    "kernel", [k for t in TARGETS for k in module.compare_kernels(t)], ids=lambda k: f"{k.name}-{k.target}"
)
def test_it_compiles(kernel: Kernel, kernel_cache: CubinCache) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    assert 0 < kernel_cache.get(kernel).resources.registers <= 64  # two CTAs of 512 threads on an SM
