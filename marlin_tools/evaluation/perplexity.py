"""Token perplexity of a text and, beside an original model, how far the predictions have moved from its own.

Per sequence: the mean loss over its predicted tokens (all but the first). The result is exp(mean over the sequences), so that
windows and documents count alike whatever their length. Against a baseline also, over the same positions, KL(baseline || model)
per token and how often the likeliest token is the same. The logits are taken in the type in which the model computes; all that
follows is float32, a slice of positions at a time: 128 thousand words at 4096 positions are 2 GB in float32.
"""

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from marlin_tools.data.tokens import TokenSet, chunks_of
from marlin_tools.distributed.device import free_memory
from marlin_tools.errors import DeviceError
from marlin_tools.evaluation.scores import Score, exponential, mean_and_error
from marlin_tools.events import Emit, Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_TOKENS = 16384
"""Tokens per forward at most: more gain nothing."""

_SLICE_BYTES = 256 << 20
"""Float32 logits that are in memory at a time."""


@dataclass(frozen=True)
class Traces:
    """One value per sequence of each: mean loss of the model and of the baseline, mean KL, share of equal likeliest tokens."""

    loss: list[float]
    base_loss: list[float]
    kl: list[float]
    top1: list[float]


def trace(
    model: "PreTrainedModel", baseline: "PreTrainedModel | None", tokens: TokenSet, max_tokens: int, emit: Emit
) -> Traces:
    """Run every sequence through the model, and the baseline if there is one. Halves its batches when memory runs out."""
    waiting = deque(chunks_of(tokens.sequences, max_tokens))
    limit = max(len(batch) for batch in waiting)
    rows: list[Tensor] = []
    while waiting:
        batch = waiting.popleft()
        if len(batch) > limit:
            waiting.extendleft(reversed(batch.split(limit)))
            continue
        try:
            rows.append(_measure(model, baseline, batch))
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise DeviceError(
                    f"one sequence of {batch.shape[1]} tokens does not fit into the memory of {model.device}",
                    hint="use a smaller `--seqlen`, a GPU with more memory, or leave `--baseline` out",
                ) from error
            limit = len(batch) // 2
            waiting.appendleft(batch)
            emit(Event("warning", f"out of memory: {limit} sequences at a time from here on"))
            continue
        emit(Event("progress", tokens.source, sum(map(len, rows)), len(tokens.sequences)))
    columns = torch.cat(rows).T.tolist()
    return Traces(*columns) if baseline is not None else Traces(columns[0], [], [], [])


@torch.inference_mode()
def _measure(model: "PreTrainedModel", baseline: "PreTrainedModel | None", batch: Tensor) -> Tensor:
    """The traces of a batch [B, L] as [B, 4], or [B, 1] without a baseline."""
    ids = batch.to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    base_logits = baseline(input_ids=ids.to(baseline.device), use_cache=False).logits[:, :-1] if baseline is not None else None
    targets = ids[:, 1:]
    length = targets.shape[1]
    step = max(1, _SLICE_BYTES // (4 * logits.shape[0] * logits.shape[2]))
    total = torch.zeros(len(batch), 1 if base_logits is None else 4, dtype=torch.float64)
    for start in range(0, length, step):
        part = slice(start, start + step)
        log_p = F.log_softmax(logits[:, part].float(), dim=-1)
        columns = [_loss(log_p, targets[:, part])]
        if base_logits is not None:
            log_q = F.log_softmax(base_logits[:, part].to(log_p.device).float(), dim=-1)
            same = log_p.argmax(-1) == log_q.argmax(-1)
            columns += [_loss(log_q, targets[:, part]), (log_q.exp() * (log_q - log_p)).sum(-1), same]
        total += torch.stack([column.double().sum(1) for column in columns], dim=1).cpu()
    return total / length


def _loss(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    return -log_probabilities.gather(-1, targets[..., None]).squeeze(-1)


def tokens_per_batch(model: "PreTrainedModel", copies: int) -> int:
    """How many tokens may go through `copies` models at a time: their logits and activations fill half of what is free."""
    config = model.config.get_text_config()
    element = torch.finfo(model.dtype).bits // 8
    per_token = copies * element * (config.vocab_size + 16 * config.hidden_size)
    return max(1, min(MAX_TOKENS, (free_memory(model.device) // 2 - _SLICE_BYTES * 4 * copies) // per_token))


def score_text(name: str, traces: Traces, details: dict[str, object]) -> list[Score]:
    """The scores of a text. Standard errors are over sequences, those of differences over paired sequences."""
    loss, loss_error = mean_and_error(traces.loss)
    value = exponential(loss)
    perplexity = Score(name, "perplexity", value, _times(value, loss_error), higher_is_better=False, details=details)
    if not traces.base_loss:
        return [perplexity]
    base_loss, base_error = mean_and_error(traces.base_loss)
    base = exponential(base_loss)
    _, error = mean_and_error([value * a - base * b for a, b in zip(traces.loss, traces.base_loss, strict=True)])
    kl = Score(name, "kl", *mean_and_error(traces.kl), higher_is_better=False, details=details)
    top1 = Score(name, "top1", *mean_and_error(traces.top1), higher_is_better=True, details=details)
    return [perplexity.against(base, _times(base, base_error), error), kl, top1]


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error
