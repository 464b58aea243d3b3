"""A directory that appears whole or not at all.

Everything is written into `<out>.partial/model`, each file under a temporary name, synced, then renamed; at the end that
folder is renamed to `<out>`. A run that dies leaves `<out>.partial` behind, which a later run may continue: what it has
finished is noted in `<out>.partial/state`. Nothing half-written loads as a model: config.json is written after all weights.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from marlin_tools.errors import MarlinToolsError, OutputError


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
            raise self._explain(error, self.partial) from error
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
        from safetensors.torch import save

        contiguous = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        self.write_bytes(name, save(contiguous, metadata={"format": "pt", **(metadata or {})}))

    def write_text(self, name: str, text: str) -> None:
        """Write one UTF-8 file."""
        self.write_bytes(name, text.encode("utf-8"))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write one file of the result."""
        self._write(self.work / name, content)

    def write_state(self, name: str, text: str) -> None:
        """Write one file of the state."""
        self._write(self.state / name, text.encode("utf-8"))

    def _write(self, final: Path, content: bytes) -> None:
        """Temporary name, sync, rename."""
        temporary = final.with_name(final.name + ".tmp")
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(final)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._explain(error, final) from error

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
            raise self._explain(error, self.out) from error
        return self.out

    def _explain(self, error: OSError, path: Path) -> MarlinToolsError:
        """An operating system error as something to act on."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent if path.parent.exists() else Path()).free
            return OutputError(
                f"no space left for `{path}` ({free / 1e9:.1f} GB free)",
                hint="free some disk and run the same command again; finished blocks are kept",
            )
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return OutputError(f"`{path}` is not writable: {error.strerror}", hint="choose another `-o DIR`")
        return OutputError(f"cannot write `{path}`: {error.strerror}", hint="choose another `-o DIR`")
