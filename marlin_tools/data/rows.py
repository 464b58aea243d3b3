"""Files and dataset rows -> documents.

A document is a text, or a conversation: a list of messages `{"role": ..., "content": ...}`. A row of a table becomes one
by its columns: `text`; else `messages`; else a prompt and a response column, which make a conversation of two turns.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from marlin_tools.checkpoint.strict_json import parse, read_bounded
from marlin_tools.errors import DataError, ErrorTranslation

if TYPE_CHECKING:
    from pyarrow import RecordBatch

Message = dict[str, str]
Document = str | list[Message]
Rows = Iterable[tuple[str, dict[str, Any]]]
"""Rows with the words that name each of them in an error: `file.jsonl:7`."""

PROMPTS = ("instruction", "prompt", "question")
RESPONSES = ("response", "output", "completion", "answer")
TABLES = (".jsonl", ".parquet")
PACKED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
"""How files of gzip, bzip2, xz, zstd and zip begin."""

LARGEST = 4 << 30
"""Bytes of a file; all of it is in memory."""

LONGEST_LINE = 1 << 20
"""Characters between two line ends: a hundred times the longest of C4."""


def read_text(path: Path) -> str:
    """The whole file as UTF-8 text, line ends untouched; a byte order mark is no part of it."""
    return _with_lines(str(path), _content(path))


def _with_lines(place: str, text: str) -> str:
    """The text, if no line of it is so long that a tokenizer would take minutes for it."""
    if len(text) > LONGEST_LINE and (longest := max(map(len, text.split("\n")))) > LONGEST_LINE:
        message = f"`{place}`: a line of {longest} characters, at most {LONGEST_LINE} are read"
        raise DataError(message, hint="break the text into lines")
    return text


def _content(path: Path) -> str:
    content = read_bounded(path, DataError, "name an ordinary file, or split it", limit=LARGEST)
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as failure:
        packed = content.startswith(PACKED)
        hint = "unpack it first" if packed else "convert it to UTF-8, or name a `.txt`, `.jsonl` or `.parquet` file"
        raise DataError(f"`{path}`: not UTF-8 text, see byte {failure.start}", hint=hint) from failure
    if not text.strip():
        raise no_text(str(path))
    return text


def no_text(name: str) -> DataError:
    """What to raise for a source in which there is nothing to read."""
    return DataError(f"`{name}`: holds no text", hint="name a source with text in it")


def paragraphs(text: str) -> list[str]:
    """The parts of a text between blank lines."""
    return [part.strip("\r\n") for part in re.split(r"\n\s*\n", text) if part.strip()]


def read_rows(path: Path) -> Rows:
    """The rows of a `.jsonl` or `.parquet` file, in order, each with its place."""
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Rows:
    # Only "\n" ends a line: str.splitlines would also cut at the separators that JSON allows inside strings.
    for number, line in enumerate(_content(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse(line, f"{path}:{number}", DataError, "a `.jsonl` file has one JSON object per line")
        if not isinstance(row, dict):
            raise DataError(f"`{path}:{number}`: a {type(row).__name__}, not an object", hint='write rows as {"text": "..."}')
        yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Rows:
    from pyarrow.parquet import ParquetFile

    with (
        ErrorTranslation(DataError, f"`{path}`: no parquet file", "write it again, or use `.jsonl`"),
        ParquetFile(path) as file,
    ):
        done = 0
        for batch in file.iter_batches():
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                raise _not_utf8(path, batch, done + 1) from None
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=done + 1))
            done += len(rows)


def _not_utf8(path: Path, batch: "RecordBatch", first: int) -> DataError:
    """What to raise for rows, counted from `first`, one of which is not text: pyarrow does not say which."""
    place, byte = str(path), 0
    for at in range(batch.num_rows):
        try:
            batch.slice(at, 1).to_pylist()
        except UnicodeDecodeError as failure:
            place, byte = f"{path}, row {first + at}", failure.start
            break
    return DataError(f"`{place}`: not UTF-8 text, see byte {byte}", hint="remove or repair the row")


def documents(rows: Rows) -> Iterator[Document]:
    """Each row as a document; rows without text are passed over."""
    for place, row in rows:
        document = _document(place, row)
        if not isinstance(document, str) or document.strip():
            yield document


def texts(rows: Rows) -> list[str]:
    """The `text` column, empty rows included."""
    return [_string(place, row, "text") for place, row in rows]


def _document(place: str, row: dict[str, Any]) -> Document:
    if "text" in row:
        return _string(place, row, "text")
    if "messages" in row:
        return _conversation(place, row["messages"])
    prompt = next((column for column in PROMPTS if column in row), None)
    response = next((column for column in RESPONSES if column in row), None)
    if prompt is None or response is None:
        wanted = f"`text`, `messages`, or a prompt ({', '.join(PROMPTS)}) with a response ({', '.join(RESPONSES)})"
        raise DataError(f"`{place}`: no text in the columns {', '.join(row) or '(none)'}", hint=f"rename them to {wanted}")
    question = _string(place, row, prompt)
    if row.get("input"):
        question += "\n\n" + _string(place, row, "input")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": _string(place, row, response)}]


def _conversation(place: str, messages: Any) -> list[Message]:
    turns = messages if isinstance(messages, list) else []
    if not turns or not all(isinstance(t, dict) and isinstance(t.get("role"), str) for t in turns):
        raise DataError(f"`{place}`: `messages` is not a list of turns", hint='a turn is {"role": "user", "content": "..."}')
    return [{"role": turn["role"], "content": _string(place, turn, "content")} for turn in turns]


def _string(place: str, row: dict[str, Any], column: str) -> str:
    if column not in row:
        hint = f"rename the column that holds the text to `{column}`"
        raise DataError(f"`{place}`: no column `{column}` among {', '.join(row) or '(none)'}", hint=hint)
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"`{place}`: `{column}` is {type(value).__name__}, not a string", hint="remove or repair the row")
    _with_lines(place, value)
    return value
