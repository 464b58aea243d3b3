"""Stand-ins for the few classes of vLLM that the plugin meets, in the shapes of the oldest and the newest version."""

import importlib
import sys
import types
from contextlib import nullcontext
from dataclasses import dataclass, make_dataclass

import pytest
import torch
from torch import nn

from marlin_tools import ops
from marlin_tools.formats import FORMATS
from marlin_tools.ops.linear import packed
from marlin_tools.quantized import ZERO, QuantizedLinear


@dataclass(frozen=True)
class ScalarType:
    name: str

    def __str__(self):
        return self.name


class MPLinearKernel:
    """What both versions' base class does with its arguments, and how it swaps a parameter."""

    def __init__(self, c, w_q_param_name, w_s_param_name, w_zp_param_name=None):
        assert self.can_implement(c)
        self.config, self.w_q_name, self.w_s_name, self.w_zp_name = c, w_q_param_name, w_s_param_name, w_zp_param_name

    def _transform_param(self, layer, name, fn):
        setattr(layer, name, nn.Parameter(fn(getattr(layer, name)).data, requires_grad=False))


class OldMPLinearKernel(MPLinearKernel):
    def __init__(self, c, w_q_param_name, w_s_param_name, w_zp_param_name=None, w_gidx_param_name=None):
        super().__init__(c, w_q_param_name, w_s_param_name, w_zp_param_name)
        self.w_gidx_name = w_gidx_param_name


FIELDS = ["full_weight_shape", "partition_weight_shape", "weight_type", "act_type", "group_size", "zero_points"]


class Engine:
    """A vLLM: `vllm_kernel` is ours, loaded against it; `layer` makes what a checkpoint's tensors become."""

    def __init__(self, version):
        self.old = version == "0.22.1"
        self.version = version
        fields = [(name, object) for name in [*FIELDS, *(["has_g_idx"] if self.old else [])]]
        self.config_class = make_dataclass("MPLinearLayerConfig", [*fields, ("out_type", object, None)])
        self.base = OldMPLinearKernel if self.old else MPLinearKernel
        self.types = types.SimpleNamespace(**{name: ScalarType(name) for name in ("uint4b8", "uint4", "uint8b128", "int4")})

        class Stock(self.base):
            """vLLM's own kernel: takes all, says what it was given."""

            loaded = 0

            @classmethod
            def get_min_capability(cls):
                return 75

            @classmethod
            def can_implement(cls, c):
                return True, None

            def process_weights_after_loading(self, layer):
                Stock.loaded += 1

            def apply_weights(self, layer, x, bias=None):
                return "stock"

        self.stock = Stock
        self.platform = "cuda"
        self.possible = {"cuda": [Stock], "cpu": []}

    def modules(self):
        def choose_mp_linear_kernel(config, compute_capability=None):
            for kernel in self.possible["cuda"]:
                if kernel.can_implement(config)[0]:
                    return kernel
            raise ValueError("Failed to find a kernel")

        class VllmConfig:
            def compute_hash(self, *_args):
                return "0123456789"

        self.choose, self.settings = choose_mp_linear_kernel, VllmConfig
        contents = {
            "vllm": {},
            "vllm.config": {"VllmConfig": VllmConfig},
            "vllm.platforms": {"PlatformEnum": types.SimpleNamespace(CUDA="cuda", CPU="cpu")},
            "vllm.scalar_type": {"scalar_types": self.types},
            "vllm.model_executor": {},
            "vllm.model_executor.kernels": {},
            "vllm.model_executor.kernels.linear": {
                "_POSSIBLE_KERNELS": self.possible,
                "choose_mp_linear_kernel": choose_mp_linear_kernel,
            },
            "vllm.model_executor.kernels.linear.mixed_precision": {
                "MPLinearKernel": self.base,
                "MPLinearLayerConfig": self.config_class,
            },
        }
        for name, members in contents.items():
            module = types.ModuleType(name)
            module.__dict__.update(members)
            yield name, module

    def describe(self, n=128, k=256, **changes):
        values = {
            "full_weight_shape": (k, n),
            "partition_weight_shape": (k, n),
            "weight_type": self.types.uint4b8,
            "act_type": torch.float16,
            "group_size": 128,
            "zero_points": False,
        }
        if self.old:
            values["has_g_idx"] = False
        return self.config_class(**{**values, **changes})

    def load(self, weight, layout="compressed-tensors", under=nullcontext, **changes):
        """Choose a kernel for a layer, give it the checkpoint's tensors, and let the kernel have them."""
        (n, k), per_column = weight.shape, weight.group_size == weight.shape[1]
        config = self.describe(n, k, group_size=-1 if per_column else weight.group_size, **changes)
        dtype = config.out_type or config.act_type
        tensors = FORMATS[layout].pack(weight, dtype)
        names = {"compressed-tensors": ("weight_packed", "weight_scale"), "gptq": ("qweight", "scales")}[layout]
        layer = nn.Module()
        for name in names:
            tensor = tensors[name].to(dtype) if tensors[name].is_floating_point() else tensors[name]
            parameter = nn.Parameter(tensor, requires_grad=False)
            parameter.output_dim = 0 if layout == "compressed-tensors" else 1
            layer.register_parameter(name, parameter)
        with under():
            kernel = self.choose(config)(config, *names, "qzeros", *(["g_idx"] if self.old else []))
            kernel.process_weights_after_loading(layer)
        return kernel, layer


@pytest.fixture(params=["0.22.1", "0.33.0"])
def engine(request, monkeypatch):
    """A vLLM with our plugin in it; on a CPU the operator's reference stands for the kernels."""
    vllm = Engine(request.param)
    for name, module in vllm.modules():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("marlin_tools.serving.vllm_kernel", "marlin_tools.serving.tally"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    vllm.kernel = importlib.import_module("marlin_tools.serving.vllm_kernel")
    vllm.tally = importlib.import_module("marlin_tools.serving.tally").TALLY
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(vllm.kernel, "unfit", lambda *_args, **_kwargs: None)
    monkeypatch.setattr(ops, "prepare", lambda *_: None)
    monkeypatch.setattr(ops, "prepare_sparse", lambda *_: None)
    monkeypatch.setattr(ops, "prepare_fp8", lambda *_: None)
    monkeypatch.setattr(ops, "fp8_supported", lambda *_: None)
    from marlin_tools.serving import vllm as plugin

    plugin.register()
    yield vllm
    for name in ("marlin_tools.serving.vllm_kernel", "marlin_tools.serving.tally"):
        sys.modules.pop(name, None)


@pytest.fixture
def make():
    """A quantised weight, dense or 2:4."""

    def weight(n=128, k=256, group_size=128, *, sparse=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 16, (n, k // 4, 4), dtype=torch.uint8, generator=generator)
        if sparse:
            codes.scatter_(2, torch.rand(codes.shape, generator=generator).argsort(dim=2)[..., :2], ZERO)
        scales = (torch.rand((n, k // group_size), generator=generator) * 0.02 + 0.01).bfloat16().half()
        return QuantizedLinear(codes.view(n, k), scales, group_size)

    return weight


assert packed  # registers the operator
