"""Files and rows become documents, and each thing that can be wrong with them has its own words."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from marlin_tools.data.rows import documents, paragraphs, read_rows, read_text, texts
from marlin_tools.errors import DataError

Write = Callable[..., Path]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def test_text_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n\xc3\xa4")

    assert read_text(path) == "one\r\ntwo\n\nä"


def test_text_that_is_not_utf8_names_the_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xc3\xa4def\xff")

    with pytest.raises(DataError, match=r"a\.txt`: not UTF-8 text, see byte 8"):
        read_text(path)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_packed_file_is_to_be_unpacked(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.jsonl.packed"
    path.write_bytes(pack(b'{"text": "a"}\n' * 9))

    with pytest.raises(DataError, match="not UTF-8 text") as caught:
        read_text(path)
    assert "unpack it first" == caught.value.hint


@pytest.mark.parametrize("content", ["", " \n\t\n"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_refused(tmp_path: Path, content: str, name: str) -> None:
    path = tmp_path / name
    path.write_text(content)

    with pytest.raises(DataError, match="holds no text"):
        read_text(path) if name == "a.txt" else list(read_rows(path))


def test_a_file_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_text(tmp_path)


def test_blank_lines_part_documents() -> None:
    text = "\n\none\n  two\n\n   three\n \t\n\r\nfour\r\n\r\n\n"

    assert ["one\n  two", "   three", "four"] == paragraphs(text)


@pytest.mark.parametrize(
    ("row", "document"),
    [
        ({"text": "words", "messages": CHAT}, "words"),
        ({"messages": CHAT, "prompt": "p", "response": "r"}, CHAT),
        ({"prompt": "hi", "response": "ho"}, CHAT),
        ({"instruction": "hi", "output": "ho", "input": ""}, CHAT),
        ({"question": "hi", "answer": "ho"}, CHAT),
        (
            {"instruction": "add", "input": "1 2", "output": "3"},
            [{"role": "user", "content": "add\n\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
    ],
)
def test_columns_become_documents_in_jsonl_and_parquet_alike(
    tmp_path: Path, write_jsonl: Write, row: dict[str, Any], document: object
) -> None:
    parquet.write_table(pa.Table.from_pylist([row, row]), tmp_path / "rows.parquet")

    assert [document] * 2 == list(documents(read_rows(write_jsonl([row, row]))))
    assert [document] * 2 == list(documents(read_rows(tmp_path / "rows.parquet")))


def test_rows_without_words_are_passed_over_as_documents_but_not_as_text(write_jsonl: Write) -> None:
    path = write_jsonl([{"text": "a"}, {"text": " \n"}, {"text": ""}, {"text": "b"}])

    assert ["a", "b"] == list(documents(read_rows(path)))
    assert ["a", " \n", "", "b"] == texts(read_rows(path))


def test_separators_inside_a_json_string_do_not_end_a_line(write_jsonl: Write) -> None:
    assert ["a\u2028b\x85c"] == list(documents(read_rows(write_jsonl([{"text": "a\u2028b\x85c"}]))))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": \n')

    with pytest.raises(DataError, match=r"rows\.jsonl:3` cannot be read as JSON"):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "a list, not an object"),
        ({"body": "a", "id": 1}, "no text in the columns body, id"),
        ({}, r"no text in the columns \(none\)"),
        ({"prompt": "a"}, "no text in the columns prompt"),
        ({"text": None}, "`text` is NoneType, not a string"),
        ({"prompt": "a", "response": 3}, "`response` is int, not a string"),
        ({"messages": "a"}, "`messages` is not a list of turns"),
        ({"messages": []}, "`messages` is not a list of turns"),
        ({"messages": [{"content": "a"}]}, "`messages` is not a list of turns"),
        ({"messages": [{"role": "user"}]}, "no column `content`"),
    ],
)
def test_a_row_that_is_no_document_is_named(write_jsonl: Write, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2`: " + message) as failure:
        list(documents(read_rows(write_jsonl([{"text": "a"}, row]))))

    assert failure.value.hint


def test_text_needs_a_text_column(write_jsonl: Write) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1`: no column `text` among body"):
        texts(read_rows(write_jsonl([{"body": "a"}])))


def test_a_parquet_row_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    stored = pa.array([b"one", b"two", b"\xff three"], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 3, stored.buffers())
    parquet.write_table(pa.table({"text": strings}), tmp_path / "rows.parquet")

    with pytest.raises(DataError, match=r"rows.parquet, row 3`: not UTF-8 text, see byte 0"):
        list(read_rows(tmp_path / "rows.parquet"))


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"not parquet at all")

    with pytest.raises(DataError, match="no parquet file"):
        list(read_rows(path))


def test_a_line_that_a_tokenizer_would_take_minutes_for_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("short\n" + "x" * 20_000_000)
    with pytest.raises(DataError, match="a line of 20000000 characters"):
        read_text(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_text('{"text": "' + "x" * 2_000_000 + '"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:1`: a line of 2000000 characters"):
        list(documents(read_rows(tmp_path / "x.jsonl")))
    (tmp_path / "book.jsonl").write_text('{"text": "' + "a line\\n" * 300_000 + '"}\n')
    assert 1 == len(list(documents(read_rows(tmp_path / "book.jsonl"))))
