"""Document -> token ids: the chat template, then the tokenizer, then a check that the ids belong to the model.

One policy for calibration and evaluation. A BOS, or what a tokenizer has in its place, stands where the tokenizer puts one:
before each document that is tokenised alone, and once before a running text. A conversation that went through the chat
template already has its special tokens, so the tokenizer adds none. Nothing is padded or truncated, and an EOS that the
tokenizer puts behind a text is left out: a text goes on, in its next window or in what is generated after it.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from marlin_tools.data.rows import Document, Message
from marlin_tools.errors import DataError, ErrorTranslation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class Encoder:
    """Documents as one model reads them.

    chat_template  "auto": conversations use the tokenizer's template if it has one; "on": everything must; "off": never
    vocab_size     ids at or above it are an error; None checks nothing
    """

    tokenizer: "PreTrainedTokenizerBase"
    chat_template: ChatTemplate = "auto"
    vocab_size: int | None = None

    def __call__(self, document: Document) -> Tensor:
        """The ids of one document, int64 [L]."""
        text = self.render(document)
        special = not self._templated(document)
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        tokens = torch.tensor(ids[:-1] if special and self.eos else ids, dtype=torch.int64)
        if self.vocab_size is not None and len(tokens) and int(tokens.max()) >= self.vocab_size:
            message = f"token id {int(tokens.max())} is outside the model's vocabulary of {self.vocab_size}"
            raise DataError(message, hint="the tokenizer belongs to another model: check the model directory")
        return tokens

    def render(self, document: Document) -> str:
        """The text that is tokenised; a conversation without a template is its turns with blank lines between them."""
        if self._templated(document):
            return self._through_template(document)
        return document if isinstance(document, str) else "\n\n".join(turn["content"] for turn in document)

    @property
    def bos(self) -> bool:
        """Whether the tokenizer puts a BOS before a text, or what its model has instead: GLM's begin with two marks."""
        first = self.tokenizer("a", verbose=False)["input_ids"][:1]
        plain = self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"][:1]
        return bool(first == [self.tokenizer.bos_token_id] or first != plain)

    @cached_property
    def eos(self) -> bool:
        """Whether the tokenizer puts an EOS behind a text."""
        last = self.tokenizer("a", verbose=False)["input_ids"][-1:]
        return bool(last == [self.tokenizer.eos_token_id])

    def _templated(self, document: Document) -> bool:
        if self.chat_template == "on":
            return True
        return self.chat_template == "auto" and not isinstance(document, str) and self.tokenizer.chat_template is not None

    def _through_template(self, document: str | list[Message]) -> str:
        if isinstance(document, str):
            raise DataError("chat template: there are no conversations", hint="use `chat_template: auto`, or `messages` rows")
        if self.tokenizer.chat_template is None:
            raise DataError("chat template: the tokenizer has none", hint="use `chat_template: auto` or `off`")
        roles = ", ".join(turn["role"] for turn in document)
        refused = f"chat template: refuses a conversation with the roles {roles}"
        # A template is a program: besides what it means to refuse, it may divide by zero or add a number to a text.
        with ErrorTranslation(DataError, refused, "repair the row or the template, or use `chat_template: off`"):
            return str(self.tokenizer.apply_chat_template(document, tokenize=False))


def leave_open(tokenizer: "PreTrainedTokenizerBase | None") -> None:
    """Let a tokenizer that others will ask put no EOS behind a text from here on, where its rule for that is known."""
    raw = getattr(tokenizer, "backend_tokenizer", None)
    if tokenizer is None or raw is None or not Encoder(tokenizer).eos:
        return
    rule = json.loads(raw.to_str())["post_processor"] or {}
    for part in rule.get("processors", [rule]):
        _drop_end(part, tokenizer.eos_token_id)
    empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}
    raw.post_processor = type(raw).from_str(json.dumps(empty | {"post_processor": rule})).post_processor


def _drop_end(rule: dict[str, Any], eos: int) -> None:
    """Take the EOS out of a template such as `<s> $A </s>`."""
    single = rule.get("single", []) if rule.get("type") == "TemplateProcessing" else []
    while single and rule["special_tokens"].get(single[-1].get("SpecialToken", {}).get("id"), {}).get("ids") == [eos]:
        single.pop()
