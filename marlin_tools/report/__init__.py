"""What people read: tables for the terminal, one HTML page and a model card for each result, a comparison for `reproduce`.

Every page is one file without anything outside it, readable offline, in the light and in the dark, on a phone and on paper.
`text.py` writes for the terminal; `result.py` gathers what is known of a model directory, `model_page.py` and `model_card.py`
show it; `comparison.py` holds measured against expected numbers, `comparison_page.py` shows that. `page.py` and `charts.py` are
what the pages are made of.
"""

from pathlib import Path

from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.report.comparison import as_text
from marlin_tools.report.model_card import model_card
from marlin_tools.report.model_page import model_page
from marlin_tools.report.result import gather
from marlin_tools.report.text import diagnosis, facts, plan, summary, table
from marlin_tools.verification.verify import Verification

__all__ = ["as_text", "diagnosis", "facts", "pages", "plan", "summary", "table"]


def pages(directory: Path, verification: Verification | None = None, evaluation: Evaluation | None = None) -> dict[str, str]:
    """The files that show a model directory, by name: its report and, if it is quantised, its model card.

    `evaluation` is one of the same weights in another format, for a directory that holds none of its own.
    """
    result = gather(directory, verification, evaluation)
    card = {"README.md": model_card(result)} if result.quantized else {}
    return {"report.html": model_page(result), **card}
