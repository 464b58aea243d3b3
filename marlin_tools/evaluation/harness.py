"""Benchmark tasks through lm-eval: its own tasks, the bundled demo tasks and those of the user's folders, with its own code.

Nothing of the harness is copied. A ready model is handed over, and what lm-eval prints, logs or draws is kept off
the terminal: warnings that matter come back as events, its progress as ours. Added to its numbers are the errors of differences
between two models, from the answers to the same items, and standard errors of per-word and per-byte perplexities, which it
leaves out.
"""

import logging
import math
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import TextIOBase
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from lm_eval import evaluate
from lm_eval.api.model import LM

from marlin_tools.checkpoint.offline import give_up_early
from marlin_tools.data.render import leave_open
from marlin_tools.errors import DataError, DeviceError, counted, first_line
from marlin_tools.evaluation.scores import Score, exponential, mean_and_error
from marlin_tools.evaluation.task_index import Tasks
from marlin_tools.events import Emit, Event

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAP = 1000
"""Resamples for the few metrics whose error has no formula."""

_FOREIGN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, NotImplementedError, OSError),
    *(RecursionError, SyntaxError, TypeError, ValueError, re.error, HfHubHTTPError, TemplateError),
)
"""What lm-eval, and code and templates of tasks in it, end with where a task is at fault."""

_HARMLESS = (
    "`pretrained` model kwarg is not of type",
    "Passed an already-initialized model",
    "Custom kwargs can be passed",
    "Overwriting default num_fewshot",
    "aggregation is not. using default",
    "higher_is_better is not. using default",
    "overrides existing task",
)


class _Nowhere(TextIOBase):
    """Takes what a library prints."""

    def write(self, text: str) -> int:
        return len(text)


