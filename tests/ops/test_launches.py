"""Every launch fills the argument that its kernel declares, field by field. Nothing is launched: a GPU need not be there."""

from contextlib import nullcontext

import pytest
import torch

from marlin_tools import ops
from marlin_tools.ops.linear import plan, w4a8, w4a16
from marlin_tools.ops.linear.fp8_tiles import FP8_TILES
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


def test_on_another_device_than_the_current_one(launched, monkeypatch):
    entered = []

    def device(index):
        entered.append(index)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "device", device)
    solver.cut(torch.zeros(8, 64), (None, None), halves(8, 64), None)
    assert not entered
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    solver.cut(torch.zeros(8, 64), (None, None), halves(8, 64), None)
    assert entered == [None]  # the tensor's, which is that of a CPU here
    assert launched == ["solver-cut-4"] * 2


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


@pytest.mark.parametrize(("rows", "sms", "split", "ctas"), [(64, 2, 1, 2), (200, 142, 0, 40), (1, 7, 0, 7)])
def test_of_products_on_ada(monkeypatch, rows, sms, split, ctas):
    """Tokens are rounded by one kernel and multiplied by the next, which learns where their scales are."""
    launched = []

    class Launch:
        def __init__(self, function, ctas, cluster=1):
            self.kernel, self.ctas, self.cluster = function.kernel, ctas, cluster

        def __call__(self, _stream, *values):
            layout, memory = self.kernel.arguments.layout, bytearray(self.kernel.arguments.layout.size)
            layout.pack_into(memory, 0, *values)
            names = [field.partition(":")[0] for field in self.kernel.arguments.fields.split()]
            launched.append((self, dict(zip(names, layout.unpack(memory), strict=True))))

    loaded = lambda kernel, device: driver.Function(0, kernel, device, None)  # noqa: E731
    monkeypatch.setattr(driver, "Launch", Launch)
    monkeypatch.setattr(driver, "loaded", loaded)
    monkeypatch.setattr(driver, "current_stream", lambda _index: 0)
    monkeypatch.setattr(plan, "sm_count", lambda _index: sms)
    monkeypatch.setattr(plan, "scratch_for", lambda *_: 1 << 20)
    packed = ops.pack(QuantizedLinear(torch.zeros(300, 640, dtype=torch.uint8), torch.ones(300, 5).half(), 128))
    function = loaded(w4a8._kernel("64x256-ada", torch.float16, 128, "sm_89"), packed.codes.device)
    x, y = halves(rows, 640), halves(rows, 300)
    made = w4a8._plan(FP8_TILES["64x256-ada"].for_group(128), function, x, packed.codes, 300)
    made._run(y, x, packed.codes, packed.scales, None, packed.exponent)

    (rounding, rounded), (product, problem) = launched
    assert (rounding.kernel.name, rounding.kernel.target, rounding.ctas) == ("round-1-float16", "sm_89", rows)
    assert (product.kernel.name, product.ctas, product.cluster) == ("w4a8-64x256-ada-float16-g128", ctas, 1)
    assert (rounded["x"], rounded["k"]) == (x.data_ptr(), 640)
    assert (problem["x"], problem["token_scales"]) == (rounded["rounded"], rounded["scales"])
    assert (problem["m"], problem["n"], problem["tiles_n"], problem["tiles_k"]) == (rows, 300, 5, 5)
    assert (problem["token_tiles"], problem["split"]) == (-(-rows // 64), split)
    steps = -(-rows // 64) * 2 * (1 if split else 5)
    assert ctas * problem["schedule.run"] + problem["schedule.longer"] == steps


def test_operators_keep_plans_of_their_own(monkeypatch):
    """W4A16 and FP8 activations multiply tensors of the same shapes: each has to find its own plan."""
    monkeypatch.setattr(driver, "kept", driver._PerThread())
    packed = ops.pack(QuantizedLinear(torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 1).half(), 128))
    for operator, number in ((w4a16.OPERATOR, 1), (w4a8.OPERATOR, 2), (w4a16.OPERATOR, 1)):
        monkeypatch.setattr(operator, "_make_plan", lambda *_, number=number: lambda y, *_: y.fill_(number))
        assert (operator.on_cuda(halves(3, 128), packed.codes, packed.scales, None, 64, packed.exponent) == number).all()
    assert len(driver.kept.launches) == 2
