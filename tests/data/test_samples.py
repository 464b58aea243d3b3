"""Packing loses and doubles nothing; draws are the stated permutation; held-out documents stay out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from marlin_tools.data import samples
from marlin_tools.data.render import Encoder
from marlin_tools.data.samples import choose, divide, in_turn, pack, windows
from marlin_tools.data.sources import Corpus
from marlin_tools.data.tokens import Order, TokenSet
from marlin_tools.errors import DataError

pieces = st.lists(st.lists(st.integers(0, 99), max_size=9), max_size=9)


def text_corpus(text: str) -> Corpus:
    return Corpus("mine", [text], text=text)


def decoded(tokenizer: Any, tokens: samples.TokenSet) -> list[str]:
    return [tokenizer.decode(sequence.tolist()) for sequence in tokens.sequences]


def drawn(items: list[Any], seed: int) -> list[Any]:
    """The oracle: NumPy's own permutation of the list."""
    return [items[i] for i in np.random.RandomState(seed).permutation(len(items))]


@given(pieces, st.integers(1, 7))
def test_windows_are_the_stream_without_its_remainder(stream: list[list[int]], seqlen: int) -> None:
    found = [window.tolist() for window in windows((torch.tensor(p, dtype=torch.int64) for p in stream), seqlen)]
    whole = [token for piece in stream for token in piece]

    assert whole[: len(whole) - len(whole) % seqlen] == [token for window in found for token in window]
    assert all(seqlen == len(window) for window in found)


def test_a_running_text_is_one_stream_with_one_bos(tokenizer: Any) -> None:
    tokens = pack(text_corpus("abcdefghij"), Encoder(tokenizer), 4, 2)

    assert ["<s>abc", "defg"] == decoded(tokenizer, tokens)
    assert (True, 1, "first", 0, ()) == (tokens.packed, tokens.documents, tokens.order, tokens.seed, tokens.notes)


def test_documents_follow_one_another_each_with_its_bos(tokenizer: Any) -> None:
    tokens = pack(Corpus("mine", ["abc", "de", "fghi", "j"]), Encoder(tokenizer), 4, 2)

    assert ["<s>abc", "<s>de<s>"] == decoded(tokenizer, tokens)
    assert 3 == tokens.documents


def test_a_missing_bos_is_noted(make_tokenizer: Callable[..., Any]) -> None:
    tokenizer = make_tokenizer(bos=False)
    tokens = pack(text_corpus("abcdefgh"), Encoder(tokenizer), 4, 2)

    assert ["abcd", "efgh"] == decoded(tokenizer, tokens)
    assert ("no BOS: the tokenizer adds none",) == tokens.notes


def test_a_seed_draws_from_all_windows(tokenizer: Any) -> None:
    corpus, encode = text_corpus("abcdefghijklmnopqrstuvwxyz" * 3), Encoder(tokenizer)
    everything = decoded(tokenizer, pack(corpus, encode, 4, None))

    assert 19 == len(everything)
    for seed in (1, 2, 77):
        tokens = pack(corpus, encode, 4, 12, seed)
        assert drawn(everything, seed)[:12] == decoded(tokenizer, tokens)
        assert ("shuffled", seed) == (tokens.order, tokens.seed)


def test_fewer_samples_are_the_first_of_more(tokenizer: Any) -> None:
    corpus, encode = text_corpus("abcdefghijklmnopqrstuvwxyz"), Encoder(tokenizer)

    for seed in (0, 5):
        few, many = (decoded(tokenizer, pack(corpus, encode, 4, count, seed)) for count in (2, 5))
        assert many[:2] == few


def test_a_draw_from_a_stream_looks_at_its_first_documents_and_says_so(tokenizer: Any) -> None:
    corpus, encode = Corpus("mine", [f"{n:03}" for n in range(50)], pool=8), Encoder(tokenizer)
    tokens = pack(corpus, encode, 4, 8, seed=3)

    assert {f"<s>{n:03}" for n in range(8)} == set(decoded(tokenizer, tokens))
    assert (8, ("drawn from the first 8 documents of `mine`",)) == (tokens.documents, tokens.notes)
    in_order = pack(corpus, encode, 4, 20)
    assert (20, ()) == (in_order.documents, in_order.notes)


@pytest.mark.parametrize("shape", [pack, choose])
def test_no_text_is_not_a_short_one(tokenizer: Any, shape: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="`mine`: holds no text") as caught:
        shape(Corpus("mine", []), Encoder(tokenizer), 4, 3)

    assert "name a source with text in it" == caught.value.hint


@pytest.mark.parametrize("seed", [0, 1])
def test_too_few_windows_say_how_many_there_are(tokenizer: Any, seed: int) -> None:
    with pytest.raises(DataError, match="`mine`: 2 windows of 4 tokens in its 11 tokens, 3 asked for") as caught:
        pack(text_corpus("abcdefghij"), Encoder(tokenizer), 4, 3, seed)

    assert "use `--num-samples 2`, a smaller `--seqlen`, or a longer text" == caught.value.hint
    taken = pack(text_corpus("abcdefghij"), Encoder(tokenizer), 4, 3, seed, fewer=True)
    assert 2 == len(taken.sequences)
    assert "`mine`: 2 windows of 4 tokens in its 11 tokens, 3 asked for" in taken.notes


