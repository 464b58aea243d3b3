"""Evaluation text is the published text, and none of it is calibrated on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlin_tools.data import samples
from marlin_tools.data.calibrate import calibrate
from marlin_tools.data.evaluation import _running_text, evaluation_documents
from marlin_tools.errors import DataError

Write = Callable[..., Path]


def decoded(tokenizer: Any, tokens: Any) -> list[str]:
    return [tokenizer.decode(sequence.tolist()) for sequence in tokens.sequences]


def test_wikitext_is_the_test_split_joined_with_two_newlines(hub: Any) -> None:
    hub.rows["Salesforce/wikitext", "test"] = [{"text": ""}, {"text": " = A = \n"}, {"text": "b"}]

    assert "\n\n = A = \n\n\nb" == _running_text("wikitext2")[0]
    assert {"test"} == {options["split"] for _, options in hub.calls}


def test_text_files_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_bytes(b" one\r\n\r\ntwo ")

    assert " one\r\n\r\ntwo " == _running_text(str(path))[0]


def test_table_files_are_their_text_joined_with_two_newlines(write_jsonl: Write) -> None:
    assert "one\n\n\n\ntwo" == _running_text(str(write_jsonl([{"text": "one"}, {"text": ""}, {"text": "two"}])))[0]


def test_a_stream_is_every_full_window_behind_one_bos(tokenizer: Any, write_jsonl: Write) -> None:
    path = write_jsonl([{"text": "abc"}, {"text": "de"}, {"text": "f"}])
    tokens = evaluation_documents(f"ppl:{path}", tokenizer, seqlen=4)

    assert ["<s>abc", "\n\nde"] == decoded(tokenizer, tokens)
    assert (str(path), True, "first") == (tokens.source, tokens.packed, tokens.order)


def test_an_exact_multiple_keeps_its_last_window(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("abcdefg")

    assert ["<s>abc", "defg"] == decoded(tokenizer, evaluation_documents(str(path), tokenizer, seqlen=4))


def test_redpajama_is_what_calibration_holds_out(
    hub: Any, tokenizer: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "LONGEST_DOCUMENT", 7)
    names = [f"{n:04}" + "x" * (n % 4) for n in range(2400)]
    hub.rows["DKYoon/SlimPajama-6B", "train"] = [{"text": name} for name in names]

    held_out = evaluation_documents("ppl:redpajama", tokenizer, seqlen=7)
    shorter = evaluation_documents("ppl:redpajama", tokenizer, seqlen=6)
    assert 1024 == len(held_out.sequences)
    assert [text for text in decoded(tokenizer, held_out) if len(text) - 2 <= 6] == decoded(tokenizer, shorter)
    assert any("of 1024 held-out documents are longer than 6 tokens" in note for note in shorter.notes)

    texts = set(decoded(tokenizer, held_out))
    for options in (
        {"num_samples": 256},
        {"num_samples": 256, "seed": 5},
        {"num_samples": 100, "seqlen": 6, "shape": "documents"},
    ):
        calibration = calibrate("redpajama", checkpoint, **options)
        assert not calibration.packed
        assert not texts & set(decoded(tokenizer, calibration))
    packed = "".join(decoded(tokenizer, calibrate("redpajama", checkpoint, num_samples=20, seqlen=16)))
    assert not texts & {f"<s>{document}" for document in packed.split("<s>")[1:-1]}


def test_held_out_documents_that_all_exceed_the_length_are_an_error(hub: Any, tokenizer: Any) -> None:
    hub.rows["DKYoon/SlimPajama-6B", "train"] = [{"text": f"{n:04}"} for n in range(1024)]

    with pytest.raises(DataError, match="none of its 1024 held-out documents fits into 3 tokens"):
        evaluation_documents("ppl:redpajama", tokenizer, seqlen=3)


def test_an_unknown_reference_is_refused() -> None:
    with pytest.raises(DataError, match="`ppl:wikitext3`: no such file or evaluation text"):
        _running_text("wikitext3")


@pytest.mark.parametrize("rows", [[{"text": ""}, {"text": " "}], []])
def test_rows_without_text_are_no_text(write_jsonl: Write, rows: list[Any]) -> None:
    from pyarrow import Table, parquet, schema, string

    file = write_jsonl(rows)
    parquet.write_table(Table.from_pylist(rows, schema([("text", string())])), file.with_suffix(".parquet"))
    for each in (file, file.with_suffix(".parquet")):
        with pytest.raises(DataError, match=f"`{each}`: holds no text"):
            evaluation_documents(f"ppl:{each}", None)  # type: ignore[arg-type]


def test_a_wrong_tokenizer_is_noticed(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "held.txt"
    path.write_text("abcdefg")

    with pytest.raises(DataError, match="outside the model's vocabulary of 9"):
        evaluation_documents(str(path), tokenizer, seqlen=4, vocab_size=9)
