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
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.errors import DeviceError, first_line
from marlin_tools.events import Emit, Event
from marlin_tools.quantized import dtype_name

LIKELIEST = 64
"""Words of each prediction that vLLM is asked for."""

_USUAL = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""What is set unless the user has: a forked engine could not use a GPU that this process has asked about, and standard output
is for results."""

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What a start of vLLM ends with, in this process or for want of an engine in another; a timeout is an OSError."""

_AT_ONCE = 64  # sequences whose predictions lie in memory as Python objects
_LEAST = 1e-12  # of a probability that is the rest of others
_POSITIONS = 32768
"""The longest item that room is kept for: vLLM would keep it for all positions of the model, often more than a GPU has."""

_READING = {"max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.8}
"""vLLM forgets the probabilities of prompts, whole vocabularies in float32, when it plans its memory."""


@dataclass(frozen=True)
class SequenceScore:
    """What a model made of one sequence: its mean loss, and for each predicted position the likeliest words.

    words, logs    [T, at most LIKELIEST + 1], -1 where there are fewer, and their log-probabilities
    """

    loss: float
    words: Tensor
    logs: Tensor

    def likeliest(self) -> list[dict[int, float]]:
        """The same as tables."""
        rows = zip(self.words.tolist(), self.logs.tolist(), strict=True)
        return [{word: log for word, log in zip(words, logs, strict=True) if word >= 0} for words, logs in rows]


class VllmEngine(AbstractContextManager["VllmEngine"]):
    """An engine for one checkpoint; `judge` is the model that lm-eval asks. Use it in a `with`, which ends the engine.

    It reads texts up to `longest` tokens, and items of lm-eval, `batch` at a time, if there are `items`.
    """

    def __init__(self, checkpoint: Checkpoint, longest: int, *, items: bool, batch: str | int, seed: int, emit: Emit) -> None:
        check_here()
        for variable, value in _USUAL.items():
            os.environ.setdefault(variable, value)
        from lm_eval.models.vllm_causallms import VLLM

        self._origin = checkpoint.origin
        positions = int(checkpoint.text_config.get("max_position_embeddings") or _POSITIONS)
        options = _options(positions, longest, items=items)
        if items and positions > _POSITIONS:
            emit(Event("note", f"vLLM reads at most {options['max_model_len']} tokens of an item"))
        try:
            self.judge = VLLM(pretrained=str(checkpoint.path), dtype="auto", seed=seed, batch_size=batch, **options)
        except _FAILURES as error:
            raise DeviceError(
                f"vLLM did not start with `{self._origin}`: {first_line(error)}",
                hint="what it printed says why, such as GPU memory that others hold; `--backend native` does without vLLM",
            ) from error
        computed_in = dtype_name(self.judge.model.model_config.dtype)
        self.how = {
            "backend": "vllm",
            "device": torch.cuda.get_device_name(),
            "computed_in": computed_in,
            "vllm": version("vllm"),
        }
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
        if error is not None and type(error).__module__.partition(".")[0] == "vllm":
            raise DeviceError(
                f"vLLM ended while it read `{self._origin}`: {first_line(error)}", hint="what it printed says why"
            ) from error

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


def check_here() -> None:
    """Refuse a machine on which vLLM computes nothing."""
    if find_spec("vllm") is None:
        raise DeviceError("backend `vllm`: vLLM is not installed", hint="`pip install vllm` beside marlin-tools")
    if not torch.cuda.is_available():
        raise DeviceError("backend `vllm` needs a GPU", hint="use `--backend reference` on a CPU")


def identity() -> dict[str, str | None]:
    """What decides an evaluation through vLLM, besides the model and what is asked."""
    installed = version("vllm") if find_spec("vllm") is not None else None
    switches = ("MARLIN_TOOLS_VLLM", "VLLM_PLUGINS", "VLLM_DISABLED_KERNELS")
    return {"vllm": installed, **{name: os.environ.get(name) for name in switches}}


def _options(positions: int, longest: int, *, items: bool) -> dict[str, Any]:
    """What vLLM is asked for, of a model with so many positions and texts so long."""
    options: dict[str, Any] = {"max_logprobs": LIKELIEST, **_READING}
    options["max_model_len"] = most = max(longest + 1, min(positions, _POSITIONS) if items else 0)
    if most > positions:  # vLLM wants room for one word more, even if it writes none that we look at
        options["hf_overrides"] = partial(_with_positions, most)
    return options


def _with_positions(positions: int, config: Any) -> Any:
    """A transformers config with so many positions, wherever its language model's are told."""
    config.get_text_config().max_position_embeddings = positions
    return config


def reading(ids: Sequence[int], given: Sequence[Mapping[int, Any] | None]) -> SequenceScore:
    """From vLLM's `prompt_logprobs`: for each position a table of words, nothing for the first, which nobody predicts."""
    rows = [{word: entry.logprob for word, entry in row.items()} for row in given[1:] if row is not None]
    assert len(rows) == len(ids) - 1, (len(rows), len(ids))
    losses = [-row[word] for row, word in zip(rows, ids[1:], strict=True)]
    width = max(map(len, rows))
    words = torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], dtype=torch.int32)
    logs = torch.tensor([[*row.values(), *[-math.inf] * (width - len(row))] for row in rows], dtype=torch.float32)
    return SequenceScore(math.fsum(losses) / len(losses), words, logs)


def divergence(model: SequenceScore, base: SequenceScore) -> tuple[float, float]:
    """Mean KL(base || model) of coarser predictions, and the share of positions whose likeliest word is the same."""
    pairs = list(zip(model.likeliest(), base.likeliest(), strict=True))
    same = sum(_top(ours) == _top(theirs) for ours, theirs in pairs)
    return math.fsum(_coarse_kl(ours, theirs) for ours, theirs in pairs) / len(pairs), same / len(pairs)


def _top(row: Mapping[int, float]) -> int:
    return max(row, key=row.__getitem__)


def _coarse_kl(model: Mapping[int, float], base: Mapping[int, float]) -> float:
    shared = model.keys() & base.keys()
    terms = [(math.exp(base[word]), base[word] - model[word]) for word in shared]
    rest = max(1 - math.fsum(p for p, _ in terms), _LEAST), max(1 - math.fsum(math.exp(model[word]) for word in shared), _LEAST)
    return math.fsum(p * ratio for p, ratio in terms) + rest[0] * math.log(rest[0] / rest[1])
