"""A tokenizer whose ids can be told by eye: one token per byte, a BOS before each text."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def make(chat_template: str | None = None, bos: bool = True) -> PreTrainedTokenizerFast:
        vocab = {"<s>": 0} | {letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=1)}
        raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        raw.decoder = decoders.ByteLevel()
        if bos:
            raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", chat_template=chat_template)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return make_tokenizer()


@dataclass
class FakeCheckpoint:
    """As much of a checkpoint as calibration asks for."""

    model_tokenizer: PreTrainedTokenizerFast
    config: dict[str, Any] = field(default_factory=lambda: {"vocab_size": 257, "max_position_embeddings": 64})

    @property
    def text_config(self) -> dict[str, Any]:
        return self.config

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.model_tokenizer


@pytest.fixture
def checkpoint(tokenizer: PreTrainedTokenizerFast) -> FakeCheckpoint:
    return FakeCheckpoint(tokenizer)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


class FakeHub:
    """Stands in for `datasets.load_dataset`: answers from a table and remembers what it was asked."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
        self.failure: Exception | None = None
        self.fails_at = 0
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.rows_read = 0

    def load_dataset(self, *args: Any, **options: Any) -> Any:
        self.calls.append((args, options))
        if self.failure is not None and not self.fails_at:
            raise self.failure
        return self._stream(self.rows[args[0], options["split"]])

    def _stream(self, rows: list[dict[str, Any]]) -> Any:
        for number, row in enumerate(rows, start=1):
            if number == self.fails_at:
                assert self.failure is not None
                raise self.failure
            self.rows_read += 1
            yield row


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("datasets.load_dataset", fake.load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("marlin_tools.checkpoint.offline.hub_answers", lambda: True)
    return fake
