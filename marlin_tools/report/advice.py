"""What to do with a model next: commands with its real path, and with tasks that this model can be asked."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from marlin_tools.report.result import Result
from marlin_tools.verification.engines import commands

Step = tuple[str, str]
"""(what it does, the command)"""

_ROOM = 2048
"""Positions that a model needs for five examples and a question of the usual benchmarks."""


def next_steps(result: Result, directory: Path | str) -> list[Step]:
    """All of them, the most useful first."""
    place = shlex.quote(str(directory))
    return list(_quantized(result, place) if result.quantized else _sparse(result, place))


def serving(result: Result, directory: Path | str) -> Iterator[Step]:
    """One command for every engine that loads it; in another format if it is served by nobody."""
    loading = [engine["engine"] for engine in result.facts["engines"] if engine["loads"]]
    yield from commands(loading, str(directory))
    if other := result.facts["served_as"]:
        target = f"../{other}" if str(directory) == "." else f"{directory}-{other}"
        command = f"marlin-tools export {shlex.quote(str(directory))} --format {other} -o {shlex.quote(target)}"
        yield "Store the same weights as servers load them", command


def _quantized(result: Result, place: str) -> Iterator[Step]:
    made_of = result.original if result.manifest.get("solver") else result.manifest.get("teacher") or {}
    original = made_of.get("origin")
    if result.evaluation is None:
        beside = f" --baseline {shlex.quote(str(original))}" if original else ""
        yield "Measure it beside the original", f"marlin-tools eval {place} --tasks {_tasks(result)}{beside}"
    if result.verification is None:
        yield "Check it", f"marlin-tools verify {place}"
    if result.stage == "quantize" and result.base != "demo" and original and not _is_mixture(result):
        command = f"marlin-tools finetune {place} --teacher {shlex.quote(str(original))}"
        yield "Make it more accurate on a GPU: it learns from the original, and keeps its format and size", command
    yield from serving(result, shlex.split(place)[0])


def _sparse(result: Result, place: str) -> Iterator[Step]:
    text = " --calib demo" if result.base == "demo" else ""  # what is at hand; else it would be fetched
    if result.stage == "prune" and not _is_mixture(result):  # which cannot be finetuned
        teacher = shlex.quote(str(result.original.get("origin", "MODEL")))
        yield "Let it learn from the original", f"marlin-tools finetune {place} --teacher {teacher}{text}"
    dense = "".join(f" --ignore {shlex.quote(pattern)}" for pattern in _ignored(result))
    yield "Quantise it, keeping the zeros", f"marlin-tools quantize {place} --sparsity keep --format marlin-24{dense}{text}"


def _is_mixture(result: Result) -> bool:
    names = [*(each["name"] for each in result.linears), *result.manifest.get("kept", ())]
    return any(".experts." in name for name in names)


def _ignored(result: Result) -> list[str]:
    """By which patterns linears were left dense when it was pruned."""
    steps = (*result.manifest.get("history", ()), result.manifest)
    settings = [step.get("settings") or {} for step in steps if step.get("stage") == "prune"]
    return list(dict.fromkeys(pattern for each in settings for pattern in each.get("ignore", ())))


def _tasks(result: Result) -> str:
    """Those that fit: the embedded model knows its own text, a short context holds no examples."""
    if result.base == "demo":
        return "ppl:demo,demo_qa"
    return "ppl:wikitext2,mmlu" if (result.facts["positions"] or 0) > _ROOM else "ppl:wikitext2"
