"""What lm-eval asks: its own class of models, around one that is ready."""

from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.huggingface import HFLM

from marlin_tools.events import Emit, Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Judge(HFLM):
    """lm-eval's own model class around a ready model; tells how far it is."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: int, emit: Emit) -> None:
        # Probabilities in float32: in 16 bit, the sums that decide between two answers often come out equal.
        # lm-eval takes models that hear for those that translate, and would hand them answers to compute a loss with.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch, softmax_dtype=torch.float32, backend="causal")
        self._tell = emit
        self._done = self._total = 0

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[Any]:
        self._total += len({(*context, *answer[:-1]) for _, context, answer in requests})  # it runs each such input once
        return list(super()._loglikelihood_tokens(requests, *args, **kwargs))

    def generate_until(self, requests: list[Any], *args: Any, **kwargs: Any) -> list[str]:
        """Answers in words, counted as they come."""
        self._total += len(requests)
        return list(super().generate_until(requests, *args, **kwargs))

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **kwargs)
        self._advance(len(inps))
        return logits

    def _model_generate(self, context: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        tokens = super()._model_generate(context, *args, **kwargs)
        self._advance(len(context))
        return tokens

    def _advance(self, count: int) -> None:
        self._done += count
        self._tell(Event("progress", "answers", self._done, self._total))
