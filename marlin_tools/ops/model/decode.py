"""What a decoder block does to one new token per sequence besides its products: three small kernels in the place of forty.

    add_norm(residual, branch, weight, epsilon)     residual += branch; its RMS norm
    attend(joint, keys, values, position, ...)      rotation, keys and values into the cache, attention over it
    gate(both)                                      silu(gate) * up

Each has a plain-torch implementation for the CPU, and the kernels are tested against it. Sources: `kernels/decode/`.

Shape letters: B sequences, H heads, L capacity of the cache, D elements per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import e, log2

import torch
from torch import Tensor
from torch.nn.functional import silu

from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.kernel import ELEMENTS, Arguments, Kernel
from marlin_tools.ops.runtime.scratch import COUNTER_BYTES, scratch_for
from marlin_tools.ops.runtime.target import target_of
from marlin_tools.quantized import dtype_name

HEAD_SIZES = (64, 128, 256)
"""Elements per head that the kernels know."""

MOST_COLUMNS = 16384
"""The widest residual stream that a block's registers hold."""

_NORM, _GATE, _ATTEND = 512, 256, 256  # threads of a CTA
_ARGUMENTS = {
    "add_norm": Arguments("NormArguments", "residual:P branch:P weight:P out:P epsilon:f columns:i"),
    "gate": Arguments("GateArguments", "both:P out:P vectors:Q width:i"),
    "attend": Arguments(
        "AttendArguments",
        "joint:P keys:P values:P out:P cosines:P sines:P query_norm:P key_norm:P partials:P arrivals:P position:P "
        "epsilon:f scale:f sharers:i key_heads:i capacity:i splits:i",
    ),
}
_LOG2_E = log2(e)


def _kernel(kind: str, file: str, dtype: torch.dtype, target: str, threads: int, *sizes: int) -> Kernel:
    """All wait by themselves for the kernel before them. `sizes` are template parameters."""
    mirrors = [("kThreads", threads), *([("kThreads * kMostVectors * 8", MOST_COLUMNS)] if kind == "add_norm" else [])]
    return Kernel(
        "-".join([kind, *(["x".join(map(str, sizes))] if sizes else []), dtype_name(dtype)]),
        target,
        f"decode/{file}.cu",
        f"{kind}_kernel<{', '.join([ELEMENTS[dtype], *map(str, sizes)])}>",
        threads,
        _ARGUMENTS[kind],
        overlaps=True,
        mirrors=tuple(mirrors),
    )


@cache
def _norm_kernel(dtype: torch.dtype, target: str) -> Kernel:
    return _kernel("add_norm", "norm", dtype, target, _NORM)


@cache
def _gate_kernel(dtype: torch.dtype, target: str) -> Kernel:
    return _kernel("gate", "gate", dtype, target, _GATE)


@cache
def _attend_kernel(dtype: torch.dtype, target: str, head: int, queries: int) -> Kernel:
    return _kernel("attend", "attend", dtype, target, _ATTEND, head, queries)


def decode_kernels(target: str) -> list[Kernel]:
    """Every instantiation that exists."""
    return [
        kernel
        for dtype in ELEMENTS
        for kernel in (
            _norm_kernel(dtype, target),
            _gate_kernel(dtype, target),
            *(_attend_kernel(dtype, target, head, queries) for head in HEAD_SIZES for queries in (1, 2, 4)),
        )
    ]


_library = torch.library.Library("marlin_tools", "FRAGMENT")
_library.define("add_norm(Tensor(a!) residual, Tensor? branch, Tensor weight, float epsilon) -> Tensor")
_library.define("gate(Tensor both) -> Tensor")
_library.define(
    "attend(Tensor joint, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor[] tables, float epsilon, float scale)"
    " -> Tensor"
)


