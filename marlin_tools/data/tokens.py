"""The token ids that a stage reads, with a fingerprint that says exactly which they are.

On disk a token set is one safetensors file: `tokens` int64 [total], `lengths` int64 [sequences] and, as metadata, the
words that describe it. No padding anywhere: a sequence is stored at its own length.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from marlin_tools.checkpoint.headers import read_header
from marlin_tools.checkpoint.strict_json import parse_object
from marlin_tools.errors import DataError, ErrorTranslation, ModelError
from marlin_tools.settings import Settings

Order = Literal["first", "shuffled"]


@dataclass(frozen=True, eq=False)
class TokenSet:
    """Token sequences and where they come from.

    sequences    int64 [L] each; packed windows share one length, documents have their own
    source       what it was made from, for people
    packed       True for windows cut from running text, False for one document per sequence
    documents    documents that were read to fill the sequences
    order        "first" as they come, "shuffled" drawn with `seed`
    notes        facts that belong in a manifest: a substitute, an unpinned revision, a missing BOS
    apart        the last so many sequences flow in chunks of their own; one process alone can have that
    fingerprint  sha256 over the lengths and the ids
    """

    sequences: tuple[Tensor, ...]
    source: str
    packed: bool
    documents: int
    seed: int = 0
    order: Order = "first"
    notes: tuple[str, ...] = ()
    apart: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if not self.sequences:
            raise ValueError(f"`{self.source}`: a token set needs at least one sequence")
        for sequence in self.sequences:
            if sequence.dtype != torch.int64 or sequence.dim() != 1 or not len(sequence):
                raise ValueError(f"a sequence is int64 [L], L > 0, not {sequence.dtype} {tuple(sequence.shape)}")
        if self.packed and len(set(self._lengths)) > 1:
            raise ValueError(f"packed windows have one length, not {sorted(set(self._lengths))}")
        digest = hashlib.sha256(torch.tensor([len(self.sequences), *self._lengths]).numpy().tobytes())
        for sequence in self.sequences:
            digest.update(sequence.contiguous().numpy().tobytes())
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    @property
    def _lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    @property
    def tokens(self) -> int:
        """How many tokens there are, exactly."""
        return sum(self._lengths)

    @property
    def longest(self) -> int:
        """Length of the longest sequence."""
        return max(self._lengths)

    def first(self, tokens: int, sequences: int = 1) -> Self:
        """The first sequences: as many as hold so many tokens, and so many at least, if there are."""
        count = total = 0
        for sequence in self.sequences:
            if total >= tokens and count >= sequences:
                break
            count, total = count + 1, total + len(sequence)
        return replace(self, sequences=self.sequences[:count], apart=0)

    def describe(self) -> dict[str, Any]:
        """What a manifest records."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "sequences": len(self.sequences),
            "tokens": self.tokens,
            "seqlen": self.longest,
            "packed": self.packed,
            "documents": self.documents,
            "seed": self.seed,
            "order": self.order,
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; it appears whole or not at all."""
        path = Path(path)
        derived = ("sequences", "tokens", "seqlen")
        words = {key: value for key, value in self.describe().items() if key not in derived}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        tensors = {"tokens": torch.cat(self.sequences), "lengths": torch.tensor(self._lengths)}
        save_file(tensors, partial, metadata={"token_set": json.dumps(words)})
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "TokenSet":
        """Read what `save` wrote, and check that it still is what it was."""
        path = Path(path)
        hint = "make it again with `TokenSet.save`"
        try:
            read_header(path)
        except ModelError as error:
            raise DataError(f"`{path}`: not a token file ({error.message})", hint=hint) from error
        with ErrorTranslation(DataError, f"`{path}`: not a token file", hint):
            with safe_open(path, framework="pt") as file:
                words = parse_object((file.metadata() or {})["token_set"].encode(), str(path), DataError, hint)
                ids, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
            expected = words.pop("fingerprint")
            tokens = cls(sequences=ids.split(lengths.tolist()), **{**words, "notes": tuple(words["notes"])})
        if tokens.fingerprint != expected:
            raise DataError(f"`{path}`: its tokens do not match its fingerprint", hint="make it again with `TokenSet.save`")
        return tokens


def check_arguments(settings: object, kind: type[Settings], tokens: object) -> None:
    """Refuse what a caller from Python has mixed up, before it fails as a missing attribute somewhere else."""
    if not isinstance(settings, kind):
        raise TypeError(f"settings are `{kind.__name__}(...)`, not {type(settings).__name__}")
    if not isinstance(tokens, TokenSet | None):
        raise TypeError(f"tokens are a TokenSet, as `calibrate` makes it, not {type(tokens).__name__}")


def chunks_of(sequences: Sequence[Tensor], max_tokens: int) -> list[Tensor]:
    """Neighbouring sequences of equal length as [B, L], B * L <= max_tokens (B = 1 if one sequence is longer)."""
    chunks = []
    for length, run in groupby(sequences, key=len):
        chunks += torch.stack(list(run)).split(max(1, max_tokens // length))
    return chunks
