"""A directory that appears whole or not at all.

Everything is written into `<out>.partial/model`, each file under a temporary name, synced, then renamed; at the end that
folder is renamed to `<out>`. A run that dies leaves `<out>.partial` behind, which a later run may continue: what it has
finished is noted in `<out>.partial/state`. Nothing half-written loads as a model: config.json is written after all weights.
"""

import errno
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from marlin_tools.errors import MarlinToolsError, OutputError

ELSEWHERE = "choose another `-o DIR`"

_TYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What safetensors calls them, in the order in which its own writer puts them into a file: every tensor is aligned."""


class OutputDirectory:
    """The result directory `out` while it is being made.

    work    where its files go until `publish`
    state   what must survive a crash but does not belong into the result
    """

    def __init__(self, out: Path | str, *, overwrite: bool = False, resume: bool = False) -> None:
        self.out = Path(out).expanduser()
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.work = self.partial / "model"
        self.state = self.partial / "state"
        self.overwrite = overwrite
        self.resume = resume

    def __enter__(self) -> Self:
        if self.out.exists() and not self.overwrite and not (self.out.is_dir() and not any(self.out.iterdir())):
            raise OutputError(f"`{self.out}` exists and is not empty", hint="use `--overwrite`, or another `-o DIR`")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.partial, os.O_RDONLY)
        except OSError as error:
            raise explained(error, self.partial) from error
        busy = OutputError(f"another run is writing `{self.out}`", hint="wait for it, or choose another `-o DIR`")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise busy from error
        if not self.partial.exists() or self.partial.stat().st_ino != os.fstat(self._descriptor).st_ino:
            os.close(self._descriptor)  # the other run published its result between our two calls
            raise busy
        if not self.resume:
            self.clear()
        for half_written in self.partial.rglob("*.tmp"):
            half_written.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)  # releases the lock

    def clear(self) -> None:
        """Forget what an earlier run left."""
        for folder in (self.state, self.work):
            if folder.exists():
                shutil.rmtree(folder)

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file."""
        self._write(self.work / name, _safetensors(tensors, metadata or {}))

    def write_text(self, name: str, text: str) -> None:
        """Write one UTF-8 file."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file of the result."""
        self._write(self.work / name, [content])

    def write_state(self, name: str, text: str) -> None:
        """Write one file of the state."""
        self._write(self.state / name, [text.encode("utf-8")])

    def write_state_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one safetensors file of the state."""
        self._write(self.state / name, _safetensors(tensors, {}))

    def _write(self, final: Path, parts: Sequence[bytes | memoryview]) -> None:
        """Temporary name, sync, rename."""
        temporary = final.with_name(final.name + ".tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                for part in parts:
                    stream.write(part)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(final)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise explained(error, final) from error

    def copy(self, source: Path) -> None:
        """Take a file over unchanged."""
        self.write_bytes(source.name, source.read_bytes())

    def publish(self) -> Path:
        """Make the finished directory visible under its final name."""
        try:
            os.fsync(self._descriptor)
            old = self.out.with_name(self.out.name + ".old")
            if self.out.exists():
                if old.exists():
                    shutil.rmtree(old)
                self.out.rename(old)
            self.work.rename(self.out)
            if old.exists():
                shutil.rmtree(old)
            shutil.rmtree(self.partial)
        except OSError as error:
            raise explained(error, self.out) from error
        return self.out


def put(path: Path, text: str) -> None:
    """Write one small file, whole or not at all, in a directory that is made if need be."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise explained(error, path) from error


def folder(path: Path, hint: str = ELSEWHERE) -> Path:
    """A directory for small files, made if need be, that can be written: before the work whose results go there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise explained(error, path, hint) from error
    return path


def explained(error: OSError, path: Path, hint: str = ELSEWHERE) -> MarlinToolsError:
    """An operating system error as something to act on; `hint` is what to do if it is the path that is wrong."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path()).free
        return OutputError(
            f"no space left for `{path}` ({free / 1e9:.1f} GB free)",
            hint="free some disk and run the same command again; finished blocks are kept",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return OutputError(f"`{path}` is not writable: {error.strerror}", hint=hint)
    return OutputError(f"cannot write `{path}`: {error.strerror}", hint=hint)


def _safetensors(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> list[bytes | memoryview]:
    """The content of a safetensors file: its header, then the memory of the tensors itself.

    The library would copy everything twice and hold the interpreter meanwhile, which the thread that feeds the GPU has to wait
    for. It also leaves the order of the metadata to chance.
    """
    order = sorted(tensors, key=lambda name: (list(_TYPES).index(tensors[name].dtype), name))
    on_host = [tensors[name].detach().cpu().contiguous() for name in order]
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    offset = 0
    for name, tensor in zip(order, on_host, strict=True):
        end = offset + tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *(tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in on_host)]
