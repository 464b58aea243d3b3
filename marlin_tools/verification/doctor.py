"""Stage `doctor`: what is installed here, what of it works, and what to do about the rest. Never fails, needs no network."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

from marlin_tools import ops
from marlin_tools.checkpoint.output import sha256_of
from marlin_tools.distributed.device import matmul_rate
from marlin_tools.errors import MarlinToolsError, first_line
from marlin_tools.resources import demo_dir
from marlin_tools.serving import vllm

Status = Literal["ok", "note", "problem"]

NEEDED = ("transformers", "safetensors", "datasets", "lm-eval", "sentencepiece", "pydantic")
OPTIONAL = {
    "compressed-tensors": "`pip install compressed-tensors` lets transformers itself load that format",
    "cuda-bindings": "the GPU kernels are compiled and started through it; it is installed with marlin-tools on Linux",
    "nvidia-cuda-nvrtc": "compiles the kernels; a CUDA build of torch brings it, else: `pip install '.[nvrtc]'` in a clone",
}
OLDEST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Fact:
    """One line of the diagnosis; `hint` says what to do where `status` is not "ok"."""

    name: str
    value: str
    status: Status = "ok"
    hint: str | None = None


def diagnose() -> list[Fact]:
    """Look at everything that has kept someone from running this."""
    sections: tuple[Callable[[], Iterator[Fact]], ...] = (_python, _packages, _serving, _gpus, _host, _hub, _demo)
    return [fact for section in sections for fact in section()]


def _python() -> Iterator[Fact]:
    yield Fact("python", platform.python_version())
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    hint = "there is an NVIDIA driver: install a CUDA build of torch to use the GPU"
    lacking = torch.version.cuda is None and _driver()
    yield Fact("torch", f"{torch.__version__}, {build}", *(("problem", hint) if lacking else ()))


def _packages() -> Iterator[Fact]:
    absent: dict[str, tuple[Status, str]] = {package: ("problem", f"`pip install {package}`") for package in NEEDED}
    absent |= {package: ("note", use) for package, use in OPTIONAL.items()}
    for package, what in absent.items():
        try:
            yield Fact(package, version(package))
        except PackageNotFoundError:
            yield Fact(package, "absent", *what)


def _serving() -> Iterator[Fact]:
    """Whether vLLM, if it is here, will find our kernels."""
    found, obstacle = vllm.seen()
    yield Fact("vllm", found) if obstacle is None else Fact("vllm", f"{found}, without our kernels", "note", obstacle)


def _driver() -> str | None:
    """The version of the NVIDIA driver that is loaded."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\S*(?:\s+for\s+\S+)?\s+(\S+)", text)
    return found[1] if found else "unknown version"


def _gpus() -> Iterator[Fact]:
    driver = _driver()
    hint = "without an NVIDIA GPU everything runs on the CPU"
    yield Fact("driver", driver) if driver else Fact("driver", "none", "note", hint)
    try:
        properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except RuntimeError as error:
        yield Fact("gpu", first_line(error), "problem", "torch and the driver do not fit together; update the driver")
        return
    if not properties and driver and torch.version.cuda:
        yield Fact("gpu", "none is visible", "problem", "see CUDA_VISIBLE_DEVICES; the driver may be too old for this torch")
    for index, gpu in enumerate(properties):
        value = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 1e9:.0f} GB"
        if (gpu.major, gpu.minor) < OLDEST_CAPABILITY:
            yield Fact(f"cuda:{index}", value, "problem", "the kernels need capability 8.0 (Ampere) or newer")
        else:
            yield Fact(f"cuda:{index}", value)
            yield _kernels(index)


def _kernels(index: int) -> Fact:
    """Every kernel against the reference, on this very GPU."""
    name, hint = f"kernels on cuda:{index}", "use `--backend reference`, and report this"
    try:
        results = ops.self_test(torch.device("cuda", index))
    except (MarlinToolsError, RuntimeError, ImportError, OSError) as error:
        return Fact(name, f"cannot be tried: {first_line(error)}", "problem", hint)
    failed = [f"{result.name}: {result.detail}" for result in results if not result.passed]
    if failed:
        return Fact(name, f"{len(failed)} of {len(results)} are wrong, first {failed[0]}", "problem", hint)
    return Fact(name, f"all {len(results)} agree with the reference")


def _host() -> Iterator[Fact]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    yield Fact("cpu", f"{cores} cores, {torch.get_num_threads()} threads, {rate / 1e9:.0f} GFLOP/s in float32")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _memory_limit()
    memory = min(total, limit or total)
    yield Fact("memory", f"{memory / 1e9:.1f} GB" + (" (limit of this container)" if memory < total else ""))
    yield _disk("disk here", Path.cwd())


def _memory_limit() -> int | None:
    """What a container may use, which is often far less than what the machine has."""
    for file in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            return int(file.read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
    return None


def _disk(name: str, path: Path) -> Fact:
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    hint = "an INT4 7B model takes 4 GB, its original 14 GB"
    return Fact(name, f"{free / 1e9:.1f} GB free at `{path}`", *(("note", hint) if free < 20e9 else ()))


def _hub() -> Iterator[Fact]:
    from huggingface_hub import constants

    yield _disk("hub cache", Path(constants.HF_HUB_CACHE))
    flags = [flag for flag in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(flag)]
    hint = "only cached models and data can be used; unset to download"
    yield Fact("offline", ", ".join(flags), "note", hint) if flags else Fact("offline", "no")


def _demo() -> Iterator[Fact]:
    """Every file of the embedded model against the list of sums that ships with it."""
    hint = "install marlin-tools again"
    folder = demo_dir()
    try:
        listed = dict(line.split()[::-1] for line in (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines())
        damaged = [name for name, value in listed.items() if sha256_of(folder / name) != value]
    except (OSError, ValueError) as error:
        yield Fact("demo model", f"unreadable: {error}", "problem", hint)
        return
    found = f"damaged: {', '.join(damaged)}"
    yield Fact("demo model", found, "problem", hint) if damaged else Fact("demo model", f"intact, {len(listed)} files")
