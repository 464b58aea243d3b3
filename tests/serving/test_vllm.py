"""The plugin against stand-ins of vLLM's classes, oldest and newest: what it takes, what it leaves; it never raises."""

import logging

import pytest
import torch
from torch._inductor import config as inductor

from marlin_tools import ops
from marlin_tools.ops.linear import w4a8, w4a16, w24a16
from marlin_tools.ops.linear.fp8_reference import round_tokens
from marlin_tools.serving import vllm as plugin


@pytest.fixture(autouse=True)
def _log(caplog):
    caplog.set_level(logging.INFO, logger="vllm.marlin_tools")


def test_our_kernel_is_asked_first_and_once(engine):
    plugin.register()

    assert [kernel.__name__ for kernel in engine.possible["cuda"]] == ["PackedInt4LinearKernel", "Stock"]
    assert engine.possible["cpu"] == []


def test_its_name_is_not_one_that_vllm_reorders(engine):
    name = engine.kernel.PackedInt4LinearKernel.__name__.lower()

    assert "marlin" not in name
    assert "humming" not in name


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
def test_a_layer_computes_its_product(engine, make, layout, dtype, sparse, per_column):
    weight = make(group_size=256 if per_column else 128, sparse=sparse)
    kernel, layer = engine.load(weight, layout, act_type=dtype)
    x, bias = torch.randn(2, 3, 256).to(dtype), torch.randn(128).to(dtype)

    y = kernel.apply_weights(layer, x, bias)

    expected = x.double() @ weight.dequantize(torch.float64).T + bias.double()
    assert type(kernel).__name__ == "PackedInt4LinearKernel"
    assert y.shape == (2, 3, 128)
    assert torch.allclose(y.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_no_tokens_are_no_outputs(engine, make):
    kernel, layer = engine.load(make())

    assert kernel.apply_weights(layer, torch.empty(0, 256, dtype=torch.float16)).shape == (0, 128)


def test_activations_may_lie_apart(engine, make):
    weight = make()
    kernel, layer = engine.load(weight)
    x = torch.randn(3, 512).half()[:, ::2]

    assert torch.equal(kernel.apply_weights(layer, x), kernel.apply_weights(layer, x.contiguous()))


@pytest.mark.parametrize("n", [128, 100 * 8])
def test_fused_linears_are_one_weight(engine, make, n):
    """N need not be a multiple of 64: that of q, k and v together seldom is with many ranks."""
    weight = make(n=n)
    kernel, layer = engine.load(weight)
    x = torch.randn(2, 256).half()

    assert kernel.apply_weights(layer, x).shape == (2, n)


BAD = {
    "not symmetric INT4": lambda e: {"weight_type": e.types.uint8b128},
    "zero points": lambda e: {"zero_points": True},
    "outputs of type torch.float32, not float16 or bfloat16": lambda e: {"act_type": torch.float32},
    "activations of type torch.bfloat16, not torch.float16": lambda e: {"act_type": torch.bfloat16, "out_type": torch.float16},
    "weights of type uint4": lambda e: {
        "act_type": torch.float8_e4m3fn,
        "out_type": torch.float16,
        "weight_type": e.types.uint4,
    },
    "group_size 16": lambda e: {"group_size": 16},
    "outputs of type": lambda e: {"out_type": torch.float32},
    "not a multiple of 128": lambda e: {"partition_weight_shape": (192, 128)},
}


@pytest.mark.parametrize(("reason", "changes"), BAD.items(), ids=BAD)
def test_what_we_cannot_hold_stays_with_vllm(engine, caplog, reason, changes):
    config = engine.describe(**changes(engine))

    chosen = [engine.choose(config) for _ in range(3)]

    assert chosen == [engine.stock] * 3
    assert [reason in line for line in caplog.messages] == [True]  # said once, however many layers there are


def fp8(engine, dtype=torch.bfloat16):
    """How vLLM describes a layer of its scheme for FP8 activations."""
    return {"weight_type": engine.types.int4, "act_type": torch.float8_e4m3fn, "out_type": dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_column", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_activations_in_fp8(engine, make, caplog, dtype, per_column, sparse):
    """Many tokens are rounded, each by its largest value; few are not. Scales are those that were stored."""
    weight = make(group_size=256 if per_column else 128, sparse=sparse)
    kernel, layer = engine.load(weight, **fp8(engine, dtype))
    many, bias = torch.randn(w4a8.LEAST_ROWS, 256).to(dtype), torch.randn(128).to(dtype)

    assert type(kernel).__name__ == "PackedInt4LinearKernel"
    assert layer.weight_packed.shape[2] == 1024  # dense, whatever the codes are
    assert "1 layers FP8 on our kernels" in caplog.messages[-1]
    for x, rounded in ((many, True), (many[:-1], False)):
        values, scales = round_tokens(x)
        read = values.double() * scales.double()[:, None] if rounded else x.double()
        expected = read @ weight.dequantize(torch.float64).T + bias.double()
        y = kernel.apply_weights(layer, x, bias).double()
        assert torch.allclose(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_fp8_needs_both_kinds_of_kernels(engine, monkeypatch, caplog):
    asked = []

    def unfit(_index, dtype, operator, group):
        asked.append((dtype, operator, group))
        return "self-test: wrong" if operator is w4a8.OPERATOR else None

    monkeypatch.setattr(engine.kernel, "unfit", unfit)

    assert engine.choose(engine.describe(**fp8(engine))) is engine.stock
    assert asked == [(torch.bfloat16, w4a16.OPERATOR, 128), (torch.bfloat16, w4a8.OPERATOR, 128)]
    assert "self-test: wrong" in caplog.text


def test_fp8_stays_with_vllm_where_no_kernel_of_ours_has_it(engine, monkeypatch, caplog):
    monkeypatch.setattr(ops, "fp8_supported", lambda *_: "`Some GPU` is neither a Hopper nor an Ada GPU")

    assert engine.choose(engine.describe(**fp8(engine))) is engine.stock
    assert engine.choose(engine.describe()) is not engine.stock
    assert "neither a Hopper nor an Ada GPU" in caplog.text


def test_a_layer_that_vllm_has_no_kernel_for_either_says_what_was_wrong(engine, make, monkeypatch):
    """Its own kernel for FP8 wants bfloat16."""

    def explode(*_args):
        raise torch.OutOfMemoryError("full")

    def bfloat16_alone(_class, c):
        return c.out_type == torch.bfloat16, "bfloat16 alone"

    monkeypatch.setattr(engine.stock, "can_implement", classmethod(bfloat16_alone))
    monkeypatch.setattr(engine.kernel.ops, "pack", explode)

    kernel, layer = engine.load(make(), **fp8(engine))
    assert kernel.apply_weights(layer, torch.randn(1, 256).bfloat16()) == "stock"
    with pytest.raises(ValueError, match="marlin-tools: OutOfMemoryError: full, and vLLM has no other kernel for such a layer"):
        engine.load(make(), **fp8(engine, torch.float16))


def test_scales_beyond_what_float16_sums_can_hold_are_multiplied_in_16_bits(engine, make):
    weight = make()
    weight.scales[0, 0] = 300
    kernel, layer = engine.load(weight, **fp8(engine, torch.float16))
    x = torch.randn(w4a8.LEAST_ROWS, 256).half() / 64

    expected = x.double() @ weight.dequantize(torch.float64).T
    assert torch.allclose(kernel.apply_weights(layer, x).double(), expected, rtol=2e-3, atol=1e-3)


def test_act_order_stays_with_vllm(engine, caplog):
    if not engine.old:
        assert "has_g_idx" not in engine.config_class.__dataclass_fields__  # newer versions do not offer such layers
        return
    assert engine.choose(engine.describe(has_g_idx=True)) is engine.stock
    assert "act-order" in caplog.text


def test_a_kernel_that_fails_its_test_is_not_chosen(engine, monkeypatch, caplog):
    monkeypatch.setattr(engine.kernel, "unfit", lambda *_args, **_kwargs: "self-test: 8x64 float16 g128: largest error 3")

    assert engine.choose(engine.describe()) is engine.stock
    assert "self-test: 8x64" in caplog.text


def test_no_exception_of_ours_reaches_the_engine(engine, monkeypatch, caplog):
    def explode(*_args, **_kwargs):
        raise RuntimeError("no NVRTC\nat all")

    monkeypatch.setattr(engine.kernel, "unfit", explode)

    assert engine.choose(engine.describe()) is engine.stock
    assert "RuntimeError: no NVRTC at all" in caplog.text


def test_a_layer_that_cannot_be_packed_is_given_back_untouched(engine, make, monkeypatch, caplog):
    def explode(*_args, **_kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(engine.kernel.ops, "pack", explode)
    weight = make()
    kernel, layer = engine.load(weight)

    assert kernel.apply_weights(layer, torch.randn(1, 256).half()) == "stock"
    assert engine.stock.loaded == 1
    assert layer.weight_packed.shape == (128, 32)
    assert "no layers on our kernels, 1 on vLLM's own (OutOfMemoryError: full)" in caplog.text


def test_small_scales_are_exact_in_float16(engine, make):
    weight = make()
    small = type(weight)(weight.codes, torch.full_like(weight.scales, 3 * 2.0**-24), 128)

    kernel, _layer = engine.load(small, act_type=torch.bfloat16)

    assert kernel._instead is None


@pytest.mark.parametrize("scale", [2.0**-26, 2.0**17], ids=["too small", "too large"])
def test_scales_that_float16_cannot_hold_go_back(engine, scale):
    with pytest.raises(ValueError, match="not exact in float16"):
        engine.kernel._float16(torch.full((4, 2), scale, dtype=torch.bfloat16))


def test_a_failure_of_sparse_kernels_leaves_the_dense_ones(engine, make, monkeypatch, caplog):
    monkeypatch.setattr(engine.kernel, "unfit", lambda *arguments: "wrong" if arguments[2] is w24a16.OPERATOR else None)
    _kernel, layer = engine.load(make(sparse=True))

    assert layer.weight_packed.shape[2] == 1024
    assert "2:4 sparse layers run as dense ones (wrong)" in caplog.text


def test_one_line_says_which_layers_are_ours(engine, make, caplog):
    engine.choose(engine.describe(group_size=16))
    engine.load(make())
    engine.load(make(sparse=True))

    assert "1 layers 2:4 and 1 layers dense on our kernels, 1 on vLLM's own (group_size 16" in caplog.messages[-1]


def test_the_weights_are_in_no_number_of_the_graph(engine, make):
    """Another checkpoint may come under the same path: its layers run through what was compiled for the first."""
    (kernel, first), (_, second) = engine.load(make(seed=0)), engine.load(make(seed=1))
    third = engine.load(type(make())(make(seed=2).codes, make(seed=2).scales * 1000, 128))[1]
    compiled = torch.compile(kernel.apply_weights, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 256).half()
    compiled(first, x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for layer in (second, third):
            assert torch.equal(compiled(layer, x), kernel.apply_weights(layer, x))
    assert first.packed_exponent.item() != third.packed_exponent.item()


def test_the_compile_cache_knows_our_choice(engine, make):
    settings = engine.settings()
    plain = settings.compute_hash()
    engine.load(make())
    dense = settings.compute_hash()
    engine.load(make(sparse=True))
    both = settings.compute_hash()
    engine.tally._layers.clear()
    engine.load(make(), **fp8(engine))
    rounded = settings.compute_hash()
    with inductor.patch({"triton.enable_pdl": True}):
        early = settings.compute_hash()

    assert plain == "0123456789"  # nothing of ours is loaded: vLLM's own hash
    assert len({plain, dense, both, rounded, early}) == 5
    assert {len(value) for value in (plain, dense, both, rounded, early)} == {10}


def test_loading_again_keeps_the_layer(engine, make):
    weight = make()
    kernel, layer = engine.load(weight)
    x = torch.randn(1, 256).half()
    before = kernel.apply_weights(layer, x)
    again = engine.load(weight)[1]
    layer.weight_packed, layer.weight_scale = again.weight_packed, again.weight_scale
    kernel._keep(layer, engine.kernel.ops.pack(weight))

    assert torch.equal(kernel.apply_weights(layer, x), before)


@pytest.mark.parametrize("sparse", [False, True])
def test_vllm_s_defaults_do_not_reach_us(engine, make, sparse):
    torch.set_default_dtype(torch.bfloat16)
    try:
        kernel, layer = engine.load(make(sparse=sparse), under=lambda: torch.device("meta"))
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer.packed_exponent.device.type == "cpu"
    assert kernel.apply_weights(layer, torch.randn(1, 256).half()).shape == (1, 128)


def test_one_variable_turns_it_off(engine, monkeypatch):
    engine.possible["cuda"].remove(engine.kernel.PackedInt4LinearKernel)
    monkeypatch.setenv("MARLIN_TOOLS_VLLM", "0")
    plugin.register()

    assert engine.possible["cuda"] == [engine.stock]


def test_a_vllm_of_another_make_is_left_alone(engine, monkeypatch, caplog):
    engine.possible["cuda"].remove(engine.kernel.PackedInt4LinearKernel)
    monkeypatch.delattr(engine.kernel.registry, "_POSSIBLE_KERNELS")
    plugin.register()

    assert engine.possible["cuda"] == [engine.stock]
    assert "vLLM is left as it is (AttributeError" in caplog.text


def test_without_vllm_nothing_happens(monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "marlin_tools.serving.vllm_kernel", raising=False)
    plugin.register()

    assert "vLLM is left as it is (ModuleNotFoundError" in caplog.text


def test_an_interrupt_is_not_swallowed():
    with pytest.raises(KeyboardInterrupt), plugin.Attempt("nothing"):
        raise KeyboardInterrupt
