"""The product alone: a weight of your own as codes and scales, packed, multiplied. On a GPU by the kernels.

python examples/operator_alone.py
"""

import torch

from marlin_tools.ops.linear import layout, packed, reference
from marlin_tools.quantized import ZERO, QuantizedLinear

OUTPUTS, INPUTS, GROUP = 512, 1024, 128


def main() -> None:
    """Round a random weight to INT4, pack it, multiply, and compare with the product of the weight that was rounded."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float16
    torch.manual_seed(0)
    weight = 0.02 * torch.randn(OUTPUTS, INPUTS)
    groups = weight.view(OUTPUTS, INPUTS // GROUP, GROUP)
    scales = (groups.abs().amax(dim=2) / 7).half()
    codes = (groups / scales[..., None].float()).round().add(ZERO).clamp(0, 15).to(torch.uint8).view(OUTPUTS, INPUTS)

    linear = QuantizedLinear(codes, scales, GROUP)
    tiles = layout.pack(linear).to(device)
    x = torch.randn(16, INPUTS, dtype=dtype, device=device)
    exponent = packed.exponent_tensor(tiles)
    y = packed.packed_linear(
        x, tiles.codes, tiles.scales, exponent, None, OUTPUTS
    )  # also under torch.compile and in CUDA graphs

    error = (y.double() - reference.exact(x, tiles)).abs().max().item()
    lost = ((weight - linear.dequantize()).square().sum() / weight.square().sum()).item()
    stored = tiles.codes.numel() * tiles.codes.element_size() + tiles.scales.numel() * tiles.scales.element_size()
    print(f"{device}: {tuple(x.shape)} x {linear.shape} -> {tuple(y.shape)}, largest error of the product {error:.1e}")
    print(f"{8 * stored / weight.numel():.3f} bits per weight, rounding lost {lost:.2%} of the weight's energy")


if __name__ == "__main__":
    main()
