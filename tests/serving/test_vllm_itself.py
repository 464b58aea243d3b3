"""The plugin against vLLM itself, where it is installed; needs no GPU. The stand-ins of the other tests are its likeness."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

from marlin_tools.formats import FORMATS

pytest.importorskip("vllm.model_executor.kernels.linear")


@pytest.fixture
def kernel(monkeypatch):
    from marlin_tools import ops
    from marlin_tools.serving import vllm as plugin
    from marlin_tools.serving import vllm_kernel

    plugin.register()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vllm_kernel, "unfit", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(ops, "prepare", lambda *_: None)
    monkeypatch.setattr(ops, "prepare_sparse", lambda *_: None)
    monkeypatch.setattr(ops, "prepare_fp8", lambda *_: None)
    monkeypatch.setattr(ops, "fp8_supported", lambda *_: None)
    return vllm_kernel


def describe(kernel, **changes):
    values = {
        "full_weight_shape": (256, 128),
        "partition_weight_shape": (256, 128),
        "weight_type": kernel.scalar_types.uint4b8,
        "act_type": torch.float16,
        "group_size": 128,
        "zero_points": False,
        "has_g_idx": False,
    }
    known = {field.name for field in dataclasses.fields(kernel.MPLinearLayerConfig)}
    return kernel.MPLinearLayerConfig(**{name: value for name, value in (values | changes).items() if name in known})


def test_our_kernel_is_first(kernel):
    from marlin_tools.serving import vllm as plugin

    plugin.register()
    kernels = kernel.registry._POSSIBLE_KERNELS[kernel.PlatformEnum.CUDA]

    assert kernels[0] is kernel.PackedInt4LinearKernel
    assert kernels.count(kernel.PackedInt4LinearKernel) == 1
    assert len(kernels) > 3


def test_it_is_a_whole_kernel(kernel):
    assert not inspect.isabstract(kernel.PackedInt4LinearKernel)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
def test_a_layer_computes_its_product(kernel, make, layout, sparse):
    weight = make(sparse=sparse)
    tensors, layer = FORMATS[layout].pack(weight), nn.Module()
    names = {"compressed-tensors": ("weight_packed", "weight_scale"), "gptq": ("qweight", "scales")}[layout]
    for name in names:
        parameter = nn.Parameter(tensors[name].clone(), requires_grad=False)  # vLLM writes into it
        parameter.output_dim = 0 if layout == "compressed-tensors" else 1
        layer.register_parameter(name, parameter)
    ours = kernel.PackedInt4LinearKernel(describe(kernel), *names)
    ours.process_weights_after_loading(layer)
    x = torch.randn(3, 256).half()

    expected = x.double() @ weight.dequantize(torch.float64).T
    assert torch.allclose(ours.apply_weights(layer, x).double(), expected, rtol=2e-3, atol=1e-3)


def test_a_layer_that_reads_fp8(kernel, make):
    weight = make()
    tensors, layer = FORMATS["compressed-tensors"].pack(weight), nn.Module()
    for name in ("weight_packed", "weight_scale"):
        parameter = nn.Parameter(tensors[name].clone(), requires_grad=False)
        parameter.output_dim = 0
        layer.register_parameter(name, parameter)
    fp8 = {"weight_type": kernel.scalar_types.int4, "act_type": torch.float8_e4m3fn, "out_type": torch.float16}
    ours = kernel.PackedInt4LinearKernel(describe(kernel, **fp8), "weight_packed", "weight_scale")
    ours.process_weights_after_loading(layer)

    x = torch.randn(600, 256).half()
    y = ours.apply_weights(layer, x)
    exact = x.double() @ weight.dequantize(torch.float64).T
    lost = (y.double() - exact).norm() / exact.norm()
    assert 0.01 < lost < 0.04  # what rounding to e4m3 costs


def test_what_we_cannot_hold_has_a_reason(kernel):
    assert kernel.PackedInt4LinearKernel.can_implement(describe(kernel)) == (True, None)
    for changes in ({"zero_points": True}, {"weight_type": kernel.scalar_types.uint8b128}, {"act_type": torch.float32}):
        taken, reason = kernel.PackedInt4LinearKernel.can_implement(describe(kernel, **changes))
        assert not taken
        assert reason


def test_the_hash_of_the_settings_is_ours_to_extend(kernel):
    from vllm.config import VllmConfig

    assert VllmConfig.compute_hash.__wrapped__ is not None
    assert next(iter(inspect.signature(VllmConfig.compute_hash).parameters)) == "self"
