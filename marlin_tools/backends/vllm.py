"""A checkpoint as vLLM serves it, for evaluation: lm-eval's own vLLM model, and the log-probabilities that vLLM gives.

vLLM tells the probability of each word of a prompt and of the `LIKELIEST` words in its place, not of the whole vocabulary. The
loss and the likeliest word are therefore exact. The divergence of two models is that of coarser predictions, in which all words
that are not among the likeliest of both count as one: a lower bound, which misses little.

One engine takes most of a GPU, so the two models of a comparison are read one after the other.
"""

import gc
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import DeviceError
from marlin_tools.events import Emit, Event

LIKELIEST = 64
"""Words of each prediction that vLLM is asked for."""

_USUAL = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""What is set unless the user has: a forked engine could not use a GPU that this process has asked about, and standard output
is for results."""

_AT_ONCE = 64  # sequences whose predictions lie in memory as Python objects
_LEAST = 1e-12  # of a probability that is the rest of others


@dataclass(frozen=True)
class SequenceScore:
    """What a model made of one sequence: its mean loss, and for each predicted position the likeliest words."""

    loss: float
    likeliest: list[dict[int, float]]


class VllmEngine(AbstractContextManager["VllmEngine"]):
    """An engine for one checkpoint; `judge` is the model that lm-eval asks. Use it in a `with`, which ends the engine."""

    def __init__(self, checkpoint: Checkpoint, longest: int, seed: int, emit: Emit) -> None:
        if find_spec("vllm") is None:
            raise DeviceError("backend `vllm`: vLLM is not installed", hint="`pip install vllm` beside marlin-tools")
        if not torch.cuda.is_available():
            raise DeviceError("backend `vllm` needs a GPU", hint="use `--backend reference` on a CPU")
        for variable, value in _USUAL.items():
            os.environ.setdefault(variable, value)
        from lm_eval.models.vllm_causallms import VLLM

        positions = int(checkpoint.text_config.get("max_position_embeddings", longest))
        options: dict[str, Any] = {"max_logprobs": LIKELIEST}
        if longest >= positions:  # vLLM wants room for one word more, even if it writes none that we look at
            options |= {"max_model_len": longest + 1, "hf_overrides": {"max_position_embeddings": longest + 1}}
        try:
            self.judge = VLLM(pretrained=str(checkpoint.path), dtype="auto", seed=seed, **options)
        except (RuntimeError, ValueError, ImportError) as error:
            raise DeviceError(
                f"vLLM did not start with `{checkpoint.origin}`: {str(error).strip().partition(chr(10))[0]}",
                hint="what it printed says why, such as GPU memory that others hold; `--backend native` does without vLLM",
            ) from error
        self.how = {"backend": "vllm", "device": torch.cuda.get_device_name(), "vllm": version("vllm")}
        emit(Event("note", f"`{checkpoint.origin}` in vLLM {self.how['vllm']} on {self.how['device']}", data=self.how))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the engine, so that the next one finds the memory free."""
        engine = self.judge.model.llm_engine
        self.judge.model = None
        if (core := getattr(engine, "engine_core", None)) is not None:
            core.shutdown()
        del engine, core
        gc.collect()
        torch.cuda.empty_cache()

    def read(self, name: str, sequences: Sequence[Tensor], emit: Emit) -> list[SequenceScore]:
        """What the model makes of every sequence."""
        from vllm import SamplingParams

        how = SamplingParams(max_tokens=1, prompt_logprobs=LIKELIEST, detokenize=False, temperature=0.0)
        found: list[SequenceScore] = []
        for start in range(0, len(sequences), _AT_ONCE):
            ids = [sequence.tolist() for sequence in sequences[start : start + _AT_ONCE]]
            answers = self.judge.model.generate([{"prompt_token_ids": each} for each in ids], how, use_tqdm=False)
            found += [reading(each, answer.prompt_logprobs) for each, answer in zip(ids, answers, strict=True)]
            emit(Event("progress", name, len(found), len(sequences)))
        return found


def reading(ids: Sequence[int], given: Sequence[Mapping[int, Any] | None]) -> SequenceScore:
    """From vLLM's `prompt_logprobs`: for each position a table of words, nothing for the first, which nobody predicts."""
    rows = [{word: entry.logprob for word, entry in row.items()} for row in given[1:] if row is not None]
    assert len(rows) == len(ids) - 1, (len(rows), len(ids))
    losses = [-row[word] for row, word in zip(rows, ids[1:], strict=True)]
    return SequenceScore(math.fsum(losses) / len(losses), rows)


def divergence(model: SequenceScore, base: SequenceScore) -> tuple[float, float]:
    """Mean KL(base || model) of coarser predictions, and the share of positions whose likeliest word is the same."""
    pairs = list(zip(model.likeliest, base.likeliest, strict=True))
    same = sum(_top(ours) == _top(theirs) for ours, theirs in pairs)
    return math.fsum(_coarse_kl(ours, theirs) for ours, theirs in pairs) / len(pairs), same / len(pairs)


def _top(row: Mapping[int, float]) -> int:
    return max(row, key=row.__getitem__)


def _coarse_kl(model: Mapping[int, float], base: Mapping[int, float]) -> float:
    shared = model.keys() & base.keys()
    terms = [(math.exp(base[word]), base[word] - model[word]) for word in shared]
    rest = max(1 - math.fsum(p for p, _ in terms), _LEAST), max(1 - math.fsum(math.exp(model[word]) for word in shared), _LEAST)
    return math.fsum(p * ratio for p, ratio in terms) + rest[0] * math.log(rest[0] / rest[1])
