"""A directory that appears whole or not at all.

Everything is written into `<out>.partial/model`, each file under a temporary name, synced, then renamed; at the end that
folder is renamed to `<out>`. A run that dies leaves `<out>.partial` behind, which a later run may continue: what it has
finished is noted in `<out>.partial/state`. Nothing half-written loads as a model: config.json is written after all weights.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from marlin_tools.checkpoint.headers import DTYPES
from marlin_tools.checkpoint.ours import BESIDE, listed_in, not_ours
from marlin_tools.errors import MarlinToolsError, OutputError
from marlin_tools.resources import expanded, resolved

ELSEWHERE = "choose another `-o DIR`"

_TYPES = {dtype: name for name, dtype in DTYPES.items()}


def check_output(out: Path | str, sources: Iterable[Path | str] = (), *, overwrite: bool = False) -> Path:
    """Refuse a place for a result that cannot be written, or where something lies that no run of ours made.

    Decided before the work. Only a directory whose manifest says that we wrote it is ever replaced, never one that is or holds
    a source (a model, baseline, teacher or text of the run) or the working directory, and nothing in it that is not ours.
    Nothing is put into one.
    """
    path = expanded(out)
    if not path.name or path.name == ".." or "\0" in str(out):
        raise OutputError(f"`{out}` is no name for a result", hint="give it a directory of its own: `-o DIR`")
    try:
        check_apart(path, sources)
        _check_replaceable(path, overwrite=overwrite)
        _check_writable(path)
    except OSError as error:
        raise explained(error, path) from error
    return path


def check_space(out: Path, need: float) -> None:
    """Refuse a place where so many gigabytes do not fit."""
    parent = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free / 1e9
    if free < need:
        raise OutputError(
            f"`{out}` needs {gigabytes(need)}, {gigabytes(free)} are free", hint="free some disk or choose another `-o DIR`"
        )


def gigabytes(size: float) -> str:
    """A size as people say it."""
    return f"{size:.1f} GB" if size >= 1 else f"{size * 1000:.{int(size < 0.01)}f} MB"


def _check_replaceable(path: Path, *, overwrite: bool) -> None:
    if path.is_symlink():
        raise OutputError(f"`{path}` is a link, and results replace what they are named", hint=ELSEWHERE)
    if path.exists() and not path.is_dir():
        raise OutputError(f"`{path}` is a file, not a directory", hint=ELSEWHERE)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if stranger := not_ours(path):
        raise OutputError(f"`{path}` exists and is not empty, and {stranger}", hint=f"it is never replaced; {ELSEWHERE}")
    if not overwrite:
        raise OutputError(f"`{path}` exists and is not empty", hint="use `--overwrite`, or another `-o DIR`")


def _check_writable(path: Path) -> None:
    """Raise what making it, and what is worked on beside it, would raise."""
    partial = path.with_name(path.name + ".partial")
    if len(os.fsencode(partial.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    place = partial
    while not place.exists() and not place.is_symlink():
        place = place.parent
    for there in (place, path.parent, path):  # a directory that is not writable cannot be moved out of the way, either
        if (there.exists() or there.is_symlink()) and not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if there.exists() and not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def check_apart(path: Path, sources: Iterable[Path | str] = (), hint: str = ELSEWHERE) -> None:
    """Refuse what holds something that is read, and what would lie in a finished result, which could not be replaced then."""
    place, here = resolved(path), Path.cwd()
    if here.is_relative_to(place):
        raise OutputError(f"`{path}` is, or holds, the working directory", hint=hint)
    for source in (each for each in sources if "\0" not in str(each)):
        if resolved(source).is_relative_to(place):
            raise OutputError(f"`{path}` is, or holds, `{source}`, which the run reads", hint=hint)
    for around in place.parents:
        if listed_in(around) is not None:
            name = around.relative_to(here) if around != here and around.is_relative_to(here) else around
            raise OutputError(f"`{path}` would lie in the result `{name}`, which is replaced as a whole", hint=hint)


def clear_published(out: Path) -> None:
    """Remove what a run that was killed after it published `out` has left; a run that goes on is left alone."""
    for name in BESIDE:  # small files that are written into a result when it is there already
        for left in out.glob(f"{name}.*tmp"):
            with suppress(OSError):
                left.unlink()
    output = OutputDirectory(out)
    if output.partial.is_dir() and not output.work.exists():
        try:
            descriptor = os.open(output.partial, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not output.work.exists():
                    shutil.rmtree(output.partial)
            finally:
                os.close(descriptor)
        except OSError:  # busy, or not ours to remove: it is in nobody's way
            return


class OutputDirectory:
    """The result directory `out` while it is being made.

    work      where its files go until `publish`
    state     what must survive a crash but does not belong into the result
    replaced  what stood in the way, for the moment of publishing

    Work that always begins anew is not `lasting`: what it has finished is removed when it fails, and takes up no disk.
    """

    def __init__(
        self,
        out: Path | str,
        *,
        overwrite: bool = False,
        resume: bool = False,
        sources: Iterable[Path | str] = (),
    ) -> None:
        self.out = expanded(out)
        self.partial = self.out.parent / (self.out.name + ".partial")
        self.work, self.state, self.replaced = (self.partial / name for name in ("model", "state", "replaced"))
        self.overwrite = overwrite
        self.resume = resume
        self.lasting = True
        self.sources = tuple(sources)
        self._hashes: dict[Path, str] = {}

    def __enter__(self) -> Self:
        check_output(self.out, self.sources, overwrite=self.overwrite)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            raise explained(error, self.partial) from error
        try:
            self._take()
        except MarlinToolsError:
            os.close(self._descriptor)
            raise
        return self

    def _take(self) -> None:
        """Lock what is being made, and begin with what an earlier run may be continued from."""
        busy = OutputError(f"another run is writing `{self.out}`", hint="wait for it, or choose another `-o DIR`")
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise busy from error
        if not self.partial.exists() or self.partial.stat().st_ino != os.fstat(self._descriptor).st_ino:
            raise busy  # the other run published its result between our two calls
        there = {entry.name for entry in self.partial.iterdir()}
        if there and (self.state.name not in there or there - {folder.name for folder in self._folders}):
            raise OutputError(f"`{self.partial}` is in the way, and no unfinished run of ours", hint=ELSEWHERE)
        try:
            self.state.mkdir(exist_ok=True)  # by which it is known
            if self.replaced.is_dir() and self.work.exists() and not self.out.exists():
                self.replaced.rename(self.out)  # a run was killed between taking away what it replaces and publishing
                check_output(self.out, self.sources, overwrite=self.overwrite)
            if not self.resume:
                self.clear()
            for half_written in self.partial.rglob("*.tmp"):
                half_written.unlink()
        except OSError as error:
            raise explained(error, self.partial) from error

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        useless = not self.replaced.exists() and not (self.lasting and self.begun)
        if kind is not None and self.partial.exists() and useless:  # it failed, and nobody would go on from here
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._descriptor)  # releases the lock

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from: a file of the result, or a state beside the note whose it is."""
        files = [entry for entry in self.work.rglob("*") if entry.is_file()] if self.work.exists() else []
        return bool(files) or (self.state.exists() and any(entry.name != "run.json" for entry in self.state.iterdir()))

    @property
    def _folders(self) -> tuple[Path, ...]:
        return self.work, self.replaced, self.state

    def clear(self) -> None:
        """Forget what an earlier run left."""
        for folder in self._folders:
            if folder.exists():
                shutil.rmtree(folder)
        self.state.mkdir()
        self._hashes.clear()

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file. Its sha256 takes as long as the disk, and is found meanwhile."""
        parts, final = _safetensors(tensors, metadata or {}), self.work / name
        digest = hashlib.sha256()
        with ThreadPoolExecutor(max_workers=1) as beside:
            for part in parts:
                beside.submit(digest.update, part)
            self._write(final, parts)
        self._hashes[final] = digest.hexdigest()

    def sha256_of(self, file: Path) -> str:
        """Of the content of a file; of tensors that were written here it is known."""
        return self._hashes.get(file) or sha256_of(file)

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

    def publish(self) -> Path:
        """Make the finished directory visible under its final name."""
        check_output(self.out, self.sources, overwrite=self.overwrite)  # it may have been filled meanwhile
        try:
            os.fsync(self._descriptor)
            if self.out.exists():
                self.out.rename(self.replaced)
            self.work.rename(self.out)
            for folder in self._folders:
                if folder.exists():
                    shutil.rmtree(folder)
            self.partial.rmdir()
        except OSError as error:
            raise explained(error, self.out) from error
        return self.out


def put(path: Path, text: str, hint: str = ELSEWHERE) -> None:
    """Write one small file, whole or not at all, in a directory that is made if need be."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")  # others may write this file as well
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _clear_unfinished(path)
        temporary.unlink(missing_ok=True)  # of a process that had our number
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise explained(error, path, hint) from error


