"""Which tensors a model directory holds, from its index and the headers of its safetensors files, each held against the format.

A header is checked here and not by the library that reads tensors later: types, shapes, and that the data follow each other
without gap or overlap to the end of the file. Nothing outside of the directory is opened, whatever names and links say.
"""

import math
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from marlin_tools.checkpoint.contract import Index
from marlin_tools.checkpoint.strict_json import HINT, READABLE, conforms, parse_object, read_object
from marlin_tools.errors import ModelError

INDEX = "model.safetensors.index.json"

LONGEST_HEADER = 100_000_000
"""Bytes; the limit that the format's own library sets."""

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By what safetensors calls them, in the order in which its own writer puts them into a file: every tensor is aligned."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: so many bytes of a file, from `offset` on."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    offset: int = 0


def check_inside(directory: Path) -> None:
    """Refuse links that lead out of a model directory, and what is no ordinary file: a pipe would be read for ever.

    The hub's cache links to its own blobs, beside the snapshot.
    """
    home = directory.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for file in sorted((*directory.iterdir(), *directory.glob("verify/*"))):
        if file.name.startswith(".") or not is_read(file.name):
            continue
        try:
            target = file.resolve(strict=True)
            ordinary = stat.S_ISREG(target.stat().st_mode) or (target.is_dir() and not file.is_symlink())
        except (OSError, RuntimeError) as error:
            raise ModelError(f"`{file}` is a link to nothing", hint="replace the link by the file") from error
        if not any(target.is_relative_to(each) for each in homes):
            raise ModelError(f"`{file}` is a link out of its directory", hint="replace the link by the file that it names")
        if not ordinary:
            raise ModelError(f"`{file}` is not an ordinary file", hint="remove it")


def is_read(name: str) -> bool:
    """Whether we or a tokenizer may open a file of this name, or copy it into a result."""
    suffixes = {".json", ".safetensors", ".model", ".txt", ".jinja"}
    return Path(name).suffix in suffixes or name.startswith(("LICENSE", "NOTICE", "USE_POLICY"))


def read_headers(path: Path) -> dict[str, TensorInfo]:
    """Headers of all shards; the index decides which file holds a tensor when there is one."""
    index = path / INDEX
    places: dict[str, str] = {}
    if index.is_file():
        content = read_object(index)
        conforms(Index, content, str(index))
        places = content["weight_map"]
        files = {path / name for name in places.values()}
    else:
        whole = path / "model.safetensors"  # some models lie there a second time, in their makers' own layout
        files = {whole} if whole.is_file() else set(path.glob("*.safetensors")) - {path / "reference.safetensors"}
    if not files:
        pickled = any(any(path.glob(pattern)) for pattern in _PICKLES)
        hint = (
            "convert it to safetensors first: pickles can run code and are not read"
            if pickled
            else "is this a model directory?"
        )
        raise ModelError(f"`{path}` holds no *.safetensors", hint=hint)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(files):
        for name, stored in read_header(file).items():
            if name in tensors:
                raise ModelError(f"`{file}` repeats tensor `{name}`", hint="remove stale shards, or download the model again")
            tensors[name] = stored
    for name, place in places.items():
        if name not in tensors or tensors[name].file.name != place:
            raise ModelError(f"`{name}` is not in `{place}`, where `{index}` has it", hint=HINT)
    return tensors


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file."""
    length, size, content = _raw_header(file)
    if not content.startswith(b"{"):
        raise ModelError(f"`{file}` is not a safetensors file: its header is no JSON object", hint=HINT)
    header = parse_object(content, f"{file} (header)")
    marks = header.pop("__metadata__", {})
    if not isinstance(marks, dict) or not all(isinstance(value, str) for value in marks.values()):
        raise ModelError(f"`{file}`: `__metadata__` does not map words to words", hint=HINT)
    tensors = dict(_entries(file, header, 8 + length))
    end = 8 + length
    for name, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if stored.offset != end:
            raise ModelError(f"`{file}`: the data of `{name}` do not begin where those before it end", hint=HINT)
        end += stored.nbytes
    if end != size:
        kind = "is truncated" if end > size else "is too long"
        raise ModelError(f"`{file}` {kind}: its header promises {end} bytes, it has {size}", hint=HINT)
    return tensors


def _raw_header(file: Path) -> tuple[int, int, bytes]:
    """(length of the header, size of the file, header)."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for a writer
        with os.fdopen(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ModelError(f"`{file}` is not an ordinary file", hint=HINT)
            size = found.st_size
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > size:
                raise ModelError(f"`{file}` is truncated inside its header ({size} bytes)", hint=HINT)
            if length > LONGEST_HEADER:
                raise ModelError(f"`{file}` has a header of {length} bytes, at most {LONGEST_HEADER} are read", hint=HINT)
            return length, size, stream.read(length)
    except FileNotFoundError as error:
        raise ModelError(f"`{file}` is missing, though the index names it", hint=HINT) from error
    except PermissionError as error:
        raise ModelError(f"`{file}` cannot be read: {error.strerror}", hint=READABLE) from error
    except OSError as error:
        raise ModelError(f"`{file}` is not a safetensors file: {error.strerror}", hint=HINT) from error


def _entries(file: Path, header: dict[str, Any], begin: int) -> Iterator[tuple[str, TensorInfo]]:
    for name, entry in header.items():
        where = f"`{file}`: tensor `{name}`"
        if not 0 < len(name) <= 500 or not name.isprintable():
            raise ModelError(f"{where} has no usable name", hint=HINT)
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ModelError(f"{where} is not described by `dtype`, `shape` and `data_offsets`", hint=HINT)
        dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise ModelError(f"{where} has type {str(entry['dtype'])[:20]}", hint=f"readable: {', '.join(DTYPES)}")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not _are_sizes(shape) or len(shape) > 8:
            raise ModelError(f"{where}: `shape` is not a list of at most 8 sizes", hint=HINT)
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ModelError(f"{where}: `data_offsets` is not [begin, end]", hint=HINT)
        nbytes = math.prod(shape) * dtype.itemsize
        if offsets[1] - offsets[0] != nbytes:
            fact = f"{shape} of {entry['dtype']} is {nbytes} bytes, its offsets span {offsets[1] - offsets[0]}"
            raise ModelError(f"{where}: {fact}", hint=HINT)
        yield name, TensorInfo(file, tuple(shape), dtype, nbytes, begin + offsets[0])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)