class _Warnings(logging.Handler):
    """Collects lm-eval's warnings, one per place in its source, however often it repeats them."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.first: dict[tuple[str, int], str] = {}
        self.count: Counter[tuple[str, int]] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        if not any(phrase in text for phrase in _HARMLESS):
            place = record.pathname, record.lineno
            self.first.setdefault(place, text)
            self.count[place] += 1

    def tell(self, emit: Emit) -> None:
        """Pass them on."""
        for place, text in self.first.items():
            times = f" ({self.count[place]} times)" if self.count[place] > 1 else ""
            emit(Event("warning", f"lm-eval: {text[:300]}{times}"))


@contextmanager
def _subdued(emit: Emit) -> Iterator[Emit]:
    """Keep lm-eval off both streams; the `emit` that it yields still reaches the terminal."""
    terminal, warned, logger = sys.stderr, _Warnings(), logging.getLogger("lm_eval")
    propagated = logger.propagate

    def aloud(event: Event) -> None:
        with redirect_stderr(terminal):
            emit(event)

    import datasets

    bars = datasets.is_progress_bar_enabled()
    logger.addHandler(warned)
    logger.propagate = False
    datasets.disable_progress_bars()
    try:
        with redirect_stdout(_Nowhere()), redirect_stderr(_Nowhere()), _no_way_out():
            yield aloud
    except SystemExit as error:  # code of a task may end itself, not the evaluation
        raise DataError(
            f"a task ended the program with {error.code!r}", hint="look at the code of the tasks asked for"
        ) from error
    finally:
        logger.removeHandler(warned)
        logger.propagate = propagated
        if bars:
            datasets.enable_progress_bars()
        warned.tell(emit)


@contextmanager
def _no_way_out() -> Iterator[None]:
    """Let `os._exit` end a task as `sys.exit` does, and not this process with exit code 0 and no result."""
    own, leave = os.getpid(), os._exit

    def stay(code: int) -> NoReturn:
        if os.getpid() != own:
            leave(code)  # a child process that ends as it should
        raise SystemExit(code)

    os._exit = stay  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave


@dataclass(frozen=True)
class Answers:
    """What lm-eval returned for one model, and the per-item values by (task, metric key)."""

    results: Mapping[str, Any]
    items: Mapping[tuple[str, str], list[Any]]


class Harness:
    """Tasks, found and loaded before any model is; `ask` puts them to one model."""

    def __init__(self, found: Tasks, shots: int | None, seed: int, emit: Emit) -> None:
        self.names = found.names
        self._seed = seed
        with _subdued(emit):
            self._draw_from_seed()
            self._loaded = _load(found)
        for name, task in self._loaded["tasks"].items():
            own = task.get_config("num_fewshot")
            if own == 0 and shots:
                emit(Event("warning", f"`{name}` is defined without examples: {shots} shots do not apply to it"))
            elif shots and (most := _most_shots(task)) is not None and shots > most:
                raise DataError(
                    f"`--num-fewshot {shots}`: `{name}` has {most} examples to show", hint=f"use `--num-fewshot {most}` or less"
                )
            task.set_config("num_fewshot", (own or 0) if own == 0 or shots is None else shots)
            task.set_fewshot_seed(seed)

    def ask(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch: int, limit: float | None, emit: Emit
    ) -> Answers:
        """Every item of every task; halves the batch when memory runs out (the longest items come first, so that is early)."""
        from marlin_tools.evaluation.judge import Judge  # now: it takes seconds, and a task that is not there does not need it

        while True:
            try:
                return self.answers(partial(Judge, model, tokenizer, batch), limit, emit)
            except torch.OutOfMemoryError as error:
                if batch == 1:
                    raise DeviceError(
                        f"one item of {', '.join(self.names)} does not fit into the memory of {model.device}",
                        hint="use fewer shots (`--num-fewshot`), or a GPU with more memory",
                    ) from error
                batch //= 2
                emit(Event("warning", f"out of memory: starting the tasks again with batch size {batch}"))

    def answers(self, judge: LM | Callable[[Emit], LM], limit: float | None, emit: Emit) -> Answers:
        """The same, put to a model that lm-eval knows, or that is made around what it may tell."""
        self._draw_from_seed()
        try:
            with _subdued(emit) as aloud:
                asked = judge if isinstance(judge, LM) else judge(aloud)
                leave_open(getattr(asked, "tokenizer", None))  # an EOS would end each question, and be the answer that counts
                results = evaluate(asked, self._loaded, limit=limit, bootstrap_iters=BOOTSTRAP)
            return Answers(results, _items(results["samples"]))
        except _FOREIGN as error:
            raise DataError(
                f"lm-eval cannot run {', '.join(self.names)}: {first_line(error)}", hint="check the task's YAML file"
            ) from error

    def weights(self, group: str, metric: str) -> bool:
        """Whether a group counts items (True) or its tasks (False) alike in this metric."""
        rules = self._loaded["groups"][group].aggregate_metric_list or ()
        return any(rule.metric == metric and rule.weight_by_size for rule in rules)

    def _draw_from_seed(self) -> None:
        """Some tasks draw from the global generators, when they are loaded and when they are asked."""
        random.seed(self._seed)
        np.random.seed(self._seed)  # noqa: NPY002 (the generator that tasks use)
        torch.manual_seed(self._seed)


def _load(found: Tasks) -> dict[str, Any]:
    """The tasks, groups and tags with their data."""
    give_up_early()
    try:
        return dict(found.manager.load(found.names))
    except _FOREIGN as error:
        raise DataError(
            f"{', '.join(f'`{name}`' for name in found.names)} cannot be loaded: {first_line(error)}",
            hint="check the network and HF_HUB_OFFLINE, or the task's YAML file and its data files",
        ) from error


def _most_shots(task: Any) -> int | None:
    """How many examples a task can show with a question, which is none of them; None if nobody can tell."""
    sampler = getattr(task, "sampler", None)
    examples = getattr(sampler, "df", getattr(sampler, "docs", None))  # as newer and older releases call them
    if examples is None:
        return None
    split = task.fewshot_cfg.split if hasattr(task, "fewshot_cfg") else task.config.fewshot_split
    return len(examples) - (split == task.config.test_split)


def _items(samples: Mapping[str, list[dict[str, Any]]]) -> dict[tuple[str, str], list[Any]]:
    """Per-item values in the order of the items."""
    items: dict[tuple[str, str], list[Any]] = {}
    for task, rows in samples.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            for metric in row["metrics"]:
                items.setdefault((task, f"{metric},{row['filter']}"), []).append(row[metric])
    return items


def read_scores(harness: Harness, answers: Answers, base: Answers | None, common: Mapping[str, Any]) -> list[Score]:
    """All scores of all tasks and groups, groups before their parts."""
    results = answers.results
    summed = {
        group: children
        for group, children in results["group_subtasks"].items()
        if any("," in key for key in results["results"][group])
    }
    parents = {child: group for group, children in summed.items() for child in children}
    scores = []
    for task, numbers in results["results"].items():
        details = {**_measured(results, task), **common}
        for key, value in numbers.items():
            metric, _, chosen = key.partition(",")
            if not chosen or metric.endswith("_stderr"):
                continue
            error = _errors(harness, answers, None, task, key)
            better = results["higher_is_better"].get(task, {}).get(metric)
            part_of = parents.get(task)
            score = Score(
                task, metric if chosen == "none" else key, float(value), error, better, part_of=part_of, details=details
            )
            if base is not None:
                other = float(base.results["results"][task][key])
                score = score.against(
                    other, _errors(harness, base, None, task, key), _errors(harness, answers, base, task, key)
                )
            scores.append(score)
    return sorted(scores, key=lambda score: score.task not in results["group_subtasks"])


def _measured(results: Mapping[str, Any], task: str) -> dict[str, Any]:
    """On what a task's numbers rest."""
    items, shots = results["results"][task].get("sample_len"), results["n-shot"].get(task)
    answered = any(results["higher_is_better"].get(task, {}).values())  # shots mean nothing to a perplexity
    return {
        "on": counted(items, "item") + (f", {shots}-shot" if answered else ""),
        "items": items,
        "num_fewshot": shots,
        "task_version": results["versions"].get(task),
    }


