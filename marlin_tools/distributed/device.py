"""Which device computes, and what it really used."""

import os
import re
import resource
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Annotated

import torch

from marlin_tools.errors import DeviceError
from marlin_tools.settings import checked


def check_device(name: str) -> None:
    """Refuse what is no device on any machine."""
    if not isinstance(name, str):
        raise TypeError(f"a device is a name, such as `cpu`, not {type(name).__name__}")
    if not re.fullmatch(r"auto|(cpu|cuda)(:[0-9]{1,2})?", name):
        raise DeviceError(f"unknown device `{name}`", hint="use auto, cpu, cuda or cuda:N")


DeviceName = Annotated[str, checked(check_device)]
"""For settings: whether there is such a device, the run knows."""


def pick_device(name: str) -> torch.device:
    """`auto` is the first GPU if there is one; anything else must exist. Of several processes each has a GPU of its own."""
    check_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise DeviceError(f"device `{name}` does not exist: {count} CUDA devices are visible", hint="see `marlin-tools doctor`")
    return own_device(torch.device("cuda", device.index or 0))


def computing_on(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one of this thread, for what asks for that and not for a tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def own_device(device: torch.device) -> torch.device:
    """Where this process computes: of several that `torchrun` has started, each has a GPU of its own."""
    if device.type == "cpu" or processes() == 1:
        return device
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.cuda.device_count():
        raise DeviceError(
            f"process {local} has no GPU of its own: {torch.cuda.device_count()} are visible",
            hint="start `torchrun` with as many processes as there are GPUs",
        )
    return torch.device("cuda", local)


def processes() -> int:
    """How many processes `torchrun` has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this process is alone, or the first of those that `torchrun` has started: the one that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def describe_device(device: torch.device) -> str:
    """What to call it in a report."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)"


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("MemAvailable is in /proc/meminfo since Linux 3.14")


def forget_peaks(device: torch.device) -> None:
    """What follows is measured by itself, where Linux and torch allow that."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if device.type == "cuda" and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Highest memory in use since `forget_peaks`, or since the process began, in GB."""
    peak = {"host_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}
    if device.type == "cuda":
        peak["gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square product here and now; takes a fraction of a second."""
    size = 512 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        product = a @ a
        product[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
