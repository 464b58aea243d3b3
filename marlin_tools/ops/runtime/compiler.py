"""CUDA source to machine code with NVRTC: no nvcc, no headers, no GPU.

NVRTC instantiates the C++ expression that names a kernel, tells its mangled symbol, and (through ptxas) what it costs:
registers, spills, shared memory. The result is machine code for exactly one GPU (`sm_90a`), or PTX, which the driver finishes
on any later GPU (`compute_80`).
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from marlin_tools.errors import DeviceError
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.resources import kernels_dir

OPTIONS = ("--std=c++17", "-default-device", "--ptxas-options=-v")
_INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
# C7508: setmaxnreg ignored. C7510 to C7519: wgmma serialised. Any makes a kernel much slower than it was meant to be.
_FATAL_ADVICE = re.compile(r"\(C7508\)|\(C751\d\)|wgmma.mma_async instructions are serialized")


@dataclass(frozen=True)
class Resources:
    """What ptxas reports. All zero for PTX, which is assembled later by the driver."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: `image` is what the driver loads, `symbol` the function in it."""

    image: bytes
    symbol: str
    resources: Resources


@cache
def nvrtc_version() -> tuple[int, int]:
    """(major, minor) of the compiler that came with torch or with the `nvrtc` extra."""
    nvrtc = _nvrtc()
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def texts_of(kernel: Kernel) -> dict[str, str]:
    """A kernel's file and everything that it includes, by the names used in `#include`."""
    found: dict[str, str] = {}
    waiting = [kernel.file]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found[name] = (kernels_dir() / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(found[name])
    return found


def key_of(kernel: Kernel) -> str:
    """Changes whenever the machine code could: content, options, target and compiler version."""
    digest = hashlib.sha256()
    parts = [kernel.file, kernel.expression, kernel.target, kernel.guards, *OPTIONS, *map(str, nvrtc_version())]
    for name, text in sorted(texts_of(kernel).items()):
        parts += [name, text]
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()


def compile_kernel(kernel: Kernel) -> Binary:
    """Compile one kernel for its target; raises if it spills or if ptxas gives one of the fatal advices."""
    nvrtc = _nvrtc()
    texts = texts_of(kernel)
    main = texts.pop(kernel.file) + kernel.guards
    names = sorted(texts)
    program = _check(
        nvrtc.nvrtcCreateProgram(
            main.encode(),
            Path(kernel.file).name.encode(),
            len(names),
            [texts[name].encode() for name in names],
            [name.encode() for name in names],
        )
    )
    try:
        expression = kernel.expression.encode()
        _check(nvrtc.nvrtcAddNameExpression(program, expression))
        options = [option.encode() for option in (f"--gpu-architecture={kernel.target}", *OPTIONS)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace").rstrip("\0")
        if int(status):
            raise DeviceError(
                f"`{kernel.expression}` does not compile for `{kernel.target}`: {_first_error(log)}",
                hint=f"is the target spelt as in `sm_90a`, and known to this NVRTC ({'.'.join(map(str, nvrtc_version()))})?",
            )
        symbol = _check(nvrtc.nvrtcGetLoweredName(program, expression)).decode()
        ptx = kernel.target.startswith("compute_")
        size, get = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if ptx else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        image = _read(size, get, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    resources = Resources(0, 0, 0, 0) if ptx else parse_resources(log)
    assert not resources.spill_bytes, (kernel.name, kernel.target, resources)
    assert not resources.stack_bytes, (kernel.name, kernel.target, resources)
    assert not _FATAL_ADVICE.search(log), (kernel.name, kernel.target, log)
    return Binary(image, symbol, resources)


def parse_resources(log: str) -> Resources:
    """The numbers out of ptxas's report for one kernel."""

    def number(pattern: str) -> int:
        found = re.search(pattern, log)
        return int(found[1]) if found else 0

    spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
    registers = number(r"Used (\d+) registers")
    assert registers, log
    return Resources(registers, number(r"(\d+) bytes stack frame"), spills, number(r"(\d+) bytes smem"))


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise DeviceError(
            f"the CUDA run-time compiler cannot be loaded: {error}",
            hint="a CUDA build of torch brings it; on a CPU machine `pip install '.[nvrtc]'` in a clone",
        ) from error
    return nvrtc


def _check(result: tuple[Any, ...]) -> Any:
    """cuda.bindings returns (status, value...)."""
    status, *values = result
    if int(status):
        raise DeviceError(f"the CUDA run-time compiler failed: {status!r}")
    return values[0] if values else None


def _read(size: Callable[..., Any], get: Callable[..., Any], program: Any) -> bytes:
    """NVRTC's two-step reading: ask for the size, then have a buffer filled."""
    length = _check(size(program))
    buffer = b" " * (length + 1)  # never of one byte: of these Python keeps one object for all, and NVRTC writes into it
    _check(get(program, buffer))
    return buffer[:length]


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line]
    return (lines or log.splitlines() or ["no message"])[0].strip()
