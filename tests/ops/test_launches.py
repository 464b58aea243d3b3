"""Every launch fills the argument that its kernel declares, field by field. Nothing is launched: a GPU need not be there."""

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops.linear import w4a8, w4a16
from marlin_tools.ops.model import decode, rotation
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.solver import kernels as solver
from marlin_tools.quantized import QuantizedLinear


@pytest.fixture
def launched(monkeypatch):
    """The names of kernels whose arguments were packed."""
    names = []

    def launch_of(kernel, _device, ctas):
        assert ctas > 0

        def launch(_stream, *values):
            layout = kernel.arguments.layout
            layout.pack_into(bytearray(layout.size), 0, *values)
            names.append(kernel.name)

        return launch

    monkeypatch.setattr(driver, "launch_of", launch_of)
    monkeypatch.setattr(driver, "current_stream", lambda _index: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    for module in (decode, rotation, solver):
        monkeypatch.setattr(module, "target_of", lambda _device: "sm_90a")
    monkeypatch.setattr(decode, "_sm_count", lambda _index: 132)
    monkeypatch.setattr(decode, "scratch_for", lambda *_: 1 << 20)
    return names


def halves(*shape):
    return torch.zeros(shape, dtype=torch.float16)


def test_of_decoding(launched):
    decode._add_norm_on_cuda(halves(2, 64), halves(2, 64), halves(64), 1e-5)
    decode._gate_on_cuda(halves(2, 64))
    tables = [halves(256, 64), halves(256, 64)]
    caches = [halves(1, 1, 256, 64) for _ in range(2)]
    decode._attend_on_cuda(halves(1, 4, 64), *caches, torch.zeros(1, dtype=torch.int32), tables, 0.0, 1.0)
    rotation.rotate(halves(1, 2, 8, 64), halves(1, 1, 8, 64), halves(1, 8, 64), halves(1, 8, 64))

    assert launched == ["add_norm-float16", "gate-float16", "attend-64x2-float16", "rotate-64-float16"]


def test_of_the_solver(launched):
    n, k = 64, 256
    weight, square = torch.zeros(n, k), torch.eye(k)
    codes, errors, scales = torch.zeros(n, k, dtype=torch.uint8), torch.zeros(n, k), torch.ones(n, 2)
    solver.search_scales(weight.view(n, 2, 128), torch.ones(2, 128), torch.float16, signed=True)
    solver.clip_scales(weight[:, :128].contiguous(), square, torch.bfloat16)
    grid = solver.Grid(scales, torch.zeros(k, dtype=torch.int32), torch.ones(n, k, dtype=torch.bool))
    solver.sweep_block(weight, torch.zeros(n, 128), square, grid, codes, errors, 128)
    state = solver.PolishState(weight, codes, scales, errors)
    solver.descend_block(state, torch.zeros(n, 128), square, 0, torch.float16)
    solver.cut(weight, (None, torch.ones(k)), weight.half(), None)

    expected = ["search-128", "clip", "sweep-true", "descend-128-false", "cut-4"]
    assert launched == [f"solver-{name}" for name in expected]


def test_operators_keep_plans_of_their_own(monkeypatch):
    """W4A16 and FP8 activations multiply tensors of the same shapes: each has to find its own plan."""
    monkeypatch.setattr(driver, "kept", driver._PerThread())
    packed = ops.pack(QuantizedLinear(torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 1).half(), 128))
    for operator in (w4a16.OPERATOR, w4a8.OPERATOR, w4a16.OPERATOR):
        plan = f"plan of {operator._registered}"
        monkeypatch.setattr(operator, "_make_plan", lambda *_, plan=plan: lambda *_: plan)
        assert operator.on_cuda(halves(3, 128), packed.codes, packed.scales, None, 64, packed.exponent) == plan
    assert len(driver.kept.launches) == 2
