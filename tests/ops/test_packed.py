"""`packed_linear`: tensors alone say what to compute. And what engines do before they use it: compile ahead, share scratch."""

import os
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering

from marlin_tools import ops
from marlin_tools.ops.linear.packed import exponent_tensor, packed_fp8_linear, packed_linear
from marlin_tools.ops.runtime import ahead, scratch
from marlin_tools.quantized import ZERO, QuantizedLinear


def make(*, sparse, n=72, k=256):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, generator=generator)
    if sparse:
        codes.scatter_(2, torch.rand(codes.shape, generator=generator).argsort(dim=2)[..., :2], ZERO)
    weight = QuantizedLinear(codes.view(n, k), (torch.randn((n, 2), generator=generator) * 0.02).half(), 128)
    return (ops.pack_sparse if sparse else ops.pack)(weight)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("shape", [(256,), (0, 256), (3, 256), (2, 3, 256)])
def test_the_tiles_say_which_operation_it_is(sparse, shape):
    packed, x, bias = make(sparse=sparse), torch.randn(shape).half(), torch.randn(72).half()
    other = ops.sparse_linear if sparse else ops.linear

    y = packed_linear(x, packed.codes, packed.scales, exponent_tensor(packed), bias, 72)

    assert torch.equal(y, other(x.reshape(-1, 256), packed, bias).view(*shape[:-1], 72))


def test_other_tiles_are_refused():
    packed = make(sparse=False)
    with pytest.raises(ValueError, match="codes have 512 words a tile"):
        packed_linear(torch.randn(1, 256).half(), packed.codes[..., :512], packed.scales, exponent_tensor(packed), None, 72)


@pytest.mark.parametrize("product", [packed_linear, packed_fp8_linear])
def test_a_single_number_is_no_row(product):
    packed = make(sparse=False)
    with pytest.raises(ValueError, match=r"x must be \[..., K\], got \[\]"):
        product(torch.tensor(1.0).half(), packed.codes, packed.scales, exponent_tensor(packed), None, 72)


def test_the_operator_is_sound():
    packed = make(sparse=True)
    operands = torch.randn(3, 256).half(), packed.codes, packed.scales, exponent_tensor(packed), None

    torch.library.opcheck(torch.ops.marlin_tools.packed_linear.default, (torch.empty(3, 72).half(), *operands))
    for y in (torch.empty(3, 72), torch.empty(2, 72).half(), torch.empty(72, 3).half().t(), torch.empty(()).half()):
        with pytest.raises(ValueError, match=r"y must be torch.float16 \[3, N\] on cpu and contiguous"):
            torch.ops.marlin_tools.packed_linear(y, *operands)


def test_kernels_behind_it_may_read_several_numbers_at_once(monkeypatch):
    """torch.compile assumes that tensors begin anywhere if one on the CPU went into an operator that returned them."""
    anywhere = []

    def stop(graph):
        anywhere.extend(graph.unaligned_buffers)
        raise RuntimeError("the graph is lowered; no program has to be made of it")

    monkeypatch.setattr(GraphLowering, "codegen", stop)
    packed, x = make(sparse=False), torch.randn(3, 256).half()

    def behind(exponent):
        return packed_linear(x, packed.codes, packed.scales, exponent, None, 72) * 2

    with pytest.raises(InductorError):
        torch.compile(behind)(exponent_tensor(packed))

    assert anywhere
    assert [name for name in anywhere if name.startswith("buf")] == []


class Cache:
    """Holds what was compiled."""

    def __init__(self, *held):
        self.held = set(held)

    def has(self, kernel):
        return kernel in self.held

    def get(self, kernel):
        assert kernel not in self.held
        self.held.add(kernel)


def test_only_what_is_missing_is_compiled_ahead():
    cache = Cache("a")

    assert ahead.compile_ahead(["a", "b", "c"], cache) == 2
    assert ahead.compile_ahead(["a", "b", "c"], cache) == 0
    assert cache.held == {"a", "b", "c"}


def test_whoever_stops_asking_waits_for_what_is_in_work_alone(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    begun, go_on = [], threading.Event()

    def make(number):
        begun.append(number)
        if number > 1:
            go_on.wait(60)
        return number * 10

    made = ahead.side_by_side(make, range(100))
    assert [next(made), next(made)] == [0, 10]
    threading.Timer(0.2, go_on.set).start()
    made.close()
    assert len(begun) < 10


@pytest.fixture
def streams(monkeypatch):
    """Scratch without a GPU: what the driver gave, and whether a capture is on."""
    state = SimpleNamespace(capturing=False, capture=1, given=[], pool=[])

    def allocate(size, _device):
        state.given.append(size)
        return 10 * len(state.given)

    def of_the_pool(size, **_how):
        state.pool.append(torch.ones(size, dtype=torch.uint8))
        return state.pool[-1]

    monkeypatch.setattr(scratch.driver, "allocate_cleared", allocate)
    monkeypatch.setattr(scratch.torch, "empty", of_the_pool)
    monkeypatch.setattr(scratch.torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(scratch.driver, "capture_id", lambda _stream: state.capture)
    for name, empty in (("_by_stream", {}), ("_by_capture", {}), ("_sharing", set())):
        monkeypatch.setattr(scratch, name, empty)
    return state


def captured(streams, need=10):
    streams.capturing = True
    streams.capture += 1
    address = scratch.scratch_for(0, 7, need)
    streams.capturing = False
    return address


def test_each_capture_has_its_own(streams):
    eager = scratch.scratch_for(0, 7, 10)

    assert len({eager, captured(streams), captured(streams)}) == 3
    assert all(not own[: scratch.COUNTER_BYTES].any() for own in streams.pool)


def test_a_stream_has_one_until_it_needs_more(streams):
    first = scratch.scratch_for(0, 7, 10)

    assert scratch.scratch_for(0, 7, 1000) == first
    assert scratch.scratch_for(0, 8, 10) != first
    assert scratch.scratch_for(0, 7, 3 << 20) != first
    assert streams.given == [1 << 20, 1 << 20, 4 << 20]


def test_graphs_that_are_replayed_one_at_a_time_share(streams):
    scratch.share_among_captures(0)
    eager = scratch.scratch_for(0, 7, 10)

    assert {captured(streams), captured(streams)} == {eager}
    assert streams.pool == []


def test_graphs_of_torch_compile_share(streams, monkeypatch):
    manager = SimpleNamespace(stream=SimpleNamespace(cuda_stream=7))
    trees = SimpleNamespace(get_manager=lambda _device, create_if_none_exists: None if create_if_none_exists else manager)
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", trees)
    eager = scratch.scratch_for(0, 7, 10)

    assert captured(streams) == eager
    manager.stream.cuda_stream = 8
    assert captured(streams) != eager


def test_what_was_not_warmed_up_is_made_beside_the_capture(streams):
    scratch.share_among_captures(0)
    eager = scratch.scratch_for(0, 7, 10)

    assert captured(streams, need=3 << 20) != eager
    assert streams.pool == []
