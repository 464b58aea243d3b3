"""The Python face of `kernels/`: one operation, its packed weights, and what is needed to build and trust it.

    packed = pack(quantized_linear)          # once, at load
    y = linear(x, packed, bias)              # on any GPU since Ampere, or slowly on a CPU

Read `layout.py` first, then `w4a16.py`, then `kernels/w4a16/narrow.cu`.
"""

from marlin_tools.ops.layout import PackedWeight, limits, pack, unpack
from marlin_tools.ops.selftest import CheckResult, self_test
from marlin_tools.ops.variants import TARGETS, BuildReport, Variant, build, kernels
from marlin_tools.ops.w4a16 import dequantize, linear, prepare

__all__ = [
    "TARGETS",
    "BuildReport",
    "CheckResult",
    "PackedWeight",
    "Variant",
    "build",
    "dequantize",
    "kernels",
    "limits",
    "linear",
    "pack",
    "prepare",
    "self_test",
    "unpack",
]
