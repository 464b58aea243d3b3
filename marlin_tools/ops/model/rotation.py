"""The rotary embedding of queries and keys in one kernel, in place, to the last bit as transformers' own code computes it.

Shape letters: B sequences, S tokens, H heads, D elements per head.
"""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

from marlin_tools.ops.linear.variants import ELEMENTS, target_of
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.compiler import Source

HEAD_SIZES = (64, 128, 256)
"""Elements per head that there are kernels for."""

_THREADS = 256
_LAYOUT = struct.Struct("4P3q4i")


@dataclass(frozen=True)
class RotateKernel:
    """One compiled kernel."""

    dtype: torch.dtype
    head: int
    threads: int = field(default=_THREADS, init=False)
    overlaps: bool = field(default=False, init=False)

    @property
    def name(self) -> str:
        """As shown to users."""
        return f"rotate-{self.head}-{str(self.dtype).removeprefix('torch.')}"

    def source(self, target: str) -> Source:
        """What to compile; the same for every target."""
        return Source("stream/rotate.cu", f"rotate_kernel<{ELEMENTS[self.dtype]}, {self.head}>")

    def dynamic_shared_bytes(self, target: str) -> int:
        """None."""
        return 0


ROTATE_KERNELS = tuple(RotateKernel(dtype, head) for dtype in ELEMENTS for head in HEAD_SIZES)
"""Every kernel of this kind."""


def can_rotate(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> bool:
    """Whether `rotate` takes these: 16 bits, [B, H, S, D] with the heads of a token side by side, tables [B or 1, S, D]."""
    (batch, _, tokens, head), dtype = queries.shape, queries.dtype
    all_of_one_kind = all(x.is_cuda and x.dtype == dtype for x in (queries, keys, cosines, sines))
    if not all_of_one_kind or dtype not in ELEMENTS or head not in HEAD_SIZES or cosines.ndim != 3:
        return False
    in_place = all(x.stride()[1:] == (head, x.stride(2), 1) and x.stride(0) == tokens * x.stride(2) for x in (queries, keys))
    aligned = all(x.data_ptr() % 16 == 0 and x.stride(2) % 8 == 0 for x in (queries, keys))
    tables = all(x.shape[1:] == (tokens, head) and x.stride()[1:] == (head, 1) for x in (cosines, sines))
    return in_place and aligned and tables and cosines.stride(0) == sines.stride(0) and cosines.shape[0] in (1, batch)


def rotate(queries: Tensor, keys: Tensor, cosines: Tensor, sines: Tensor) -> None:
    """Each becomes x · cos + (-upper half, lower half) · sin."""
    batch, query_heads, tokens, head = queries.shape
    key_heads = keys.shape[1]
    items = batch * tokens * (query_heads + key_heads) * head // 16
    device = queries.device
    function = driver.loaded(RotateKernel(queries.dtype, head), device, target_of(device))
    launch = driver.Launch(function, _LAYOUT, -(-items // _THREADS))
    launch(
        driver.current_stream(device.index),
        *(queries.data_ptr(), keys.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
        *(queries.stride(2), keys.stride(2), 0 if cosines.shape[0] == 1 else cosines.stride(0)),
        *(batch * tokens, tokens, query_heads, key_heads),
    )
