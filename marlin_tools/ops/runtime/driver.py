"""Loading compiled kernels and launching them, with as little Python per launch as possible.

Loading goes through `cuda.bindings`. A launch is one call into the driver with a buffer that was laid out beforehand: the
kernel's only argument is a struct, `Launch.__call__` writes its fields with one `struct.pack_into` and calls. The buffers
belong to one thread (see `linear/plan.py`), since ctypes releases the interpreter lock during the call.
"""

import ctypes
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from marlin_tools.errors import DeviceError
from marlin_tools.ops.linear.variants import OVERLAP_CAPABILITY, capability_of, target_of
from marlin_tools.ops.runtime.compiler import Binary, Source
from marlin_tools.ops.runtime.cubin_cache import CubinCache

_ALIGNMENT = 64  # of a kernel's argument: what a tensor map needs
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id and a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


class Kernel(Protocol):
    """One kernel as it can be compiled and launched; hashable, so that it is loaded once."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def threads(self) -> int:
        """Threads per block."""

    @property
    def overlaps(self) -> bool:
        """Whether it may start before the kernel before it has ended: it waits by itself, or reads nothing of it."""

    def source(self, target: str) -> Source:
        """The instantiation to compile for a target."""

    def dynamic_shared_bytes(self, target: str) -> int:
        """What the launch must ask for."""


@dataclass(frozen=True)
class Function:
    """A kernel loaded on one device."""

    handle: int
    variant: Kernel
    target: str
    device: torch.device
    module: object  # keeps the code loaded


class Launch:
    """One kernel with a fixed grid and argument layout. Not thread-safe: its buffers are rewritten by every call."""

    def __init__(self, function: Function, layout: struct.Struct, blocks: int, cluster: int = 1, lead: int = 0) -> None:
        attributes = []
        if function.variant.overlaps and capability_of(function.target) >= OVERLAP_CAPABILITY:
            attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1)))
        if cluster > 1:
            attributes.append(_Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(cluster, 1, 1)))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self._config = _Config(
            grid=(blocks, 1, 1),
            block=(function.variant.threads, 1, 1),
            shared_bytes=function.variant.dynamic_shared_bytes(function.target),
            attributes=ctypes.cast(self._attributes, ctypes.POINTER(_Attribute)),
            attribute_count=len(attributes),
        )
        self._memory = ctypes.create_string_buffer(lead + layout.size + _ALIGNMENT)
        self.argument = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT
        """Where the argument lies: `lead` bytes that belong to somebody else, then the fields."""
        self._fields = self.argument - ctypes.addressof(self._memory) + lead
        self._arguments = (ctypes.c_void_p * 1)(self.argument)
        self._function = function
        self._pack = layout.pack_into
        self._launch = _launch_function()
        self._fixed = (ctypes.byref(self._config), ctypes.c_void_p(function.handle), self._arguments, None)

    def __call__(self, stream: int, *values: float) -> None:
        """Launch on `stream` with the fields of the kernel's argument."""
        self._pack(self._memory, self._fields, *values)
        self._config.stream = stream
        status = self._launch(*self._fixed)
        if status:
            raise DeviceError(f"the driver refused to launch `{self._function.variant.name}` (CUDA error {status})")


@cache
def _launch_function() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


_functions: dict[tuple[int, Kernel, str], Function] = {}


def loaded(variant: Kernel, device: torch.device, target: str | None = None) -> Function:
    """The kernel on this device, compiled and loaded on first use, but never while a CUDA graph is being captured."""
    target = target_of(device) if target is None else target
    key = (device.index, variant, target)
    function = _functions.get(key)
    if function is None:
        if torch.cuda.is_current_stream_capturing():
            raise DeviceError(
                f"kernel `{variant.name}` is not loaded yet, and a CUDA graph is being captured",
                hint="run the model once before the capture, or call `marlin_tools.ops.prepare`",
            )
        binary = CubinCache().get(variant.source(target), target)
        with torch.cuda.device(device):
            handle, module = _load(binary, variant.dynamic_shared_bytes(target))
        function = _functions[key] = Function(handle, variant, target, device, module)
    return function


@cache
def resident_clusters(function: Function, size: int) -> int:
    """How many clusters of so many blocks the device holds at once: not every multiprocessor finds partners."""
    attribute = _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(size, 1, 1))
    config = _Config(
        grid=(size, 1, 1),
        block=(function.variant.threads, 1, 1),
        shared_bytes=function.variant.dynamic_shared_bytes(function.target),
        attributes=ctypes.pointer(attribute),
        attribute_count=1,
    )
    count = ctypes.c_int(0)
    query = ctypes.CDLL("libcuda.so.1").cuOccupancyMaxActiveClusters
    with torch.cuda.device(function.device):
        status = query(ctypes.byref(count), ctypes.c_void_p(function.handle), ctypes.byref(config))
    return 0 if status else count.value


def _load(binary: Binary, shared_bytes: int) -> tuple[int, object]:
    """Into the current context: torch's, which exists once torch has touched the device."""
    from cuda.bindings import driver

    torch.cuda.synchronize()
    module = _check(driver.cuModuleLoadData(binary.image), "load a kernel")
    function = _check(driver.cuModuleGetFunction(module, binary.symbol.encode()), "find a kernel")
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _check(driver.cuFuncSetAttribute(function, attribute, shared_bytes), "reserve shared memory")
    return int(function), module


def current_stream(device_index: int) -> int:
    """The address of the current stream, read as torch's generated code does: the public object costs as much as a launch."""
    stream: int = torch._C._cuda_getCurrentRawStream(device_index)  # noqa: SLF001
    return stream


def capture_id(stream: int) -> int:
    """A number that no other capture of this process has, for a stream that is being captured."""
    from cuda.bindings import driver

    return int(_checked(driver.cuStreamGetCaptureInfo(driver.CUstream(stream)), "inspect a capture")[1])


def _checked(result: tuple[Any, ...], action: str) -> tuple[Any, ...]:
    status, *values = result
    if int(status):
        raise DeviceError(
            f"the CUDA driver could not {action}: {status!r}", hint="is the driver as new as torch's CUDA version?"
        )
    return tuple(values)


def _check(result: tuple[Any, ...], action: str) -> Any:
    values = _checked(result, action)
    return values[0] if values else None
