"""The embedded model as most tests of pages want it."""

import pytest

from marlin_tools import report
from marlin_tools.recipe.recipe import Recipe
from marlin_tools.run.execute import execute
from marlin_tools.run.plan import plan
from report_pages import STAGES


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The embedded model, rounded, in two formats, with one linear left out."""
    recipe = Recipe.model_validate({"name": "x", "model": "demo", "stages": STAGES})
    out = tmp_path_factory.mktemp("made") / "x"
    report.write_pages(execute(plan(recipe, out)))
    return out
