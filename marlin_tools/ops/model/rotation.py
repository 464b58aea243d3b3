"""The rotary embedding of queries and keys in one kernel, in place, to the last bit as transformers' own code computes it.

Shape letters: B sequences, S tokens, H heads, D elements per head.
"""

from functools import cache

import torch
from torch import Tensor

from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import ELEMENTS, Arguments, Kernel
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import dtype_name

HEAD_SIZES = (64, 128, 256)
"""Elements per head that there are kernels for."""

_THREADS = 256
_ARGUMENTS = Arguments(
    "RotateArguments",
    "queries:P keys:P cosines:P sines:P query_stride:q key_stride:q table_stride:q tokens:i length:i query_heads:i key_heads:i",
)


@cache
def _kernel(dtype: torch.dtype, head: int, target: str) -> Kernel:
    return Kernel(
        f"rotate-{head}-{dtype_name(dtype)}",
        target,
        "stream/rotate.cu",
        f"rotate_kernel<{ELEMENTS[dtype]}, {head}>",
        _THREADS,
        _ARGUMENTS,
        mirrors=(("kThreads", _THREADS),),
    )


def rotate_kernels(target: str) -> list[Kernel]:
    """Every kernel of this kind."""
    return [_kernel(dtype, head, target) for dtype in ELEMENTS for head in HEAD_SIZES]


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
    driver.start(
        _kernel(queries.dtype, head, target_of(queries.device)),
        -(-items // _THREADS),
        queries,
        *(queries.data_ptr(), keys.data_ptr(), cosines.data_ptr(), sines.data_ptr()),
        *(queries.stride(2), keys.stride(2), 0 if cosines.shape[0] == 1 else cosines.stride(0)),
        *(batch * tokens, tokens, query_heads, key_heads),
    )
