"""Compiled kernels on disk, so that only the first run of a version on a machine compiles.

One file per kernel and target, named by the content key of everything that determines it. A file holds a line of JSON
(symbol, resources, checksum) and the image after it. It is written under another name, flushed to disk and renamed, so a
reader sees a whole file or none; a lock keeps parallel processes from compiling the same thing. Where the folder cannot be
written, compiled kernels stay in memory.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from marlin_tools.ops.runtime.compiler import Binary, Resources, compile_kernel, key_of
from marlin_tools.ops.runtime.kernel import Kernel
from marlin_tools.resources import cache_dir, expanded

_log = logging.getLogger(__name__)


def default_dir() -> Path:
    """`$MARLIN_TOOLS_CACHE`, or `marlin-tools/kernels` in the user's cache folder."""
    chosen = os.environ.get("MARLIN_TOOLS_CACHE")
    if chosen:
        return expanded(chosen)
    return cache_dir() / "kernels"


class CubinCache:
    """A folder of compiled kernels; `get` returns one and compiles it if nobody has.

    refused  what the system said when a kernel could not be kept in the folder, None as long as all of them could
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = default_dir() if folder is None else folder
        self.refused: OSError | None = None
        self._in_memory: dict[str, Binary] = {}

    def has(self, kernel: Kernel) -> bool:
        """True when `get` will not compile."""
        key = key_of(kernel)
        return key in self._in_memory or self._read(key) is not None

    def get(self, kernel: Kernel) -> Binary:
        """The compiled kernel."""
        key = key_of(kernel)
        binary = self._in_memory.get(key) or self._read(key)
        if binary is None:
            with self._locked(key) as writable:
                binary = (self._read(key) if writable else None) or compile_kernel(kernel)
                if writable:
                    self._publish(key, binary)
        self._in_memory[key] = binary
        return binary

    def obstacle(self) -> str | None:
        """Why nothing could be kept in the folder, or None."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                return None
        except OSError as error:
            return error.strerror

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.kernel"

    def _read(self, key: str) -> Binary | None:
        try:
            head, _, image = self._path(key).read_bytes().partition(b"\n")
        except OSError:
            return None
        try:
            return _parse(head, image)
        except (ValueError, KeyError, TypeError):
            _log.warning("`%s` is damaged and is compiled again", self._path(key))
            return None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """Holds the lock of one key; yields False where the folder is not ours to write."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / f"{key}.lock").open("w")
        except OSError as error:
            self._refuse(error)
            yield False
            return
        with lock:
            with contextlib.suppress(OSError):  # without locks, as some network file systems are, two may compile the same
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._clear_unfinished(key)
            yield True

    def _clear_unfinished(self, key: str) -> None:
        """Remove what processes that were killed while they wrote this kernel have left; whoever writes it holds its lock."""
        for left in self.folder.glob(f"{key}.*.new"):
            left.unlink()

    def _publish(self, key: str, binary: Binary) -> None:
        head = {
            "symbol": binary.symbol,
            "resources": asdict(binary.resources),
            "sha256": hashlib.sha256(binary.image).hexdigest(),
        }
        # Not a file of `tempfile`: nobody else could read that, and a cache may be filled by one user for others.
        name = self.folder / f"{key}.{os.getpid()}-{threading.get_ident()}.new"
        try:
            with name.open("wb") as file:
                file.write(json.dumps(head).encode() + b"\n" + binary.image)
                file.flush()
                os.fsync(file.fileno())
            name.replace(self._path(key))
        except OSError as error:
            with contextlib.suppress(OSError):  # half of a kernel helps nobody, on a full disk least of all
                name.unlink()
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        self.refused = error
        _log.info("`%s` cannot be written (%s): compiled kernels stay in memory", self.folder, error.strerror)


def _parse(head: bytes, image: bytes) -> Binary:
    entry = json.loads(head)
    if entry["sha256"] != hashlib.sha256(image).hexdigest():
        raise ValueError("checksum")
    return Binary(image, entry["symbol"], Resources(**entry["resources"]))
