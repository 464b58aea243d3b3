"""What people read: tables for the terminal, one HTML page and a model card for each result, comparisons of several.

Every page is one file without anything outside it, readable offline, in the light and in the dark, on a phone and on paper.
`text.py` writes for the terminal; `result.py` gathers what is known of a model directory, `templates/` show it, `page.py` fills
them; `advice.py` says what to do next. `comparison.py` shows the verdicts of `reproduce`, `difference.py` any two results.
"""

from pathlib import Path

from marlin_tools.checkpoint.output import put
from marlin_tools.checkpoint.reader import Checkpoint
from marlin_tools.evaluation.scores import Evaluation
from marlin_tools.report.advice import Step, next_steps, serving
from marlin_tools.report.page import markdown, page
from marlin_tools.report.result import gather
from marlin_tools.report.text import diagnosis, facts, plan, summary, table
from marlin_tools.run.execute import RunResult
from marlin_tools.verification.verify import Verification

__all__ = ["diagnosis", "facts", "pages", "plan", "summary", "table", "write_pages"]


def write_pages(run: RunResult) -> dict[Path, list[Step]]:
    """Give every directory of a run its page and its card, and say for each what to do next.

    A measurement of one format holds for the others of the same run, whose weights are the same.
    """
    quantized = [path for path in run.outputs if Checkpoint.open(path).quantization is not None]
    measured = run.evaluation if {*run.shown} & {*quantized} else None
    steps: dict[Path, list[Step]] = {}
    for path in dict.fromkeys((*run.outputs, *run.shown)):
        files, steps[path] = pages(path, run.verifications.get(path), measured if path in quantized else None)
        for name, text in files.items():
            put(path / name, text)
    return steps


def pages(
    directory: Path, verification: Verification | None = None, evaluation: Evaluation | None = None
) -> tuple[dict[str, str], list[Step]]:
    """The report of a model directory and, if it is quantised, its model card, by file name; and what to do next with it.

    `evaluation` is one of the same weights in another format, for a directory that holds none of its own.
    """
    result = gather(directory, verification, evaluation)
    steps = next_steps(result, directory)
    files = {"report.html": page("model.html.j2", result=result, steps=steps)}
    if result.quantized:
        files["README.md"] = markdown("card.md.j2", result=result, steps=list(serving(result, ".")))
    return files, steps
