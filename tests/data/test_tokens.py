"""A token set keeps its tokens: through chunks, through a file, and under its fingerprint."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from marlin_tools.data.tokens import TokenSet, chunks_of
from marlin_tools.errors import DataError

ragged = st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=6), min_size=1, max_size=12)


def make(lists: list[list[int]], **words: object) -> TokenSet:
    described = {"source": "here", "packed": False, "documents": len(lists), **words}
    return TokenSet(tuple(torch.tensor(ids) for ids in lists), **described)  # type: ignore[arg-type]


def as_lists(tokens: TokenSet) -> list[list[int]]:
    return [sequence.tolist() for sequence in tokens.sequences]


@given(ragged, st.integers(1, 20))
def test_chunks_keep_order_and_content_and_stay_within_the_limit(lists: list[list[int]], max_tokens: int) -> None:
    chunks = chunks_of(make(lists).sequences, max_tokens)

    assert lists == [row.tolist() for chunk in chunks for row in chunk]
    assert all(chunk.numel() <= max_tokens or len(chunk) == 1 for chunk in chunks)


def test_chunks_are_as_large_as_allowed() -> None:
    chunks = chunks_of(make([[1, 2]] * 5 + [[1, 2, 3]] + [[4, 5]]).sequences, 4)

    assert [(2, 2), (2, 2), (1, 2), (1, 3), (1, 2)] == [tuple(chunk.shape) for chunk in chunks]


@given(ragged, st.data())
def test_the_fingerprint_changes_with_any_token(lists: list[list[int]], data: st.DataObject) -> None:
    row = data.draw(st.integers(0, len(lists) - 1))
    place = data.draw(st.integers(0, len(lists[row]) - 1))
    other = [list(ids) for ids in lists]
    other[row][place] += 1

    assert make(lists).fingerprint == make(lists, source="elsewhere", seed=9, notes=("said",)).fingerprint
    assert make(lists).fingerprint != make(other).fingerprint


@pytest.mark.parametrize("other", [[[1], [2, 3]], [[1, 2, 3]], [[2, 1], [3]], [[3], [1, 2]], [[1, 2]]])
def test_the_fingerprint_knows_cuts_and_order(other: list[list[int]]) -> None:
    assert make([[1, 2], [3]]).fingerprint != make(other).fingerprint


def test_the_fingerprint_is_of_the_values_not_of_the_memory() -> None:
    strided = TokenSet((torch.arange(10)[::2],), "here", packed=False, documents=1)

    assert make([[0, 2, 4, 6, 8]]).fingerprint == strided.fingerprint


def test_describe_counts_exactly() -> None:
    described = make([[1, 2, 3], [4]], seed=7, order="shuffled", notes=("a",)).describe()

    assert {"sequences": 2, "tokens": 4, "seqlen": 3, "packed": False, "documents": 2, "seed": 7, "notes": ["a"]}.items() <= (
        described.items()
    )
    assert described == json.loads(json.dumps(described))


@given(lists=ragged)
def test_a_saved_set_comes_back_whole(tmp_path_factory: pytest.TempPathFactory, lists: list[list[int]]) -> None:
    path = tmp_path_factory.mktemp("saved") / "tokens.safetensors"
    tokens = make(lists, seed=3, order="shuffled", notes=("one", "two"))

    tokens.save(path)
    again = TokenSet.load(path)

    assert lists == as_lists(again)
    assert tokens.describe() == again.describe()
    assert [path] == list(path.parent.iterdir())


def test_a_set_is_saved_under_a_name_as_well_as_under_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make([[1, 2]]).save("tokens.safetensors")

    assert [[1, 2]] == as_lists(TokenSet.load("tokens.safetensors"))


def test_a_file_whose_tokens_were_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokens.safetensors"
    make([[1, 2], [3]]).save(path)
    with safe_open(path, framework="pt") as file:
        metadata, lengths = file.metadata(), file.get_tensor("lengths")
    save_file({"tokens": torch.tensor([1, 2, 4]), "lengths": lengths}, path, metadata=metadata)

    with pytest.raises(DataError, match="do not match its fingerprint"):
        TokenSet.load(path)


@pytest.mark.parametrize("content", [None, b"no safetensors", "foreign"])
def test_a_file_that_is_no_token_set_is_refused(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "tokens.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file({"weight": torch.zeros(1)}, path)

    with pytest.raises(DataError, match="not a token file"):
        TokenSet.load(path)


@pytest.mark.parametrize(
    "sequences",
    [(), (torch.zeros(2, 2, dtype=torch.int64),), (torch.zeros(2),), (torch.zeros(0, dtype=torch.int64),)],
)
def test_only_filled_int64_vectors_are_sequences(sequences: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="sequence"):
        TokenSet(sequences, "here", packed=False, documents=1)


def test_packed_windows_have_one_length() -> None:
    with pytest.raises(ValueError, match="one length"):
        make([[1], [2, 3]], packed=True)