def add_norm(residual: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """Add `branch` to `residual` [B, columns] in place, and return the sum's RMS norm times `weight`."""
    out: Tensor = torch.ops.marlin_tools.add_norm(residual, branch, weight, epsilon)
    return out


def gate(both: Tensor) -> Tensor:
    """Silu of the first half of the columns times the second half."""
    out: Tensor = torch.ops.marlin_tools.gate(both)
    return out


@dataclass(frozen=True)
class Rotation:
    """What turns positions into angles: tables [L, D], and the norms of queries and keys where the model has them."""

    cosines: Tensor
    sines: Tensor
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    epsilon: float = 0.0

    @property
    def tables(self) -> list[Tensor]:
        """Cosines, sines, and both norms or none."""
        return [table for table in (self.cosines, self.sines, self.query_norm, self.key_norm) if table is not None]


def attend(joint: Tensor, keys: Tensor, values: Tensor, position: Tensor, rotation: Rotation, scale: float) -> Tensor:
    """From the joint projection [B, H + 2 Hk, D] of a token to what its queries see [B, H, D].

    Keys and values [B, Hk, L, D] hold the first `position` tokens and get this one.
    """
    out: Tensor = torch.ops.marlin_tools.attend(joint, keys, values, position, rotation.tables, rotation.epsilon, scale)
    return out


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_FAKES: dict[str, Callable[..., Tensor]] = {
    "add_norm": lambda residual, *_: _like(residual),
    "gate": lambda both: _like(both[:, : both.shape[1] // 2]),
    "attend": lambda joint, keys, *_: _like(joint[:, 2 * keys.shape[1] :]),
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"marlin_tools::{_name}", _fake)


# ---- in plain torch -------------------------------------------------------------------------------------------------------


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@torch.library.impl(_library, "add_norm", "CPU")
def _add_norm_on_cpu(residual: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    if branch is not None:
        residual += branch
    return _normed(residual, weight, epsilon)


@torch.library.impl(_library, "gate", "CPU")
def _gate_on_cpu(both: Tensor) -> Tensor:
    first, second = both.chunk(2, dim=-1)
    return silu(first) * second


@torch.library.impl(_library, "attend", "CPU")
def _attend_on_cpu(
    joint: Tensor, keys: Tensor, values: Tensor, position: Tensor, tables: list[Tensor], epsilon: float, scale: float
) -> Tensor:
    key_heads, at = keys.shape[1], int(position)
    queries, new_keys, new_values = joint.split([joint.shape[1] - 2 * key_heads, key_heads, key_heads], dim=1)
    cosines, sines, *norms = tables
    if norms:
        queries, new_keys = (_normed(x, norm, epsilon) for x, norm in zip((queries, new_keys), norms, strict=True))
    queries, keys[:, :, at] = _turned(queries, cosines[at], sines[at]), _turned(new_keys, cosines[at], sines[at])
    values[:, :, at] = new_values
    k, v = (t[:, :, : at + 1].float().repeat_interleave(queries.shape[1] // key_heads, dim=1) for t in (keys, values))
    scores = torch.einsum("bhd,bhld->bhl", queries.float(), k) * scale
    return torch.einsum("bhl,bhld->bhd", scores.softmax(-1), v).to(queries.dtype)


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return (x.float() * cosine.float() + torch.cat((-high, low), dim=-1).float() * sine.float()).to(x.dtype)


# ---- on a GPU -------------------------------------------------------------------------------------------------------------


@torch.library.impl(_library, "add_norm", "CUDA")
def _add_norm_on_cuda(residual: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    _check(residual=residual, branch=branch, weight=weight)
    rows, columns = residual.shape
    if columns % 8 or columns > MOST_COLUMNS:
        raise ValueError(f"columns must be a multiple of 8 up to {MOST_COLUMNS}, got {columns}")
    out = torch.empty_like(residual)
    device = residual.device
    launch = driver.launch_of(_norm_kernel(residual.dtype, target_of(device)), device, rows)
    launch(_stream(residual), residual.data_ptr(), _address(branch), weight.data_ptr(), out.data_ptr(), epsilon, columns)
    return out


@torch.library.impl(_library, "gate", "CUDA")
def _gate_on_cuda(both: Tensor) -> Tensor:
    _check(both=both)
    rows, columns = both.shape
    width = columns // 2
    if columns % 16:
        raise ValueError(f"each half must be a multiple of 8 columns, got {columns} in all")
    out = both.new_empty((rows, width))
    vectors = rows * width // 8
    launch = driver.launch_of(_gate_kernel(both.dtype, target_of(both.device)), both.device, -(-vectors // _GATE))
    launch(_stream(both), both.data_ptr(), out.data_ptr(), vectors, width)
    return out


@torch.library.impl(_library, "attend", "CUDA")
def _attend_on_cuda(
    joint: Tensor, keys: Tensor, values: Tensor, position: Tensor, tables: list[Tensor], epsilon: float, scale: float
) -> Tensor:
    cosines, sines, query_norm, key_norm = (*tables, None, None)[:4]
    _check(joint=joint, keys=keys, values=values, cosines=cosines, sines=sines, query_norm=query_norm, key_norm=key_norm)
    if position.dtype != torch.int32 or position.numel() != 1:
        raise ValueError(f"position must be one int32, got {position.dtype} {list(position.shape)}")
    batch, per_token, head = joint.shape
    _, key_heads, capacity, _ = keys.shape
    if head not in HEAD_SIZES:
        raise ValueError(f"heads of {head} elements: the kernels know {', '.join(map(str, HEAD_SIZES))}")
    heads = per_token - 2 * key_heads
    together = next(count for count in (4, 2, 1) if heads // key_heads % count == 0)
    jobs, index = batch * heads // together, joint.device.index
    splits = max(1, min(2 * _sm_count(index) // jobs, capacity // 128))
    assert jobs * 4 <= COUNTER_BYTES or splits == 1, (jobs, splits)
    stream = _stream(joint)
    scratch = scratch_for(index, stream, jobs * splits * together * (head + 2) * 4 if splits > 1 else 0)
    out = joint.new_empty((batch, heads, head))
    kernel = _attend_kernel(joint.dtype, target_of(joint.device), head, together)
    launch = driver.launch_of(kernel, joint.device, jobs * splits)
    addresses = map(_address, (joint, keys, values, out, cosines, sines, query_norm, key_norm))
    sizes = heads // key_heads, key_heads, capacity, splits
    launch(stream, *addresses, scratch + COUNTER_BYTES, scratch, position.data_ptr(), epsilon, scale * _LOG2_E, *sizes)
    return out


def _check(**tensors: Tensor | None) -> None:
    """Refuse, by name, what the kernels cannot read."""
    first = next(iter(tensors.values()))
    assert first is not None
    if first.dtype not in ELEMENTS:
        raise TypeError(f"activations must be float16 or bfloat16, got {first.dtype}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, must be {first.dtype} on {first.device}")
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name} must be contiguous and begin at a multiple of 16 bytes")


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _stream(tensor: Tensor) -> int:
    assert tensor.device.index == torch.cuda.current_device(), "call inside `torch.cuda.device` of the operands"
    return driver.current_stream(tensor.device.index)


@cache
def _sm_count(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
