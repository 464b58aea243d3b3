"""Two shapes of samples, and how a seed chooses among them.

packed      One stream of ids cut into windows of `seqlen`, in order, without overlap; the remainder is dropped. A running
            text is tokenised once (one BOS at its start); other documents are tokenised each and follow one another.
            Seed 0 takes the first windows in order. Any other seed draws from all windows.
documents   One document per sequence at its own length, as the Marlin paper does: walk a permutation of the documents,
            keep those with 1 < tokens <= seqlen. Every seed permutes, 0 too. No packing, padding or truncation.

Draws use NumPy's `RandomState`, whose stream is frozen, so a seed means the same samples for ever. The documents that a
corpus holds out for evaluation are the first kept ones of the permutation of seed 0; calibration, whatever its shape, seed
and length, starts behind them.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from marlin_tools.data.render import Encoder
from marlin_tools.data.rows import Document, no_text
from marlin_tools.data.sources import Corpus
from marlin_tools.data.tokens import TokenSet
from marlin_tools.errors import DataError, counted

LONGEST_DOCUMENT = 4096
"""The paper's limit; it alone decides which documents are held out, so that all models and settings agree."""

ALONE = (0, 1)
"""The place of a source: how many stand before it, and how many there are that give as many samples each."""

Item = TypeVar("Item")


def windows(stream: Iterable[Tensor], seqlen: int) -> Iterator[Tensor]:
    """Pieces of ids laid end to end and cut every `seqlen`; the remainder is dropped."""
    rest = torch.empty(0, dtype=torch.int64)
    for piece in stream:
        rest = torch.cat((rest, piece))
        full = len(rest) // seqlen * seqlen
        yield from rest[:full].view(-1, seqlen).clone().unbind()
        rest = rest[full:]


def permuted(items: Sequence[Item], seed: int) -> list[Item]:
    """All items in the order that the seed gives."""
    return [items[index] for index in np.random.RandomState(seed).permutation(len(items))]


def kept(documents: Iterable[Document], encode: Encoder, seqlen: int) -> Iterator[Tensor]:
    """The documents that fit whole into `seqlen` tokens and have at least one token to predict."""
    return (ids for ids in map(encode, documents) if 1 < len(ids) <= seqlen)


def divide(corpus: Corpus, encode: Encoder) -> tuple[list[Tensor], list[Document]]:
    """(held out as ids, documents left for calibration), both in the order of the permutation of seed 0."""
    documents = iter(permuted(list(islice(corpus.documents, corpus.pool)), 0))
    held_out = list(islice(kept(documents, encode, LONGEST_DOCUMENT), corpus.held_out))
    if len(held_out) < corpus.held_out:
        message = f"`{corpus.name}`: {len(held_out)} documents of 2 to {LONGEST_DOCUMENT} tokens, {corpus.held_out} to hold out"
        raise DataError(message, hint="use another source, such as `--calib c4`")
    return held_out, list(documents)


def pack(
    corpus: Corpus,
    encode: Encoder,
    seqlen: int,
    num_samples: int | None,
    seed: int = 0,
    *,
    fewer: bool = False,
    place: tuple[int, int] = ALONE,
) -> TokenSet:
    """`num_samples` windows of a corpus, or all of them; if there are `fewer`, these."""
    if corpus.text is not None:
        source: Iterable[Document] = [corpus.text]
    elif corpus.held_out:
        source = divide(corpus, encode)[1]
    else:
        source = islice(corpus.documents, corpus.pool if seed else None)
    lengths: list[int] = []

    def stream() -> Iterator[Tensor]:
        for ids in map(encode, source):
            lengths.append(len(ids))
            yield ids

    found = list(windows(stream(), seqlen) if seed else islice(windows(stream(), seqlen), num_samples))
    wanted, notes = num_samples or 1, tuple[str, ...]()
    if len(found) < wanted:
        if not any(lengths):
            raise no_text(corpus.name)
        there = f"{counted(len(found), 'window')} of {seqlen} tokens"
        message = f"`{corpus.name}`: {there} in its {sum(lengths)} tokens, {wanted} asked for"
        if not (fewer and found):
            raise DataError(message, hint=_remedy(len(found), place, "a smaller `--seqlen`, or a longer text"))
        notes = (message,)
    drawn = seed != 0 or corpus.held_out > 0
    return TokenSet(
        sequences=tuple(permuted(found, seed)[:num_samples] if seed else found),
        source=corpus.name,
        packed=True,
        documents=len(lengths),
        seed=seed,
        order="shuffled" if drawn else "first",
        notes=(*_notes(corpus, encode, drawn=drawn), *notes),
    )


def choose(
    corpus: Corpus, encode: Encoder, seqlen: int, num_samples: int, seed: int = 0, *, place: tuple[int, int] = ALONE
) -> TokenSet:
    """`num_samples` documents of a corpus, each a sequence of its own."""
    _, left = divide(corpus, encode)
    numbered = enumerate(map(encode, permuted(left, seed) if seed else left), start=1)
    fitting = ((read, ids) for read, ids in numbered if 1 < len(ids) <= seqlen)
    chosen = dict(islice(fitting, num_samples))  # by how many documents had been read
    if not left and not corpus.held_out:
        raise no_text(corpus.name)
    if len(chosen) < num_samples:
        message = f"`{corpus.name}`: {len(chosen)} of {len(left)} documents have 2 to {seqlen} tokens, {num_samples} asked for"
        raise DataError(message, hint=_remedy(len(chosen), place, "a larger `--seqlen`, or `shape: packed`"))
    return TokenSet(
        sequences=tuple(chosen.values()),
        source=corpus.name,
        packed=False,
        documents=max(chosen),
        seed=seed,
        order="shuffled",
        notes=_notes(corpus, encode, drawn=True),
    )


def in_turn(parts: Sequence[TokenSet]) -> TokenSet:
    """The samples of several sources, one of each after the other, so that any stretch of them has some of all.

    Those of a source that has less are spread among the others: the last of all samples are often held out to judge by.
    """
    placed = [((at + 0.5) / len(part.sequences), own) for part in parts for at, own in enumerate(part.sequences)]
    return TokenSet(
        sequences=tuple(own for _, own in sorted(placed, key=lambda each: each[0])),
        source=", ".join(part.source for part in parts),
        packed=parts[0].packed,
        documents=sum(part.documents for part in parts),
        seed=parts[0].seed,
        order="shuffled" if any(part.order == "shuffled" for part in parts) else "first",
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _remedy(found: int, place: tuple[int, int], otherwise: str) -> str:
    """What to ask for: of several sources each gives its share, and the first ones what is left over."""
    before, sources = place
    return f"use `--num-samples {found * sources + before}`, {otherwise}" if found else f"use {otherwise}"


def _notes(corpus: Corpus, encode: Encoder, *, drawn: bool) -> tuple[str, ...]:
    notes = corpus.notes
    if drawn and corpus.pool is not None:
        notes += (f"drawn from the first {corpus.pool} documents of `{corpus.name}`",)
    return notes if encode.bos else (*notes, "no BOS: the tokenizer adds none")
