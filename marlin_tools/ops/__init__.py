"""The Python face of `kernels/`: one operation, its packed weights, and what is needed to build and trust it.

    packed = pack(quantized_linear)          # once, at load
    y = linear(x, packed, bias)              # on any GPU since Ampere, or slowly on a CPU

and the same for 2:4-sparse weights, which are smaller and faster: `pack_sparse`, `sparse_linear`.

On Hopper and Ada the dense weights can be multiplied with activations in 8 bits, too, for many tokens: `fp8_linear`.

Read `linear/layout.py` first, then `linear/w4a16.py`, `linear/operator.py` and `linear/plan.py`; then
`kernels/w4a16/narrow.cu`.
"""

from marlin_tools.ops.catalog import BuildReport, build, kernels
from marlin_tools.ops.linear.layout import PackedWeight, limits, pack, unpack
from marlin_tools.ops.linear.selftest import CheckResult, self_test
from marlin_tools.ops.linear.sparse_layout import PackedSparse, pack_sparse, unpack_sparse
from marlin_tools.ops.linear.w4a8 import fp8_linear, fp8_supported, prepare_fp8
from marlin_tools.ops.linear.w4a16 import dequantize, linear, prepare
from marlin_tools.ops.linear.w24a16 import dequantize_sparse, prepare_sparse, sparse_linear
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.runtime.target import TARGETS

__all__ = [
    "TARGETS",
    "BuildReport",
    "CheckResult",
    "Kernel",
    "PackedSparse",
    "PackedWeight",
    "build",
    "dequantize",
    "dequantize_sparse",
    "fp8_linear",
    "fp8_supported",
    "kernels",
    "limits",
    "linear",
    "pack",
    "pack_sparse",
    "prepare",
    "prepare_fp8",
    "prepare_sparse",
    "self_test",
    "sparse_linear",
    "unpack",
    "unpack_sparse",
]
