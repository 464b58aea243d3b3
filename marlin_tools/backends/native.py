"""A transformers model whose quantised linears run on our kernels.

The model is built by transformers as always; then every linear that has codes and scales becomes a `NativeLinear`. Nothing
else of the model changes, so generation, static caches, CUDA graphs and `torch.compile` work as they do for the original.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from marlin_tools import ops
from marlin_tools.errors import DeviceError, ModelError
from marlin_tools.quantized import QuantizedLinear


class NativeLinear(nn.Module):
    """`nn.Linear` with a packed INT4 weight. Takes float16 or bfloat16 [..., K]; the weights stay in 4 bits."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: ops.PackedWeight, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = weight.in_features, weight.out_features
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> ops.PackedWeight:
        """What the kernels read."""
        return ops.PackedWeight(self.codes, self.scales, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        """One operator, whatever the leading dimensions."""
        rows = x.reshape(-1, self.in_features)
        y: Tensor = torch.ops.marlin_tools.w4a16_linear(rows, self.codes, self.scales, self.bias, self.out_features)
        return y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As in `nn.Linear`, for `print(model)`."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, group_size={self.weight.group_size}, bias={self.bias is not None}"


def build(weight: QuantizedLinear, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module that multiplies with `weight` on a GPU, with its kernels loaded. Activations are expected in `dtype`."""
    if dtype not in {torch.float16, torch.bfloat16}:
        raise DeviceError(
            f"the native kernels multiply float16 or bfloat16 activations, not {dtype}",
            hint="load the model in one of these, or use `--backend reference`",
        )
    _check_limits(f"a linear of {weight.shape[0]} x {weight.shape[1]}", weight)
    packed = ops.pack(weight.to(device))
    if device.type == "cuda":
        ops.prepare(packed, dtype)
    return NativeLinear(packed, None if bias is None else bias.detach().to(device, dtype))


def replace(model: nn.Module, weights: Mapping[str, QuantizedLinear], dtype: torch.dtype = torch.float16) -> None:
    """Swap the linears named in `weights` in place, each on the device where it was; shapes are checked before the first."""
    for name, weight in weights.items():
        linear = _linear(model, name)
        if weight.shape != (linear.out_features, linear.in_features):
            raise ModelError(f"`{name}` is {linear.out_features} x {linear.in_features} in the model, {weight.shape} quantised")
        _check_limits(f"`{name}`", weight)
    for name, weight in weights.items():
        linear = _linear(model, name)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, build(weight, linear.bias, linear.weight.device, dtype))


def _check_limits(what: str, weight: QuantizedLinear) -> None:
    if reason := ops.limits(weight.shape[1], weight.group_size):
        raise ModelError(f"{what}: {reason}", hint="use `--backend reference`")


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"the model has no layer `{name}`") from error
    if not isinstance(module, nn.Linear):
        raise ModelError(f"`{name}` is a {type(module).__name__}, not a linear layer")
    return module