def _clear_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they wrote this file have left."""
    beginning = f"{path.name}."
    for left in path.parent.iterdir():
        if left.name.startswith(beginning) and left.name.endswith(".tmp"):
            writer = left.name.removeprefix(beginning).partition("-")[0]
            if writer.isdigit() and not Path("/proc", writer).exists():
                left.unlink(missing_ok=True)


def put_page(path: Path, text: str, mark: str) -> None:
    """Write a page where nothing is yet, or a page of this kind, which `mark` tells near its beginning."""
    hint = "choose another `-o FILE`"
    try:
        if path.is_symlink():
            raise OutputError(f"`{path}` is a link, and a page replaces what it is named", hint=hint)
        if path.is_dir():
            raise OutputError(f"`{path}` is a directory, and the page is a file", hint=hint)
        if path.exists() and mark.encode() not in path.read_bytes()[:1000]:
            raise OutputError(f"`{path}` exists and is no such page of ours", hint=f"it is never replaced; {hint}")
        check_apart(path, hint=hint)
    except OSError as error:
        raise explained(error, path, hint) from error
    put(path, text, hint)


def folder(path: Path, hint: str = ELSEWHERE) -> Path:
    """A directory for small files, made if need be, that can be written: before the work whose results go there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise explained(error, path, hint) from error
    return path


def sha256_of(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def explained(error: OSError, path: Path, hint: str = ELSEWHERE) -> MarlinToolsError:
    """An operating system error as something to act on; `hint` is what to do if it is the path that is wrong."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent if path.parent.exists() else Path()).free
        return OutputError(
            f"no space left for `{path}` ({free / 1e9:.1f} GB free)",
            hint="free some disk and run the same command again",
        )
    if error.errno == errno.EFBIG:
        return OutputError(f"`{path}` would be larger than a file may be here", hint="raise the limit: `ulimit -f unlimited`")
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
