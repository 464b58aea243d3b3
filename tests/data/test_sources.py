"""Every source asks the hub for exactly what it says, and no more; every failure names a way out."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from marlin_tools.data.sources import POOL, SOURCES, find_corpus
from marlin_tools.errors import DataError

PINNED = {
    "wikitext2": "b08601e04326c79dfdd32d625aee71d232d685c3",
    "c4": "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
    "redpajama": "b5f90f419b7489cdba26fdbc8c022fcb5562f968",
    "pile": "127bfedcd5047750df5ccf3a12979a47bfa0bafa",
    "ultrachat": "8049631c405ae6576f93f445c6b8166f76f5505a",
}
HUB_SOURCES = {
    "wikitext2": (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
    "c4": (("allenai/c4", None), {"split": "train", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    "redpajama": (("DKYoon/SlimPajama-6B", None), {"split": "train"}),
    "pile": (("NeelNanda/pile-10k", None), {"split": "train"}),
    "ultrachat": (("HuggingFaceH4/ultrachat_200k", None), {"split": "train_sft"}),
    "hf:acme/texts": (("acme/texts", None), {"split": "train"}),
    "hf:acme/texts:en": (("acme/texts", "en"), {"split": "train"}),
    "hf:acme/texts@test": (("acme/texts", None), {"split": "test"}),
    "hf:acme/te-x.ts:en@test": (("acme/te-x.ts", "en"), {"split": "test"}),
}


def test_every_source_but_the_bundled_one_is_a_hub_dataset() -> None:
    assert set(SOURCES) - {"demo"} == {name for name in HUB_SOURCES if not name.startswith("hf:")}


@pytest.mark.parametrize("name", HUB_SOURCES)
def test_hub_sources_ask_for_exactly_this(hub: Any, name: str) -> None:
    args, options = HUB_SOURCES[name]
    hub.rows[args[0], options["split"]] = [{"text": "one"}, {"text": ""}, {"text": "two"}]

    corpus = find_corpus(name)()

    assert ["one", "two"] == list(corpus.documents)
    pinned = {"revision": PINNED[name]} if name in PINNED else {}
    assert [(args, {**options, **pinned, "streaming": True})] == hub.calls
    assert bool(pinned) == (not any("none is pinned" in note for note in corpus.notes))
    assert all(revision in corpus.name for revision in pinned.values())


def test_a_streamed_corpus_fetches_only_what_is_read(hub: Any) -> None:
    hub.rows["allenai/c4", "train"] = [{"text": str(number)} for number in range(100)]
    corpus = find_corpus("c4")()

    assert not hub.calls
    assert "0" == next(iter(corpus.documents))
    assert 1 == hub.rows_read
    assert POOL == corpus.pool


def test_wikitext_is_one_running_text(hub: Any) -> None:
    hub.rows["Salesforce/wikitext", "train"] = [{"text": ""}, {"text": " = A = \n"}, {"text": " b \n"}]

    corpus = find_corpus("wikitext2")()

    assert "\n\n = A = \n\n\n b \n" == corpus.text
    assert [" = A = ", " b "] == list(corpus.documents)


def test_redpajama_names_its_substitute_and_follows_the_paper(hub: Any) -> None:
    corpus = find_corpus("redpajama")()

    assert ("documents", 1024) == (corpus.shape, corpus.held_out)
    assert any("SlimPajama-6B stands in for RedPajama-Data-1T-Sample" in note for note in corpus.notes)


def test_conversations_come_whole(hub: Any) -> None:
    chat = [{"role": "user", "content": "hi"}]
    hub.rows["HuggingFaceH4/ultrachat_200k", "train_sft"] = [{"prompt": "hi", "messages": chat}]

    assert [chat] == list(find_corpus("ultrachat")().documents)


@pytest.mark.parametrize("failure", [ConnectionError("no route\nmore"), RuntimeError("no scripts"), ValueError("no split")])
@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_hub_failure_is_one_line_with_a_way_out(hub: Any, failure: Exception, fails_at: int) -> None:
    hub.rows["allenai/c4", "train"] = [{"text": "a"}, {"text": "b"}]
    hub.failure, hub.fails_at = failure, fails_at

    with pytest.raises(DataError, match=r"`allenai/c4@.*cannot be read from the hub") as caught:
        list(find_corpus("c4")().documents)

    assert str(failure).splitlines()[0] in caught.value.message
    assert "\n" not in caught.value.message
    assert "`--calib demo`" in str(caught.value.hint)


def test_a_lost_connection_is_a_hub_failure_too(hub: Any) -> None:
    import httpx

    hub.failure = httpx.ConnectTimeout("")

    with pytest.raises(DataError, match=r"\(ConnectTimeout\)"):
        list(find_corpus("c4")().documents)


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache as `hf download` leaves it, with the network switched off."""
    commit = "0" * 40
    repository = tmp_path / "datasets--acme--texts"
    data = repository / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    parquet.write_table(pa.table({"text": ["one", "two"]}), data / "train-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_the_hub_cache_is_enough(offline_cache: Path) -> None:
    assert ["one", "two"] == list(find_corpus("hf:acme/texts")().documents)


@pytest.mark.parametrize("source", ["c4", "wikitext2", "hf:acme/other", "hf:acme/texts:config", "hf:acme/texts@test"])
def test_offline_what_is_not_cached_is_refused(offline_cache: Path, source: str) -> None:
    with pytest.raises(DataError, match="cannot be read from the hub"):
        list(find_corpus(source)().documents)


@pytest.mark.parametrize("source", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b@", "hf:a/b:c:d", "hf:a/b@c@d"])
def test_a_malformed_hub_name_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="not a dataset of the hub"):
        find_corpus(source)


@pytest.mark.parametrize(
    ("source", "hint"),
    [("c44", "did you mean `c4`"), ("allenai/c4", "did you mean `hf:allenai/c4`"), ("/no/such.txt", "known sources: demo, ")],
)
def test_an_unknown_source_gets_suggestions(source: str, hint: str) -> None:
    with pytest.raises(DataError, match="no such file or source") as caught:
        find_corpus(source)

    assert hint in str(caught.value.hint)


@pytest.mark.parametrize("source", ("./no-such.txt", "../no-such.txt"))
def test_a_path_is_taken_for_no_dataset(source: str) -> None:
    with pytest.raises(DataError, match="no such file or source") as caught:
        find_corpus(source)

    assert "hf:." not in str(caught.value.hint)


def test_a_name_wins_over_a_file_and_a_path_over_a_name(hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pile").write_text("mine")

    assert "mine" == find_corpus("./pile")().text
    assert find_corpus("pile")().text is None


@pytest.mark.parametrize(("name", "notes"), [("a.txt", 0), ("A", 0), ("a.utf8", 1), ("a.json", 1)])
def test_any_other_extension_is_text_and_says_so(tmp_path: Path, name: str, notes: int) -> None:
    path = tmp_path / name
    path.write_text("one\n\ntwo\n")
    corpus = find_corpus(str(path))()

    assert "one\n\ntwo\n" == corpus.text
    assert ["one", "two"] == list(corpus.documents)
    assert notes == len(corpus.notes)
    assert corpus.pool is None


def test_tables_have_no_running_text(write_jsonl: Callable[..., Path]) -> None:
    corpus = find_corpus(str(write_jsonl([{"text": "one"}], "A.JSONL")))()

    assert corpus.text is None
    assert ["one"] == list(corpus.documents)


def test_the_bundled_text_is_there() -> None:
    corpus = find_corpus("demo")()
    documents: Iterable[Any] = list(corpus.documents)

    assert "demo" == corpus.name
    assert len(list(documents)) > 1
    assert "\ufffd" not in str(corpus.text)