def _errors(harness: Harness, answers: Answers, base: Answers | None, task: str, key: str) -> float | None:
    """The standard error of a score or, beside `base`, of the difference of two, items paired; None if there is no formula."""
    metric, _, chosen = key.partition(",")
    reported = answers.results["results"][task].get(f"{metric}_stderr,{chosen}")
    if base is None and isinstance(reported, float):
        return reported
    parts = answers.results["group_subtasks"].get(task)
    if parts is None:
        return _leaf_error(answers, base, task, key)
    by_size = harness.weights(task, metric)
    leaves = list(_leaves(answers.results["group_subtasks"], parts))
    sizes = [len(answers.items.get((leaf, key), ())) for leaf in leaves]
    shares = [size / sum(sizes) if by_size else 1 / len(leaves) for size in sizes]
    errors = [_leaf_error(answers, base, leaf, key) for leaf in leaves]
    if any(error is None for error in errors):
        return None
    return math.hypot(*(share * error for share, error in zip(shares, errors, strict=True) if error is not None))


def _leaves(groups: Mapping[str, Sequence[str]], names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if name in groups:
            yield from _leaves(groups, groups[name])
        else:
            yield name


def _leaf_error(answers: Answers, base: Answers | None, task: str, key: str) -> float | None:
    ours = influences(key, answers.items.get((task, key), []))
    if base is None:
        return mean_and_error(ours)[1] if ours else None
    theirs = influences(key, base.items.get((task, key), []))
    if not ours or len(ours) != len(theirs):
        return None
    return mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])[1]


def influences(key: str, items: Sequence[Any]) -> list[float]:
    """What each item does to a score, such that the score's standard error is that of their mean; empty if that is not known.

    A plain number is averaged, so it is its own influence. Perplexities per word or byte are ratios of two sums of
    (log-likelihood, size); the influence is the first-order effect of one item on the ratio.
    """
    metric = key.partition(",")[0]
    if all(isinstance(item, int | float) for item in items):
        return [float(item) for item in items]
    if metric not in {"word_perplexity", "byte_perplexity", "bits_per_byte"}:
        return []
    mean_size = sum(size for _, size in items) / len(items)
    rate = -sum(likelihood for likelihood, _ in items) / sum(size for _, size in items)
    slope = 1 / math.log(2) if metric == "bits_per_byte" else exponential(rate)
    return [slope * (-likelihood - rate * size) / mean_size for likelihood, size in items]
