"""The files of a tokenizer, looked at before the library opens them: some contents make it fill memory, or never return."""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from marlin_tools.checkpoint.contract import Part
from marlin_tools.checkpoint.strict_json import HINT, conforms, read_object
from marlin_tools.errors import ModelError

_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

Id = Annotated[int, Field(ge=0, lt=2**31)]


NEEDED = "tokenizer.json or tokenizer.model must lie beside config.json"

_WORDS = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""What a tokenizer's words are read from, by one library or another."""


class _AddedToken(Part):
    id: Id
    content: str


class _Model(Part):
    vocab: dict[str, Id] | list[Any]


class TokenizerFile(Part):
    """What is taken for granted about tokenizer.json."""

    model: _Model
    added_tokens: list[_AddedToken] | None = None


def check_tokenizer_files(directory: Path) -> None:
    """Refuse files that are no bounded JSON, and vocabularies whose ids leave wide gaps, in which the library gets lost."""
    for name in _SETTINGS:
        if (directory / name).exists():
            read_object(directory / name)
    if not any(True for pattern in _WORDS for _ in directory.glob(pattern)):  # for some types a library makes up an empty one
        raise ModelError(f"`{directory}`: the tokenizer cannot be loaded: there is none", hint=NEEDED)
    file = directory / "tokenizer.json"
    if not file.exists():
        return
    content = read_object(file)
    conforms(TokenizerFile, content, str(file))
    added = content.get("added_tokens") or []
    vocab = content["model"]["vocab"]
    ids = [*(vocab.values() if isinstance(vocab, dict) else ()), *(each["id"] for each in added)]
    count = len(vocab) + len(added)
    if ids and max(ids) > 4 * count + 1000:
        raise ModelError(f"`{file}`: a token has id {max(ids)}, though there are only {count}", hint=HINT)


@contextmanager
def panics_unprinted() -> Iterator[None]:
    """Rust writes the lines of a panic to stderr before Python hears of it: nobody has use for them beside our error.

    They go past `sys.stderr`, so the descriptor itself is held; what else was written meanwhile is written afterwards.
    """
    if sys.stderr is None:  # a process without one
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            if type(sys.exc_info()[1]).__module__ != "pyo3_runtime":
                os.write(2, held.read())
