"""What a decoder block does to one new token per sequence besides its products: three small kernels in the place of forty.

    add_norm(residual, branch, weight, epsilon)     residual += branch; its RMS norm
    attend(joint, keys, values, position, ...)      rotation, keys and values into the cache, attention over it
    gate(both)                                      silu(gate) * up

Each has a plain-torch implementation for the CPU, and the kernels are tested against it. Sources: `kernels/decode/`.

Shape letters: B sequences, H heads, L capacity of the cache, D elements per head.
"""

import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import e, log2

import torch
from torch import Tensor
from torch.nn.functional import silu

from marlin_tools.ops.linear.variants import ELEMENTS
from marlin_tools.ops.runtime import driver
from marlin_tools.ops.runtime.compiler import Source
from marlin_tools.ops.runtime.scratch import COUNTER_BYTES, scratch_for

HEAD_SIZES = (64, 128, 256)
"""Elements per head that the kernels know."""

MOST_COLUMNS = 16384
"""The widest residual stream that a block's registers hold."""

_THREADS = {"add_norm": 512, "gate": 256, "attend": 256}
_NORM, _GATE, _ATTEND = struct.Struct("4Qfi"), struct.Struct("3Qi4x"), struct.Struct("11Q2f4i")
_LOG2_E = log2(e)


@dataclass(frozen=True)
class DecodeKernel:
    """One compiled kernel. `head` and `queries` are template parameters, 0 where the kernel has none."""

    kind: str
    dtype: torch.dtype
    head: int = 0
    queries: int = 0

    @property
    def name(self) -> str:
        """As shown to users and used as the key of the register table."""
        sizes = f"{self.head}" * bool(self.head) + f"x{self.queries}" * bool(self.queries)
        return "-".join(part for part in (self.kind, sizes, str(self.dtype).removeprefix("torch.")) if part)

    @property
    def threads(self) -> int:
        """Threads per block."""
        return _THREADS[self.kind]

    @property
    def overlaps(self) -> bool:
        """All wait by themselves for the kernel before them."""
        return True

    def source(self, target: str) -> Source:
        """The instantiation."""
        sizes = [str(size) for size in (self.head, self.queries) if size]
        file = {"add_norm": "norm"}.get(self.kind, self.kind)
        return Source(f"decode/{file}.cu", f"{self.kind}_kernel<{', '.join([ELEMENTS[self.dtype], *sizes])}>")

    def dynamic_shared_bytes(self, target: str) -> int:
        """None: what they share is declared in the source."""
        return 0


def decode_kernels() -> list[DecodeKernel]:
    """Every instantiation that exists."""
    return [
        kernel
        for dtype in ELEMENTS
        for kernel in (
            DecodeKernel("add_norm", dtype),
            DecodeKernel("gate", dtype),
            *(DecodeKernel("attend", dtype, head, queries) for head in HEAD_SIZES for queries in (1, 2, 4)),
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
    launch = _launch(DecodeKernel("add_norm", residual.dtype), residual.device, _NORM, rows)
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
    launch = _launch(DecodeKernel("gate", both.dtype), both.device, _GATE, -(-vectors // _THREADS["gate"]))
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
    splits = max(1, min(2 * _multiprocessors(index) // jobs, capacity // 128))
    assert jobs * 4 <= COUNTER_BYTES or splits == 1, (jobs, splits)
    stream = _stream(joint)
    scratch = scratch_for(index, stream, jobs * splits * together * (head + 2) * 4 if splits > 1 else 0)
    out = joint.new_empty((batch, heads, head))
    launch = _launch(DecodeKernel("attend", joint.dtype, head, together), joint.device, _ATTEND, jobs * splits)
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


class _ThreadLaunches(threading.local):
    """Launches by what they depend on; their buffers must not be shared between threads."""

    def __init__(self) -> None:
        self.launches: dict[tuple[object, ...], driver.Launch] = {}


_thread = _ThreadLaunches()


def _launch(kernel: DecodeKernel, device: torch.device, layout: struct.Struct, blocks: int) -> driver.Launch:
    key = (kernel, device, blocks)
    launch = _thread.launches.get(key)
    if launch is None:
        launch = _thread.launches[key] = driver.Launch(driver.loaded(kernel, device), layout, blocks)
    return launch


@cache
def _multiprocessors(device_index: int) -> int:
    return torch.cuda.get_device_properties(device_index).multi_processor_count
