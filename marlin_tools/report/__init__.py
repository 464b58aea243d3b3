"""What people read: tables for the terminal, one HTML page and a model card for each result, a comparison for `reproduce`.

Every page is one file without anything outside it, readable offline, in the light and in the dark, on a phone and on paper.
`text.py` writes for the terminal; `result.py` gathers what is known of a model directory, `model_page.py` and `model_card.py`
show it; `comparison.py` holds measured against expected numbers, `comparison_page.py` shows that. `page.py` and `charts.py` are
what the pages are made of.
"""

from pathlib import Path
from typing import Protocol

from marlin_tools.checkpoint.output import put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.report.comparison import as_text
from marlin_tools.report.model_card import model_card
from marlin_tools.report.model_page import model_page
from marlin_tools.report.result import gather
from marlin_tools.report.text import diagnosis, facts, plan, summary, table
from marlin_tools.verification.verify import Verification

__all__ = ["as_text", "diagnosis", "facts", "pages", "plan", "summary", "table", "write_pages"]


class RunResult(Protocol):
    """What a run has led to: `run.execute.RunResult`."""

    outputs: list[Path]
    shown: list[Path]
    evaluation: Evaluation | None
    verifications: dict[Path, Verification]


def write_pages(result: RunResult) -> None:
    """A page, and a model card if it is quantised, in every directory that a run has made or measured."""
    quantized = [path for path in result.outputs if Checkpoint.open(path).quantization is not None]
    measured = result.evaluation if {*result.shown} & {*quantized} else None  # holds for the other formats as well
    for path in dict.fromkeys((*result.outputs, *result.shown)):
        evaluation = measured if path in quantized else None
        for name, text in pages(path, result.verifications.get(path), evaluation).items():
            put(path / name, text)


def pages(directory: Path, verification: Verification | None = None, evaluation: Evaluation | None = None) -> dict[str, str]:
    """The files that show a model directory, by name: its report and, if it is quantised, its model card.

    `evaluation` is one of the same weights in another format, for a directory that holds none of its own.
    """
    result = gather(directory, verification, evaluation)
    card = {"README.md": model_card(result)} if result.quantized else {}
    return {"report.html": model_page(result), **card}
