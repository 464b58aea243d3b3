"""Loading compiled kernels and launching them, with as little Python per launch as possible.

Loading goes through `cuda.bindings`. A launch is one call into the driver with a buffer that was laid out beforehand: the
kernel's only argument is a struct, `Launch.__call__` writes its fields with one `struct.pack_into` and calls. During the call
ctypes releases the interpreter lock, so a buffer belongs to one thread: `kept` is where each thread has its own.
"""

import ctypes
import threading
from collections.abc import Hashable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from marlin_tools.errors import DeviceError
from marlin_tools.ops.runtime.compiler import Binary
from marlin_tools.ops.runtime.cubin_cache import CubinCache
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.ops.runtime.target import OVERLAP_CAPABILITY, capability_of

_ALIGNMENT = 64  # of a kernel's argument: what a tensor map needs
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID

# A kilobyte or two each: prompts come in many lengths, each with a plan per shape of weight.
_MOST_KEPT = 4096


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


@dataclass(frozen=True, eq=False)
class Function:
    """A kernel loaded on one device."""

    handle: int
    kernel: Kernel
    device: torch.device
    module: object  # keeps the code loaded


class Launch:
    """One kernel with a fixed grid, and with less shared memory than it may have, if so asked. Not thread-safe: its buffers are
    rewritten by every call.
    """

    def __init__(self, function: Function, ctas: int, cluster: int = 1, shared_bytes: int | None = None) -> None:
        kernel, attributes = function.kernel, []
        if kernel.overlaps and capability_of(kernel.target) >= OVERLAP_CAPABILITY:
            attributes.append(_Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_int * 16)(1)))
        if cluster > 1:
            attributes.append(_Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(cluster, 1, 1)))
        self._attributes = (_Attribute * len(attributes))(*attributes)
        self._config = _Config(
            grid=(ctas, 1, 1),
            block=(kernel.threads, 1, 1),
            shared_bytes=kernel.shared_bytes if shared_bytes is None else shared_bytes,
            attributes=ctypes.cast(self._attributes, ctypes.POINTER(_Attribute)),
            attribute_count=len(attributes),
        )
        self._memory = ctypes.create_string_buffer(kernel.arguments.size + _ALIGNMENT)
        self.argument = -(-ctypes.addressof(self._memory) // _ALIGNMENT) * _ALIGNMENT
        """Where the argument lies: a tensor map, if it begins with one, then the fields."""
        self._fields = self.argument - ctypes.addressof(self._memory) + kernel.arguments.lead
        self._arguments = (ctypes.c_void_p * 1)(self.argument)
        self._function = function
        self._pack = kernel.arguments.layout.pack_into
        self._launch = _launch_function()
        self._fixed = (ctypes.byref(self._config), ctypes.c_void_p(function.handle), self._arguments, None)

    def __call__(self, stream: int, *values: float) -> None:
        """Launch on `stream` with the fields of the kernel's argument."""
        self._pack(self._memory, self._fields, *values)
        self._config.stream = stream
        status = self._launch(*self._fixed)
        if status:
            raise DeviceError(f"the driver refused to launch `{self._function.kernel.name}` (CUDA error {status})")


@cache
def _launch_function() -> Any:
    return ctypes.CDLL("libcuda.so.1").cuLaunchKernelEx


class _PerThread(threading.local):
    """What each thread launches with, by what it depends on."""

    def __init__(self) -> None:
        self.launches: dict[Hashable, Any] = {}


kept = _PerThread()
"""The only cache of launches. A `Launch` by kernel, device and grid; and whatever else is built around one."""


def keep(key: Hashable, item: object) -> None:
    """Add to this thread's launches; the oldest leaves when there are too many."""
    launches = kept.launches
    if len(launches) >= _MOST_KEPT:
        del launches[next(iter(launches))]
    launches[key] = item


def launch_of(kernel: Kernel, device: torch.device, ctas: int) -> Launch:
    """This thread's launch of a kernel with so many CTAs."""
    key = (kernel, device.index, ctas)
    launch: Launch | None = kept.launches.get(key)
    if launch is None:
        launch = Launch(loaded(kernel, device), ctas)
        keep(key, launch)
    return launch


def start(kernel: Kernel, ctas: int, on: torch.Tensor, *values: float) -> None:
    """Launch a kernel on the current stream of the tensor's device, whether that is the current device or not."""
    index = on.device.index
    launch = launch_of(kernel, on.device, ctas)
    with nullcontext() if torch.cuda.current_device() == index else torch.cuda.device(index):
        launch(current_stream(index), *values)


_functions: dict[tuple[int, Kernel], Function] = {}
_loading = threading.Lock()


def loaded(kernel: Kernel, device: torch.device) -> Function:
    """The kernel on this device, compiled and loaded on first use, but never while a CUDA graph is being captured."""
    key = (device.index, kernel)
    function = _functions.get(key)
    if function is not None:
        return function
    if torch.cuda.is_current_stream_capturing():
        raise DeviceError(
            f"kernel `{kernel.name}` is not loaded yet, and a CUDA graph is being captured",
            hint="run the model once before the capture, or call `marlin_tools.ops.prepare`",
        )
    with _loading:
        if key not in _functions:
            binary = CubinCache().get(kernel)
            with torch.cuda.device(device):
                handle, module = _load(binary, kernel.shared_bytes)
            _functions[key] = Function(handle, kernel, device, module)
        return _functions[key]


@cache
def resident_clusters(function: Function, size: int) -> int:
    """How many clusters of so many CTAs the device holds at once: not every SM finds partners."""
    attribute = _Attribute(_CLUSTER_DIMENSION, 0, (ctypes.c_int * 16)(size, 1, 1))
    config = _Config(
        grid=(size, 1, 1),
        block=(function.kernel.threads, 1, 1),
        shared_bytes=function.kernel.shared_bytes,
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


def allocate_cleared(size: int, device_index: int) -> int:
    """The address of so many zeros that are never given back, also while another stream, or this one, is being captured."""
    from cuda.bindings import driver

    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    with torch.cuda.device(device_index):
        mode = _check(driver.cuThreadExchangeStreamCaptureMode(relaxed), "allow an allocation")
        try:
            stream = _check(driver.cuStreamCreate(1), "make a stream")  # one that waits for no other
            address = _check(driver.cuMemAlloc(size), "allocate memory for partial sums")
            _check(driver.cuMemsetD8Async(address, 0, size, stream), "clear memory")
            _check(driver.cuStreamSynchronize(stream), "clear memory")
            _check(driver.cuStreamDestroy(stream), "give back a stream")
        finally:
            driver.cuThreadExchangeStreamCaptureMode(mode)
    return int(address)


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