@pytest.mark.parametrize("num_samples", [1, None])
def test_a_text_below_one_window_says_what_to_change(tokenizer: Any, num_samples: int | None) -> None:
    with pytest.raises(DataError, match="`mine`: 0 windows of 8 tokens in its 3 tokens, 1 asked for") as caught:
        pack(text_corpus("ab"), Encoder(tokenizer), 8, num_samples)

    assert "use a smaller `--seqlen`, or a longer text" == caught.value.hint


WORDS = ["", "a", "bcd", "efghi", "jk", "lmnopqrst", "uvw", "xy"]
"""With a BOS: 1 to 10 tokens; the first has nothing to predict."""


@pytest.mark.parametrize("seed", [0, 1, 9])
def test_documents_are_kept_whole_along_the_permutation(tokenizer: Any, seed: int) -> None:
    tokens = choose(Corpus("mine", WORDS), Encoder(tokenizer), 6, 4, seed)
    order = drawn(WORDS, 0) if seed == 0 else drawn(drawn(WORDS, 0), seed)
    fitting = [f"<s>{word}" for word in order if 1 < len(word) + 1 <= 6]

    assert fitting[:4] == decoded(tokenizer, tokens)
    assert (False, "shuffled", seed) == (tokens.packed, tokens.order, tokens.seed)
    assert order.index(fitting[3].removeprefix("<s>")) + 1 == tokens.documents


def test_the_longest_document_is_one_that_just_fits(tokenizer: Any) -> None:
    assert ["<s>abc"] == decoded(tokenizer, choose(Corpus("mine", ["abc", "abcd"]), Encoder(tokenizer), 4, 1))


def test_too_few_documents_say_how_many_there_are(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="`mine`: 6 of 8 documents have 2 to 6 tokens, 7 asked for") as caught:
        choose(Corpus("mine", WORDS), Encoder(tokenizer), 6, 7)

    assert "use `--num-samples 6`, a larger `--seqlen`, or `shape: packed`" == caught.value.hint


def test_held_out_documents_never_calibrate(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "LONGEST_DOCUMENT", 6)
    names = [f"{n:02}" + "x" * (n % 5) for n in range(40)]
    corpus, encode = Corpus("mine", names, held_out=10), Encoder(tokenizer)
    order = drawn(names, 0)
    fitting = [name for name in order if len(name) + 1 <= 6]

    held_out = [tokenizer.decode(ids.tolist()) for ids in divide(corpus, encode)[0]]
    assert [f"<s>{name}" for name in fitting[:10]] == held_out

    behind = order[order.index(fitting[9]) + 1 :]
    assert [f"<s>{name}" for name in behind if len(name) + 1 <= 6][:5] == decoded(tokenizer, choose(corpus, encode, 6, 5))
    left = [f"<s>{name}" for name in behind]
    for tokens in (
        choose(corpus, encode, 6, 5, 4),
        choose(corpus, encode, 4, 5),
        pack(corpus, encode, 7, 5),
        pack(corpus, encode, 7, 5, 2),
    ):
        assert all(piece in "".join(left) for piece in decoded(tokenizer, tokens))
        assert "shuffled" == tokens.order


def test_documents_of_a_stream_are_drawn_from_its_first(tokenizer: Any) -> None:
    tokens = choose(Corpus("mine", [f"{n:03}" for n in range(50)], pool=8), Encoder(tokenizer), 4, 8)

    assert {f"<s>{n:03}" for n in range(8)} == set(decoded(tokenizer, tokens))
    assert ("drawn from the first 8 documents of `mine`",) == tokens.notes


def test_too_few_documents_to_hold_out_are_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="`mine`: 7 documents of 2 to 4096 tokens, 8 to hold out"):
        divide(Corpus("mine", WORDS, held_out=8), Encoder(tokenizer))


@pytest.mark.parametrize(("orders", "expected"), [("ff", "first"), ("fs", "shuffled"), ("sf", "shuffled")])
def test_several_sources_together_say_what_each_says(orders: str, expected: Order) -> None:
    """A corpus that holds documents out is drawn from with seed 0 as well; a fact that two sources share is said once."""
    order: dict[str, Order] = {"f": "first", "s": "shuffled"}
    parts = [
        TokenSet((torch.tensor([n]),), f"source {n}", True, n, 7, order[letter], ("no BOS", f"note {n}"))
        for n, letter in enumerate(orders, start=1)
    ]
    both = in_turn(parts)

    assert (expected, 7, 3) == (both.order, both.seed, both.documents)
    assert ("no BOS", "note 1", "note 2") == both.notes
    assert "source 1, source 2" == both.source
